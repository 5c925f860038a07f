"""Actors whose start fails: a reason to end where none has ever started, and one to wait a while where some have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from producers import actor_slots
from producers.actor_slots import ActorSlots, Answer, Loss
from producers.messages import Seat
from qwenimg_dist.config import ClusterConfig

RETRIES = 3


class Reference:
    """What Ray gives at once for what comes later; `value` is the answer, or an error to be raised."""

    def __init__(self, value: Any = None) -> None:
        self.value = value


def start_failed() -> ActorDiedError:
    """As Ray tells that a constructor raised."""
    return ActorDiedError(RayTaskError("__init__", "no data set", ValueError("no data set")))


class Pool:
    """Slots on a Ray and a clock of the test's; `starts` says how each next start ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_places: int, starts: list[Any]) -> None:
        self.now_s = 0.0
        self.starts = starts
        self.running: list[Reference] = []
        monkeypatch.setattr(actor_slots, "time", SimpleNamespace(monotonic=lambda: self.now_s, sleep=self.pass_time))
        monkeypatch.setattr(actor_slots, "end_actors", lambda actors: list(actors))
        monkeypatch.setattr(actor_slots, "ray", SimpleNamespace(wait=self._wait, get=self._get))
        self.slots = ActorSlots[str, int](
            list(range(num_places)),
            ClusterConfig(unit_retries=RETRIES),
            start=self._start,
            run=self._run,
            needs={"CPU": 1.0},
            who="producer",
            less_memory="",
            error=RuntimeError,
        )

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds

    def wait(self) -> list[Answer[str, int] | Loss[str]]:
        return self.slots.wait(1.0)

    def _start(self, _: int) -> Any:
        ready = Reference(self.starts.pop(0))
        return SimpleNamespace(ready=SimpleNamespace(remote=lambda: ready))

    def _run(self, _: Any) -> Reference:
        self.running.append(Reference())
        return self.running[-1]

    def _wait(self, references: list[Reference], **_: Any) -> tuple[list[Reference], list[Reference]]:
        return [one for one in references if one.value is not None][:1], []

    def _get(self, reference: Reference) -> Any:
        if isinstance(reference.value, Exception):
            raise reference.value
        return reference.value


def seat(pid: int) -> Seat:
    return Seat(pid=pid, mark="")


def test_a_start_that_fails_before_any_came_about_ends_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(monkeypatch, 2, [start_failed(), seat(1)])
    with pytest.raises(RuntimeError, match="a producer cannot start: its start failed"):
        pool.wait()


def test_a_machine_that_has_just_joined_may_lack_its_storage_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(monkeypatch, 2, [seat(1), seat(2), start_failed(), start_failed(), seat(3)])
    pool.wait()
    pool.wait()
    pool.slots.submit("a")
    pool.slots.submit("b")
    pool.running[1].value = ActorDiedError()
    (lost,) = pool.wait()
    assert isinstance(lost, Loss)
    assert lost.task == "b"
    assert pool.wait() == []  # the start in its place fails
    assert (len(pool.slots), pool.slots.num_idle, pool.slots.num_busy) == (2, 0, 1)
    pool.pass_time(9.0)
    assert pool.wait() == []
    assert len(pool.starts) == 2
    pool.running[0].value = "done"  # the other one works on
    (answer,) = pool.wait()
    assert isinstance(answer, Answer)
    assert pool.slots.num_idle == 1
    for seconds in (2.0, 21.0):  # 10 s after the first failure, 20 s after the second
        pool.pass_time(seconds)
        pool.wait()
    assert pool.starts == []
    assert (len(pool.slots), pool.slots.num_idle) == (2, 2)


def test_a_whole_machine_that_lacks_its_storage_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    num = 2 * RETRIES + 2
    fail, well = [start_failed() for _ in range(num)], [seat(pid) for pid in range(num)]
    pool = Pool(monkeypatch, num, [*well, *fail, *well])
    for _ in range(num):
        pool.wait()
        pool.slots.submit("a")
    for one in pool.running:
        one.value = ActorDiedError()
    for _ in range(2 * num):
        pool.wait()
    assert (len(pool.slots), pool.slots.num_idle, len(pool.starts)) == (num, 0, num)
    pool.pass_time(11.0)
    for _ in range(num):
        pool.wait()
    assert (len(pool.slots), pool.slots.num_idle, pool.starts) == (num, num, [])


def test_starts_that_fail_again_and_again_end_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(monkeypatch, 1, [seat(1), *(start_failed() for _ in range(9))])
    pool.wait()
    pool.slots.submit("a")
    pool.running[0].value = ActorDiedError()
    pool.wait()
    with pytest.raises(RuntimeError, match="cannot start"):
        [pool.wait() for _ in range(200)]
    assert len(pool.starts) == 9 - RETRIES - 1
    assert 10 + 20 + 30 <= pool.now_s < 80
