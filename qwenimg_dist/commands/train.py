"""Train the configured stage on the ranks that are here, or go on where an earlier run ended.

    qwenimg-dist train data.path=DATA run.path=RUN [model=... stage=... train.steps=... cluster.ranks=2]

Ray Train hosts one gang of ZeRO-3 ranks and starts it anew when one dies (cluster.max_restarts). Without a checkpoint
in RUN it starts fresh and says so; with checkpoints of which none is valid it stops (exit code 2). SIGTERM or Ctrl-C
saves and ends with exit code 0; the same command goes on. Several data sets: `data.mix={a: {path: A, weight: 3}, b:
{path: B, weight: 1}}` in the place of `data.path`. `torchrun -m consumers` is the way without Ray.

    qwenimg-dist train ... train.dry_run=true      # prints steps, images, epochs, buckets, fill slots; writes nothing
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Final, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qwenimg_dist.commands.inputs import required
from qwenimg_dist.compose import load_config
from qwenimg_dist.config import ClusterConfig, Config

SUMMARY: Final = "one stage on a gang of ZeRO-3 ranks; the same command again resumes"

STOP_FILE: Final = ".stop"
LOG_FILE: Final = "train.log"
_POLL_S: Final = 0.5
_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_SHOWN_CAUSE_LINES: Final = 12


def run(args: list[str]) -> int:
    """Train. Returns 0 when done or stopped and saved, 1 when the gang failed too often, 2 for unusable input."""
    config = load_config(args)
    run_dir = Path(required(config.run.path, "run.path"))
    if config.train.dry_run:
        return _dry_run(config)
    from consumers.run_directory import preflight  # imports torch

    preflight(config)  # bad input is named in seconds, before Ray and with nothing written
    if _is_complete(config, run_dir):
        if degraded := _verdict(config, run_dir):
            print(f"error: {degraded}", file=sys.stderr)
            return 1
        print(f"training complete already: {run_dir}", file=sys.stderr)
        return 0
    from producers.pool import machines, ray_session

    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    # The session counts CPUs for actors; here they are the ranks.
    cluster = config.cluster.model_copy(
        update={
            "producers": max(config.cluster.ranks, config.cluster.producers),
            "cpus_per_producer": max(config.cluster.cpus_per_rank, config.cluster.cpus_per_producer),
        }
    )
    stop = threading.Event()
    with ray_session(cluster), _signals(stop):
        check_room(config.cluster, machines())
        return _train(config, run_dir, stop)


def _dry_run(config: Config) -> int:
    from consumers.run_plan import dry_run

    plan = dry_run(config, world_size=config.cluster.ranks)
    console = Console(soft_wrap=True)
    for table in plan.tables():
        console.print(table.rich() if console.is_terminal else table.text(), highlight=False, markup=False)
    for warning in plan.warnings():
        console.print(f"warning: {warning}", highlight=False, markup=False)
    return 0


def _is_complete(config: Config, run_dir: Path) -> bool:
    """Whether the newest valid checkpoint is of the last step, so that no ranks need to start to find that out."""
    from consumers.checkpoint_files import list_checkpoints

    steps = [info.step for info in list_checkpoints(run_dir) if info.fault is None]
    last = min(config.train.steps, config.train.stop_after or config.train.steps)
    return bool(steps) and max(steps) >= last and not config.train.fresh


def _verdict(config: Config, run_dir: Path) -> str:
    """Why the guard ended a run at its last step; empty if it did not."""
    from consumers.checkpoint_files import STATE, list_checkpoints
    from consumers.guard import Guard
    from consumers.held_out import read_start, start_from_json

    start = start_from_json(read_start(run_dir))
    newest = [info for info in list_checkpoints(run_dir) if info.fault is None][-1]
    state = json.loads((newest.path / STATE).read_text())
    return Guard(config.evaluate, start.losses if start else {}, state.get("guard")).verdict


def check_room(cluster: ClusterConfig, machines: Sequence[Mapping[str, float]]) -> None:
    """Raise ValueError if these machines, were they free, have no room for all ranks at once.

    Ray Train would wait for them for ever, without a word.
    """
    need = {"CPU": cluster.cpus_per_rank, "GPU": 1.0 if cluster.device == "cuda" else 0.0}
    places = [
        min(int(machine.get(name, 0.0) / amount) for name, amount in need.items() if amount) for machine in machines
    ]
    if sum(places) < cluster.ranks:
        there = "; ".join(f"{m.get('CPU', 0.0):g} CPUs and {m.get('GPU', 0.0):g} GPUs" for m in machines)
        raise ValueError(
            f"cluster.ranks={cluster.ranks} ranks need {need['CPU']:g} CPUs and {need['GPU']:g} GPUs each, Ray has "
            f"machines of {there or 'nothing'}: room for {sum(places)}. Lower cluster.ranks, set cluster.device=cpu, "
            "or set cluster.address to a cluster that has them"
        )


def _train(config: Config, run_dir: Path, stop: threading.Event) -> int:
    run_dir.mkdir(parents=True, exist_ok=True)
    command_id = uuid.uuid4().hex[:12]
    stop_file = run_dir / f"{STOP_FILE}-{command_id}"  # a second `train` started by mistake must not stop this one
    gang = _Gang(config, command_id)
    console = Console(soft_wrap=True, stderr=True)  # not as a context: that would hold every line back to its end
    with _Display(console, config, run_dir) as display:
        gang.start()
        while gang.is_alive():
            display.update()
            if stop.is_set() and not display.heard:
                console.print("stopped before the ranks were there; nothing was changed", highlight=False)
                return 0
            if stop.is_set() and not stop_file.exists():
                console.print("stopping: the ranks save and end", highlight=False)
                stop_file.touch()
            gang.join(_POLL_S)
        display.update()
    stop_file.unlink(missing_ok=True)
    if gang.error is not None:
        what = f"training failed (restarts allowed: {config.cluster.max_restarts})"
        print(f"error: {what}: {_cause(gang.error)}", file=sys.stderr)
        return 1
    answer: dict[str, Any] = gang.answer or {}
    if "error" in answer:
        print(f"error: {answer['error']}", file=sys.stderr)
        return int(answer["code"])
    outcome = answer.get("outcome", "ended")
    goes_on = " (the same command goes on)" if outcome == "stopped" else ""
    print(f"training {outcome}: {run_dir}{goes_on}", file=sys.stderr)
    return 0


class _Gang(threading.Thread):
    """Ray Train's `fit` in a thread of its own, so that the main thread keeps its signal handlers."""

    def __init__(self, config: Config, command_id: str) -> None:
        super().__init__(daemon=True, name="ray-train")
        self._config = config
        self._command_id = command_id
        self.answer: dict[str, Any] | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.answer = _trainer(self._config, self._command_id).fit().return_value
        except Exception as error:  # handed to the main thread, which reports it
            self.error = error


