"""Train the configured stage on the ranks that are here, or go on where an earlier run ended.

    qwenimg-dist train data.path=DATA run.path=RUN [model=... stage=... train.steps=... cluster.ranks=2]

Ray Train hosts one gang of ZeRO-3 ranks and starts it anew when one dies (cluster.max_restarts). Without a checkpoint
in RUN it starts fresh and says so; with checkpoints of which none is valid it stops (exit code 2). SIGTERM or Ctrl-C
saves and ends with exit code 0; the same command goes on. Several data sets: `data.mix={a: {path: A, weight: 3}, b:
{path: B, weight: 1}}` in the place of `data.path`. `torchrun -m consumers` is the way without Ray.

    qwenimg-dist train ... train.dry_run=true      # prints steps, images, epochs, buckets, fill slots; writes nothing
"""

from __future__ import annotations

import math
import os
import sys
import threading
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from rich.console import Console

from qwenimg_dist.commands.inputs import required
from qwenimg_dist.commands.stopping import stop_signals
from qwenimg_dist.commands.train_display import TrainDisplay
from qwenimg_dist.commands.train_rank import LOG_FILE, STOP_FILE, rank
from qwenimg_dist.compose import load_config
from qwenimg_dist.config import ClusterConfig, Config, GrpoConfig
from qwenimg_dist.patience import is_seen, patiently
from qwenimg_dist.rewards import check_rewards

SUMMARY: Final = "one stage on a gang of ZeRO-3 ranks; the same command again resumes"

Work = Literal["training", "comparison"]

_POLL_S: Final = 0.5


def run(args: list[str]) -> int:
    """Train. Returns 0 when done or stopped and saved, 1 when the gang failed too often, 2 for unusable input."""
    config = load_config(args)
    run_dir = Path(required(config.run.path, "run.path"))
    if config.train.dry_run:
        return _dry_run(config)
    from consumers.run_directory import preflight  # imports torch

    preflight(config)  # bad input is named in seconds, before Ray and with nothing written
    if isinstance(config.objective, GrpoConfig):
        from consumers.judges import check_judges

        check_rewards(config.reward)
        check_judges(config, run_dir)
    if (ended := already_ended(config, run_dir)) is not None:
        return ended.tell()
    from producers.ray_cluster import machines, ray_session

    prepare_environment()
    stop = threading.Event()
    cpus = config.cluster.ranks * config.cluster.cpus_per_rank + config.cluster.reward_cpus
    with ray_session(config.cluster, cpus=cpus), stop_signals(stop):
        check_room(config.cluster, machines())
        return _train(config, run_dir, stop)


