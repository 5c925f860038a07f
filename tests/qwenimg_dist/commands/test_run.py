"""What `run` refuses before anything starts, how many ranks it grows to, and how it tells the end of both sides."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from rich.console import Console

from qwenimg_dist.commands.run import Both, Producing, check_config, conclude, grown_ranks, ranks_now, room_beside
from qwenimg_dist.commands.train import Ended
from qwenimg_dist.compose import load_config
from qwenimg_dist.config import ClusterConfig

NODE = {"CPU": 8.0, "GPU": 4.0}
CPUS = {"CPU": 32.0}


def cluster(**settings: Any) -> ClusterConfig:
    return ClusterConfig.model_validate({"device": "cuda", **settings})


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.dry_run=true"], "is of `train`"),
        (["cluster.elastic=true", "follow=true"], "leave one of them out"),
        (["data.mix={a: {path: x, weight: 1}, b: {path: y, weight: 1}}"], "`produce` each of them, then `train`"),
        (["stage=dpo", "objective.reference=precomputed"], "objective.reference=online"),
    ],
)
def test_what_cannot_go_together_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_config(load_config(overrides))


def test_the_training_side_follows_whatever_the_source_does() -> None:
    assert check_config(load_config([])).follow
    assert check_config(load_config(["follow=true"])).follow


@pytest.mark.parametrize(
    ("settings", "machines", "refused"),
    [
        ({"ranks": 7, "gpus_per_producer": 1}, [NODE, NODE], False),
        ({"ranks": 8, "gpus_per_producer": 1}, [NODE, NODE], True),
        ({"ranks": 8, "gpus_per_producer": 0}, [NODE, NODE], False),
        ({"ranks": 8, "cpus_per_rank": 2, "gpus_per_producer": 0}, [NODE, NODE], True),
        ({"ranks": 8, "cpus_per_rank": 2, "cpus_per_producer": 16}, [NODE, NODE, CPUS], False),
        ({"ranks": 9, "gpus_per_producer": 0}, [NODE, NODE], True),
    ],
)
def test_the_ranks_and_a_producer_must_have_room_at_once(
    settings: dict[str, Any], machines: list[dict[str, float]], refused: bool
) -> None:
    assert ("cluster.ranks=" in room_beside(cluster(**settings), machines)) == refused


@pytest.mark.parametrize(
    ("settings", "machines", "grown"),
    [
        ({"ranks": 6, "producers": 2, "gpus_per_producer": 1}, [NODE, NODE], 8),
        ({"ranks": 6, "producers": 4, "gpus_per_producer": 1}, [NODE, NODE], 8),
        ({"ranks": 2, "producers": 4, "gpus_per_producer": 0.25}, [NODE], 3),
        ({"ranks": 8, "producers": 9, "gpus_per_producer": 0}, [NODE, NODE], 8),
        ({"ranks": 2, "producers": 3, "device": "cpu", "cpus_per_producer": 2}, [NODE], 8),
        ({"ranks": 1, "producers": 1, "device": "cpu", "cpus_per_rank": 2}, [NODE], 1),
    ],
)
def test_places_that_become_ranks(settings: dict[str, Any], machines: list[dict[str, float]], grown: int) -> None:
    assert grown_ranks(cluster(**settings), machines) == grown


class FakeProducing:
    """The producing side, scripted; what drives it (`Both`) is real."""

    def __init__(self, num_pending: int = 3, fails: Ended | None = None, no_room: str = "") -> None:
        self.no_room = no_room
        self.stop, self.listed = threading.Event(), threading.Event()
        self.num_pending, self.failure, self.finished = num_pending, None, False
        self._fails = fails
        self.polls = 0

    def start(self) -> None:
        self.listed.set()

    def poll(self) -> None:
        self.polls += 1
        if self.polls == 3:
            self.failure, self.finished = self._fails, self._fails is None

    def is_alive(self) -> bool:
        return not self.stop.is_set() and self.polls < 3

    def join(self, timeout: float) -> None:
        self.poll()


class FakeTraining:
    def __init__(self, producing: FakeProducing, steps: int = 10) -> None:
        self.starts: list[int] = []
        self._producing, self._left = producing, steps
        self._stopped = False

    def start(self, ranks: int) -> None:
        self.starts.append(ranks)
        self._stopped = False

    def poll(self) -> bool:
        self._producing.poll()
        self._left -= 1
        return self._left > 0 and not self._stopped

    def stop(self, why: str = "", *, abandon: bool = True) -> None:
        self._stopped = True

    def ended(self) -> Ended:
        outcome = "complete" if self._left <= 0 else "stopped"
        return Ended(outcome=outcome, code=0, message=f"training {outcome}")  # type: ignore[arg-type]


@pytest.mark.parametrize(("num_pending", "starts"), [(3, [2, 3]), (0, [3])])
def test_the_gang_grows_when_the_source_is_exhausted_and_is_large_at_once_if_it_was(
    num_pending: int, starts: list[int]
) -> None:
    producing: Any = FakeProducing(num_pending)
    training: Any = FakeTraining(producing)
    ended = Both(training, producing, threading.Event(), ranks=2, grown=lambda: 3).go()
    assert training.starts == starts
    assert ended is not None
    assert ended.outcome == "complete"


@pytest.mark.parametrize(("counts", "starts"), [([2], [2]), ([1], [2]), ([3, 2], [2, 2]), ([3, 4], [2, 4])])
def test_the_gang_grows_into_the_machines_that_there_are_by_then(counts: list[int], starts: list[int]) -> None:
    """Some died while producers worked, or while the ranks saved."""
    producing: Any = FakeProducing()
    training: Any = FakeTraining(producing)
    left = iter(counts)
    ended = Both(training, producing, threading.Event(), ranks=2, grown=lambda: next(left)).go()
    assert training.starts == starts
    assert ended is not None
    assert ended.outcome == "complete"
    assert next(left, None) is None


def test_no_room_for_a_producer_is_a_failure_only_if_there_is_something_to_produce() -> None:
    nothing: Any = FakeProducing(num_pending=0, no_room="there is no room")
    training: Any = FakeTraining(nothing)
    ended = Both(training, nothing, threading.Event(), ranks=2, grown=None).go()
    assert training.starts == [2]
    assert ended is not None

    class Refused(FakeProducing):
        def start(self) -> None:
            self.failure = Ended(outcome="failed", code=2, message="error: producing failed: there is no room")
            self.stop.set()

    refused: Any = Refused(no_room="there is no room")
    training = FakeTraining(refused)
    assert Both(training, refused, threading.Event(), ranks=2, grown=None).go() is None
    assert training.starts == []
    assert conclude(None, refused, stopped=False) == 2

    production: Any = None
    real = Producing(production, Console(), no_room="there is no room")
    with pytest.raises(ValueError, match="there is no room"):
        real._note(3)
    assert not real.listed.is_set()
    real._note(0)
    assert real.listed.is_set()


@pytest.mark.parametrize(("hpz", "ranks"), [(1, 7), (2, 6), (4, 4)])
def test_a_gang_grows_to_what_can_be_cut(hpz: int, ranks: int) -> None:
    asked = ["cluster.ranks=4", "cluster.producers=3", "cluster.cpus_per_producer=1", f"engine.hpz_partition={hpz}"]
    assert ranks_now(load_config(asked), lambda: [NODE]) == ranks


def test_a_side_that_fails_ends_the_other_and_tells_the_way_on(capsys: pytest.CaptureFixture[str]) -> None:
    producing: Any = FakeProducing(fails=Ended(outcome="failed", code=1, message="error: producing failed: unit 7"))
    training: Any = FakeTraining(producing)
    ended = Both(training, producing, threading.Event(), ranks=2, grown=None).go()
    assert ended is not None
    assert ended.outcome == "stopped"
    assert conclude(ended, producing, stopped=False) == 1
    told = capsys.readouterr().err
    assert "producing failed: unit 7" in told
    assert "training stopped" in told
    assert "the same command goes on" in told


def test_a_stop_ends_both_with_exit_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    producing: Any = FakeProducing()
    training: Any = FakeTraining(producing)
    stop = threading.Event()
    stop.set()
    ended = Both(training, producing, stop, ranks=2, grown=None).go()
    assert producing.stop.is_set()
    assert conclude(ended, producing, stopped=True) == 0
    assert "the same command goes on" in capsys.readouterr().err