def _trainer(config: Config, command_id: str) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from qwenimg_dist.commands.train_deaths import Deaths

    cluster, on_gpu = config.cluster, config.cluster.device == "cuda"
    threads = str(max(1, int(cluster.cpus_per_rank)))
    run_dir = Path(required(config.run.path, "run.path")).resolve()
    resources = {"CPU": cluster.cpus_per_rank, **({"GPU": 1.0} if on_gpu else {})}
    return TorchTrainer(
        _rank,
        train_loop_config={"config": config.model_dump(mode="json"), "cwd": str(Path.cwd()), "command_id": command_id},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=cluster.ranks, use_gpu=on_gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name="train",
            storage_path=str(run_dir / ".ray"),
            callbacks=[Deaths(str(run_dir / LOG_FILE), cluster.max_restarts)],
            failure_config=FailureConfig(max_failures=cluster.max_restarts),
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}},
        ),
    )


def _rank(job: dict[str, Any]) -> dict[str, Any]:
    """What each rank runs. What a new start would meet again is returned, not raised: Ray would restart the gang."""
    from consumers.errors import TrainingError
    from consumers.session import Hooks
    from consumers.trainer import train
    from qwenimg_dist.compose import validate

    with suppress(OSError):  # relative paths mean what they mean to the command; on another node they may not exist
        os.chdir(job["cwd"])
    config = validate(job["config"])
    run_dir = Path(required(config.run.path, "run.path"))
    is_first = os.environ.get("RANK", "0") == "0"
    stop_file = run_dir / f"{STOP_FILE}-{job['command_id']}"

    def say(line: str) -> None:
        # A disk without room for a line must not take the place of what the line says, nor start the gang anew.
        with suppress(OSError), open(run_dir / LOG_FILE, "a", encoding="utf-8") as sink:
            sink.write(line + "\n")

    if is_first:
        say(f"{os.environ.get('WORLD_SIZE', '1')} ranks are there")
    try:
        hooks = Hooks(
            stop_requested=lambda: is_first and stop_file.exists(),
            say=say,
            log_file=str((run_dir / LOG_FILE).absolute()),
            command_id=str(job["command_id"]),
        )
        outcome = train(config, hooks)
    except ValueError as error:
        return {"error": str(error), "code": 2}
    except TrainingError as error:
        return {"error": str(error), "code": 1}
    return {"outcome": outcome}


class _Display:
    """What the ranks wrote to `train.log` and how far they are: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console, config: Config, run_dir: Path) -> None:
        self._console = console
        self._log = run_dir / LOG_FILE
        self._position = self._log.stat().st_size if self._log.exists() else 0
        self.heard = False
        """Whether the ranks have said anything: until then there is nothing to save."""
        self._bar = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting the ranks", total=config.train.steps)

    def __enter__(self) -> _Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self) -> None:
        """Show what is new."""
        for line in self._new_lines():
            self.heard = True
            words = line.split(maxsplit=2)
            if self._console.is_terminal and words[:1] == ["step"] and "/" in words[1]:
                self._bar.update(self._task, completed=int(words[1].partition("/")[0]), description=words[2])
            else:
                self._console.print(line, highlight=False, markup=False)

    def _new_lines(self) -> Iterator[str]:
        if not self._log.exists():
            return
        with open(self._log, encoding="utf-8", errors="replace") as source:
            source.seek(self._position)
            yield from self._whole_lines(source)

    def _whole_lines(self, source: TextIO) -> Iterator[str]:
        while (line := source.readline()).endswith("\n"):
            self._position = source.tell()
            yield line.rstrip("\n")


def _cause(error: BaseException) -> str:
    """The last lines of what the ranks said: Ray nests every rank's whole traceback."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return "\n  ".join(lines[-_SHOWN_CAUSE_LINES:])


@contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    """SIGTERM and SIGINT ask for a stop. Installed after Ray, which puts its own handlers there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice
        stop.set()

    before = {number: signal.signal(number, ask) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