def prepare_environment() -> None:
    """Before Ray starts, whose processes inherit it."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")


def _dry_run(config: Config) -> int:
    from consumers.run_plan import dry_run

    plan = dry_run(config, world_size=config.cluster.ranks)
    console = Console(soft_wrap=True)
    for table in plan.tables():
        console.print(table.rich() if console.is_terminal else table.text(), highlight=False, markup=False)
    for warning in plan.warnings():
        console.print(f"warning: {warning}", highlight=False, markup=False)
    return 0


def already_ended(config: Config, run_dir: Path) -> Ended | None:
    """How a run that has come to its last step ended; None if there is something left to train."""
    from consumers.checkpoint_files import CheckpointError

    if not _is_complete(config, run_dir):
        return None
    try:
        degraded = _verdict(config, run_dir)
    except CheckpointError:  # of the right size, and damaged: the ranks pass it over and go on from the one before
        return None
    if degraded:
        return Ended(outcome="failed", code=1, message=f"error: {degraded}")
    return Ended(outcome="complete", code=0, message=f"training complete already: {run_dir}")


def _is_complete(config: Config, run_dir: Path) -> bool:
    """Whether the newest valid checkpoint is of the last step, so that no ranks need to start to find that out."""
    from consumers.checkpoint_files import list_checkpoints

    steps = [info.step for info in list_checkpoints(run_dir) if info.fault is None]
    last = min(config.train.steps, config.train.stop_after or config.train.steps)
    return bool(steps) and max(steps) >= last and not config.train.fresh


def _verdict(config: Config, run_dir: Path) -> str:
    """Why the guard ended a run at its last step; empty if it did not."""
    from consumers.checkpoint_files import list_checkpoints, read_state
    from consumers.guard import Guard
    from consumers.held_out import read_start, start_from_json

    start = start_from_json(read_start(run_dir))
    newest = [info for info in list_checkpoints(run_dir) if info.fault is None][-1]
    guard = read_state(newest.path).get("guard")
    return Guard(config.evaluate, start.losses if start else {}, guard).verdict


def _needs(cluster: ClusterConfig) -> dict[str, float]:
    return {"CPU": cluster.cpus_per_rank, "GPU": 1.0 if cluster.device == "cuda" else 0.0}


def places(cluster: ClusterConfig, machines: Sequence[Mapping[str, float]]) -> int:
    """How many ranks have room on these machines at once, were they free."""
    need = [(name, amount) for name, amount in _needs(cluster).items() if amount]
    return sum(min(int(machine.get(name, 0.0) / amount) for name, amount in need) for machine in machines)


def check_room(cluster: ClusterConfig, machines: Sequence[Mapping[str, float]]) -> None:
    """Raise ValueError if these machines, were they free, have no room for all ranks at once.

    Ray Train would wait for them for ever, without a word.
    """
    if (room := places(cluster, machines)) < cluster.ranks:
        need = _needs(cluster)
        there = "; ".join(f"{m.get('CPU', 0.0):g} CPUs and {m.get('GPU', 0.0):g} GPUs" for m in machines)
        raise ValueError(
            f"cluster.ranks={cluster.ranks} ranks need {need['CPU']:g} CPUs and {need['GPU']:g} GPUs each, Ray has "
            f"machines of {there or 'nothing'}: room for {room}. Lower cluster.ranks, set cluster.device=cpu, "
            "or set cluster.address to a cluster that has them"
        )


def _train(config: Config, run_dir: Path, stop: threading.Event) -> int:
    with Training(config, run_dir) as training:
        training.start(config.cluster.ranks)
        while training.poll():
            if stop.is_set():
                training.stop()
    return training.ended().tell()


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a gang ended."""

    outcome: Literal["complete", "stopped", "unstarted", "failed"]
    """`unstarted`: told to stop before its ranks were there."""
    code: int
    message: str

    def tell(self) -> int:
        """Print the message; returns the exit code."""
        print(self.message, file=sys.stderr)
        return self.code


