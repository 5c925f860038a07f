"""A lock that one node holds is tried on the others; what counts on one node alone, or is not given, is a failure."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwenimg_dist.commands.doctor import locks
from qwenimg_dist.commands.doctor.findings import Finding
from qwenimg_dist.commands.doctor.nodes import Answers


class Nodes:
    """Two nodes in this process, where locks of two openings exclude each other as those of two machines do. Those of
    `lonely` nodes count on them alone."""

    def __init__(self, *lonely: str) -> None:
        self.head = SimpleNamespace(name="a")
        self._lonely = lonely

    def ask(self, function: Callable[..., Any], *given: Any, timeout_s: float) -> Answers:
        return Answers(values={name: self._on(name, function, *given) for name in ("a", "b")}, faults={})

    def ask_one(self, node: Any, function: Callable[..., Any], *given: Any, timeout_s: float) -> Answers:
        return Answers(values={node.name: self._on(node.name, function, *given)}, faults={})

    def _on(self, name: str, function: Callable[..., Any], file: str, *given: Any) -> Any:
        if name in self._lonely and function is locks.attempt:
            other = Path(f"{file}-of-{name}")
            Path(f"{other}.held").touch()
            return function(str(other))
        return function(file, *given)


def check(folder: Path, *lonely: str) -> list[Finding]:
    context: Any = SimpleNamespace(nodes=Nodes(*lonely), timeout_s=10.0)
    return locks.check(context, "run.path=/r", str(folder))


def test_a_lock_that_all_nodes_respect_is_well_and_nothing_is_left(tmp_path: Path) -> None:
    (found,) = check(tmp_path)
    assert (found.state, found.told) == ("ok", "held on a, refused on all 2 nodes meanwhile")
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == 1 or all("ThreadPool" not in one.name for one in threading.enumerate())


def test_a_lock_that_counts_on_one_node_alone_is_a_failure(tmp_path: Path) -> None:
    (found,) = check(tmp_path, "b")
    assert found.state == "failure"
    assert found.name == "run.path=/r: locks on b"
    assert "the lock that a held could be taken" in found.told
    assert "local_lock" in found.fix


def test_a_file_system_without_locks_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    (found,) = check(tmp_path)
    assert found.state == "failure"
    assert "gives no locks (Function not implemented)" in found.told
