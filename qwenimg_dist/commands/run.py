"""Both sides in one Ray job: `produce` and `train` follow each other through the data set directory.

    qwenimg-dist run source.path=PICTURES data.path=DATA run.path=RUN [model=... stage=... cluster=node_8gpu_both]

Training starts on the first units that are committed and goes on to `train.steps`; the producers end, and give back
what they reserve, when the source is exhausted, with `follow=true` when training is done. `cluster.max_ahead_bytes`
holds them back; with `cluster.elastic=true` their places become ranks then. SIGTERM or Ctrl-C ends both sides, saved,
with exit code 0. When one side fails, the other one is brought to its end, saved, and the exit code is the failure's.
Ended in any way, the same command goes on, and so do `produce` and `train follow=true` one by one on the same
directories.

    qwenimg-dist run status run.path=RUN [--json]        how it stands, from anywhere that sees the storage
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from rich.console import Console

from producers.progress import ProduceProgress
from producers.workers import ProduceError
from qwenimg_dist.commands import produce
from qwenimg_dist.commands.inputs import describe_os_error, required
from qwenimg_dist.commands.stopping import catch_signals, stop_signals
from qwenimg_dist.commands.train import Ended, Training, already_ended, check_room, places, prepare_environment
from qwenimg_dist.compose import load_config, validate
from qwenimg_dist.config import ClusterConfig, Config

SUMMARY: Final = "produce and train following each other in one Ray job; the same command again goes on"

_POLL_S: Final = 0.5
_LINE_EVERY_S: Final = 60.0
_GOES_ON: Final = "the same command goes on"


def run(args: list[str]) -> int:
    """Produce and train. Returns 0 when trained or stopped and saved, 1 when a side failed, 2 for unusable input."""
    if args[:1] == ["status"]:
        return _status(args[1:])
    config = load_config(args)
    run_dir = Path(required(config.run.path, "run.path"))
    training_config = check_config(config)
    production = produce.prepare(config, args)
    from consumers.run_directory import preflight  # imports torch

    preflight(training_config)
    if (ended := already_ended(training_config, run_dir)) is not None:
        return ended.tell()
    from producers.ray_cluster import machines, ray_session

    prepare_environment()
    cluster, stop = config.cluster, threading.Event()
    with ray_session(cluster, cpus=_cpus(cluster)), stop_signals(stop):
        check_room(cluster, machines())
        check_ranks(config, cluster.ranks)
        no_room = room_beside(cluster, machines())
        if no_room and config.follow:  # something to produce may come at any time
            raise ValueError(no_room)
        with Training(training_config, run_dir) as training:
            producing = Producing(production, training.console, no_room=no_room)
            grown = partial(ranks_now, config, machines) if cluster.elastic else None
            ended = Both(training, producing, stop, ranks=cluster.ranks, grown=grown).go()
    if producing.listed.is_set():
        produce.show_funnel(production, Console(soft_wrap=True))
    return conclude(ended, producing, stopped=stop.is_set())


def _status(args: list[str]) -> int:
    from qwenimg_dist.report.run_status import run_status

    config = load_config([word for word in args if word != "--json"])
    found = run_status(Path(required(config.run.path, "run.path")))
    if "--json" in args:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        Console(soft_wrap=True).print(found.table().text(), highlight=False, markup=False)
    return 0


def check_config(config: Config) -> Config:
    """The config of the training side, which follows. Raises ValueError for what cannot go together."""
    if config.train.dry_run:
        raise ValueError("train.dry_run=true is of `train`: it plans what the data set holds; `run` begins")
    if config.cluster.elastic and config.follow:
        raise ValueError(
            "cluster.elastic=true lets the gang grow when the source is exhausted, with follow=true it never is: leave "
            "one of them out"
        )
    if len(config.data.mix) > 1:
        raise ValueError(
            "`run` trains on the one data set that it produces, data.mix names several: `produce` each of them, then "
            "`train`"
        )
    return validate({**config.model_dump(mode="json"), "follow": True})


def _cpus(cluster: ClusterConfig) -> float:
    return cluster.ranks * cluster.cpus_per_rank + cluster.producers * cluster.producer_cpus + cluster.reward_cpus


def room_beside(cluster: ClusterConfig, machines: Sequence[Mapping[str, float]]) -> str:
    """Why these machines, were they free, have no room for a producer beside the ranks; empty if they have.

    Ray would wait for it for ever. Fewer producers than asked for will do: the others start when there is room.
    """
    need = {"CPU": cluster.producer_cpus, "GPU": cluster.gpus_per_producer}
    for index, machine in enumerate(machines):
        if any(machine.get(name, 0.0) < amount for name, amount in need.items()):
            continue
        left = [dict(other) for other in machines]
        for name, amount in need.items():
            left[index][name] = left[index].get(name, 0.0) - amount
        if places(cluster, left) >= cluster.ranks:
            return ""
    there = "; ".join(f"{m.get('CPU', 0.0):g} CPUs and {m.get('GPU', 0.0):g} GPUs" for m in machines)
    return (
        f"beside cluster.ranks={cluster.ranks} ranks there is no room for a producer ({need['CPU']:g} CPUs and "
        f"{need['GPU']:g} GPUs), Ray has machines of {there}: lower cluster.ranks (cluster.elastic=true gives the "
        "producers' places to ranks once the source is exhausted), let CPUs produce "
        "(cluster.gpus_per_producer=0), or `produce` first and `train` then"
    )


def grown_ranks(cluster: ClusterConfig, machines: Sequence[Mapping[str, float]]) -> int:
    """Ranks that there is room for once the producers have given theirs back."""
    if cluster.device == "cuda":
        freed = int(cluster.producers * cluster.gpus_per_producer)
    else:
        freed = int(cluster.producers * cluster.producer_cpus / cluster.cpus_per_rank)
    return max(cluster.ranks, min(cluster.ranks + freed, places(cluster, machines)))


def ranks_now(config: Config, machines: Callable[[], Sequence[Mapping[str, float]]]) -> int:
    """As `grown_ranks`, of the machines that there are by now (of those at the start, some may have died), and as many
    of them as can be cut into the groups of `engine.hpz_partition`."""
    ranks = grown_ranks(config.cluster, machines())
    return max(config.cluster.ranks, ranks - ranks % config.engine.hpz_partition)


def check_ranks(config: Config, ranks: int) -> None:
    """Before anything starts: whether a gang of this size can be cut as the config says."""
    from consumers.zero_settings import check_hpz

    check_hpz(config, ranks)


class Producing(threading.Thread):
    """`produce` in a thread of its own: the main thread keeps the signals and the training side."""

    def __init__(self, production: produce.Production, console: Console, *, no_room: str) -> None:
        """`no_room`: why no producer could start, which is a failure if there is anything to produce; or empty."""
        super().__init__(daemon=True, name="produce")
        self._production = production
        self.no_room = no_room
        self._progress = ProduceProgress(console, bar=False, line_every_s=_LINE_EVERY_S)
        self.stop = threading.Event()
        """Set, and started tasks are finished and no other is begun."""
        self.listed = threading.Event()
        """The source was looked at, and `num_pending` is known."""
        self.num_pending = 0
        self.finished = False
        """Every unit is ready, and the producers' places are given back."""
        self.failure: Ended | None = None

    def run(self) -> None:
        try:
            self.finished = produce.drive(self._production, self._progress, self.stop, on_listed=self._note)
        except ProduceError as error:
            self._fail(1, str(error))
        except ValueError as error:
            self._fail(2, str(error))
        except OSError as error:
            self._fail(1, describe_os_error(error))
        except Exception as error:  # told by the main thread, which ends the other side first
            self._fail(1, f"{type(error).__name__}: {error}")

    def _note(self, num_pending: int) -> None:
        if num_pending and self.no_room:
            raise ValueError(self.no_room)
        self.num_pending = num_pending
        self.listed.set()

    def _fail(self, code: int, message: str) -> None:
        self.failure = Ended(outcome="failed", code=code, message=f"error: producing failed: {message}")