class Training:
    """The gang of a run directory as the command sees it: started, shown, asked to stop. For the main thread.

    A gang that has ended may be followed by another one, on other ranks: to the run it is the same command.
    """

    def __init__(self, config: Config, run_dir: Path, *, work: Work = "training") -> None:
        """`work` is what the ranks do there; of a comparison `run_dir` is the folder of the result."""
        run_dir.mkdir(parents=True, exist_ok=True)
        self._config = config
        self._run_dir = run_dir
        self._work = work
        self._command_id = uuid.uuid4().hex[:12]
        # A second `train` started by mistake must not stop this one.
        self._stop_file = run_dir / f"{STOP_FILE}-{self._command_id}"
        self._gang: _Gang | None = None
        self._ranks = 0
        self._rewards = ExitStack()
        self._reward_actors: Sequence[Any] = ()
        self._unstarted = False
        # Not as a context: that would hold every line back to its end.
        self.console = Console(soft_wrap=True, stderr=True)
        self._display = TrainDisplay(self.console, run_dir / LOG_FILE, config.train.steps)

    def __enter__(self) -> Training:
        if self._config.cluster.reward_actors and self._config.reward.active:
            from qwenimg_dist.commands.reward_actors import reward_actors

            self._reward_actors = self._rewards.enter_context(reward_actors(self._config))
        self._display.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._rewards.close()
        self._display.end()
        with suppress(OSError):  # it is this command's alone: left behind, it stops no other
            self._stop_file.unlink(missing_ok=True)

    def start(self, ranks: int) -> None:
        """Start a gang of so many ranks; none is at work."""
        patiently(lambda: self._stop_file.unlink(missing_ok=True), str(self._stop_file))
        self._ranks = ranks
        cluster = self._config.cluster.model_copy(update={"ranks": ranks})
        config = self._config.model_copy(update={"cluster": cluster})
        self._gang = _Gang(config, self._command_id, self._work, self._reward_actors)
        self._gang.start()

    def poll(self) -> bool:
        """Show what is new, and wait a moment; False once the gang has ended. One that has left a machine that is
        taken away is started anew."""
        assert self._gang is not None
        if self._unstarted:
            return False
        alive = self._gang.is_alive()
        self._display.update()
        if alive:
            self._gang.join(_POLL_S)
        elif self._gang.leaves and not is_seen(self._stop_file):
            told = f"a machine is taken away (Ray drains it): the ranks have saved, {self._ranks} start on what stays"
            self.console.print(told, highlight=False)
            self.start(self._ranks)
            return True
        return alive

    def stop(self, why: str = "stopping: the ranks save and end", *, abandon: bool = True) -> None:
        """Ask the ranks to save and end; may be called again and again. With `abandon`, ranks that have said nothing
        yet are not waited for: there is nothing to save."""
        if abandon and not self._display.heard:
            self._unstarted = True
        elif not is_seen(self._stop_file):
            with suppress(OSError):  # storage that is away: asked again, as long as the ranks go on
                self._stop_file.touch()
                self.console.print(why, highlight=False)

    def ended(self) -> Ended:
        """How it ended. Only after `poll` was False."""
        assert self._gang is not None
        if self._unstarted:
            message = "stopped before the ranks were there; nothing was changed"
            return Ended(outcome="unstarted", code=0, message=message)
        if self._gang.error is not None:
            return self._ended_by(self._gang.error)
        answer = self._gang.answer or {}
        if "error" in answer:
            return Ended(outcome="failed", code=int(answer["code"]), message=f"error: {answer['error']}")
        stopped = answer.get("outcome") == "stopped"
        message = f"{self._work} {answer.get('outcome', 'ended')}: {self._run_dir}"
        if stopped:
            return Ended(outcome="stopped", code=0, message=f"{message} (the same command goes on)")
        return Ended(outcome="complete", code=0, message=message)

    def _ended_by(self, error: BaseException) -> Ended:
        from qwenimg_dist.commands.train_deaths import GangLostError, GangStoppedError, last_lines

        cause = getattr(error, "controller_failure", error)
        if isinstance(cause, GangStoppedError):
            message = f"{self._work} {cause}: {self._run_dir} (the same command goes on)"
            return Ended(outcome="stopped", code=0, message=message)
        why = str(cause) if isinstance(cause, GangLostError) else "\n  ".join(last_lines(error))
        return Ended(outcome="failed", code=1, message=f"error: {self._work} failed: {why}")


class _Gang(threading.Thread):
    """Ray Train's `fit` in a thread of its own, so that the main thread keeps its signal handlers."""

    def __init__(self, config: Config, command_id: str, work: Work, reward_actors: Sequence[Any]) -> None:
        super().__init__(daemon=True, name="ray-train")
        self._work = work
        self._config = config
        self._command_id = command_id
        self._reward_actors = reward_actors
        self.answer: dict[str, Any] | None = None
        self.error: BaseException | None = None

    @property
    def leaves(self) -> bool:
        """It ended, saved, because a machine of it is about to be taken away."""
        return self.error is None and bool((self.answer or {}).get("leaves"))

    def run(self) -> None:
        try:
            trainer = _trainer(self._config, self._command_id, self._work, self._reward_actors)
            self.answer = trainer.fit().return_value
        except Exception as error:  # handed to the main thread, which reports it
            self.error = error


def _trainer(config: Config, command_id: str, work: Work, reward_actors: Sequence[Any]) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from qwenimg_dist.commands.train_deaths import Deaths

    cluster, on_gpu = config.cluster, config.cluster.device == "cuda"
    threads = str(max(1, int(cluster.cpus_per_rank)))
    run_dir = Path(required(config.run.path, "run.path")).resolve()
    resources = {"CPU": cluster.cpus_per_rank, **({"GPU": 1.0} if on_gpu else {})}
    return TorchTrainer(
        rank,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "cwd": str(Path.cwd()),
            "command_id": command_id,
            "work": work,
            "reward_actors": list(reward_actors),
        },
        torch_config=TorchConfig(
            backend="nccl" if on_gpu else "gloo", timeout_s=math.ceil(config.train.collective_timeout_s)
        ),
        scaling_config=ScalingConfig(num_workers=cluster.ranks, use_gpu=on_gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name="train",
            storage_path=str(run_dir / ".ray"),
            callbacks=[Deaths(run_dir, run_dir / LOG_FILE, run_dir / f"{STOP_FILE}-{command_id}", cluster)],
            failure_config=FailureConfig(max_failures=-1),  # `Deaths` counts
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}},
        ),
    )
