"""An actor's process is ended for certain, and no other one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from producers import deaths
from producers.messages import Seat, own_seat, process_mark


@pytest.fixture
def hung(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does not hear Ray."""
    monkeypatch.setattr(deaths.ray, "kill", lambda actor, no_restart: None)
    monkeypatch.setattr(deaths, "_END_S", 0.3)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        yield process
        process.kill()


def test_a_hung_actor_of_this_machine_is_killed(hung: subprocess.Popen[bytes]) -> None:
    deaths.end_actors([(None, Seat(pid=hung.pid, mark=process_mark(hung.pid)))])
    assert hung.wait(timeout=10) == -9


@pytest.mark.parametrize("part", ["boot", "namespace", "start", "all"])
def test_a_process_of_another_machine_container_or_time_with_its_number_is_not(
    hung: subprocess.Popen[bytes], part: str
) -> None:
    boot, namespace, start = process_mark(hung.pid).split(" ")
    other = {
        "boot": f"b{boot} {namespace} {start}",
        "namespace": f"{boot} pid:[1] {start}",
        "start": f"{boot} {namespace} {int(start) - 1}",
        "all": "",
    }[part]
    deaths.end_actors([(None, Seat(pid=hung.pid, mark=other)), (None, None)])
    with pytest.raises(subprocess.TimeoutExpired):  # a process that was killed a moment ago still counts as running
        hung.wait(timeout=0.5)


def test_a_mark_is_of_one_process(hung: subprocess.Popen[bytes]) -> None:
    mine = own_seat()
    assert mine.mark == process_mark(mine.pid) != process_mark(hung.pid)
    assert replace(mine) == own_seat()
    hung.kill()
    hung.wait()
    assert process_mark(hung.pid) == ""