class Both:
    """Drives the two sides from the main thread until training has ended."""

    def __init__(
        self,
        training: Training,
        producing: Producing,
        stop: threading.Event,
        *,
        ranks: int,
        grown: Callable[[], int] | None,
    ) -> None:
        """`grown` gives the ranks that training goes on with when the source is exhausted; None: it does not grow."""
        self._training, self._producing, self._stop = training, producing, stop
        self._ranks, self._count_grown = ranks, grown
        self._grown = 0
        """0: not counted yet."""

    def go(self) -> Ended | None:
        """Start both; returns how training ended, None if it was not begun. The producers have ended then, too."""
        self._producing.start()
        ended = self._train() if self._may_start() else None
        self._producing.stop.set()
        while self._producing.is_alive():  # in bites: a signal is heard between them
            self._producing.join(_POLL_S)
        return ended

    def _may_start(self) -> bool:
        """Where it matters whether there is anything to produce at all, that is waited for: a gang that would grow is
        large at once if there is nothing, and it needs no producer's room then."""
        if self._count_grown is None and not self._producing.no_room:
            return True
        while self._producing.is_alive() and not self._producing.listed.wait(_POLL_S):
            if self._stop.is_set():
                return False
        if self._producing.failure is not None:
            return False
        if self._count_grown is not None and not self._producing.num_pending:
            self._ranks = max(self._ranks, self._count_grown())
        return not self._stop.is_set()

    def _train(self) -> Ended:
        self._training.start(self._ranks)
        catch_signals(self._stop)  # Ray Train may have put handlers of its own there
        while True:
            alive = self._training.poll()
            leaving = self._stop.is_set() or self._producing.failure is not None
            grows = self._grows()
            if leaving:
                self._producing.stop.set()
            if alive and leaving:
                self._training.stop()
            elif alive and grows:
                why = f"the source is exhausted: the ranks save, and {self._grown} go on in the place of {self._ranks}"
                self._training.stop(why, abandon=False)
            elif not alive:
                ended = self._training.ended()
                if ended.outcome != "stopped" or leaving or not grows:
                    return ended
                assert self._count_grown is not None
                # Machines may have died while the ranks saved.
                self._ranks = self._grown = max(self._ranks, self._count_grown())
                self._training.start(self._ranks)

    def _grows(self) -> bool:
        """Whether the source is exhausted, and there is room for more ranks by then; counted once."""
        if self._count_grown is None or not self._producing.finished:
            return False
        if not self._grown:
            self._grown = max(self._ranks, self._count_grown())
        return self._grown > self._ranks


def conclude(ended: Ended | None, producing: Producing, *, stopped: bool) -> int:
    """Tell how both sides ended; returns the exit code."""
    failure = producing.failure
    if failure is not None:
        trained = ended.message.removeprefix("error: ") if ended is not None else "training was not begun"
        print(f"{failure.message}\n  {trained}. What is committed is kept: {_GOES_ON}", file=sys.stderr)
        return failure.code
    produced = "all units are ready" if producing.finished else f"producing ended before the last unit ({_GOES_ON})"
    if ended is None:
        print(f"stopped before training began; {produced}", file=sys.stderr)
        return 0
    if ended.code != 0:
        print(f"{ended.message}\n  {produced}; what is committed is kept", file=sys.stderr)
        return ended.code
    done = ended.outcome == "complete" and not producing.finished and not stopped
    produced = "producing ended with it, before the last unit (`produce` makes the others)" if done else produced
    print(f"{ended.message}; {produced}", file=sys.stderr)
    return 0
