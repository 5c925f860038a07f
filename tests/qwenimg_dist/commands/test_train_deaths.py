"""One line says which rank failed and why; those that only lost their peer are counted."""

from __future__ import annotations

from pathlib import Path

from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from qwenimg_dist.commands.train_deaths import Deaths, describe

LOST_PEER = RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:24239")


def noticed(error: Exception) -> Exception:
    """As Ray Train hands over the death of a worker process."""
    return WorkerHealthCheckFailedError("A worker health check failed.\nWorker info: ...", failure=error)


def test_the_dead_rank_is_named_before_those_that_lost_it() -> None:
    line = describe({0: LOST_PEER, 3: noticed(ActorDiedError())}, failures=1, max_restarts=3)
    assert line.startswith("the gang failed: rank 3: its process was killed (SIGKILL")
    assert ", 1 more failed with it; restart 1 of 3, from the newest valid checkpoint" in line
    assert "\n" not in line


def test_host_memory_is_named_with_the_way_out() -> None:
    line = describe({1: noticed(OutOfMemoryError("Task was killed due to the node running low on memory."))}, 2, 3)
    assert "rank 1: Ray ended its process because its machine ran out of memory" in line
    assert "run fewer ranks per machine" in line


def test_an_exception_of_a_rank_is_quoted_and_the_last_failure_says_so() -> None:
    line = describe({2: RuntimeError("CUDA error: an illegal\nmemory access")}, failures=4, max_restarts=3)
    assert "rank 2: RuntimeError: CUDA error: an illegal memory access; no restart is left" in line
    assert "cluster.max_restarts=3" in line


def test_failures_are_counted_into_the_log(tmp_path: Path) -> None:
    deaths = Deaths(str(tmp_path / "train.log"), max_restarts=1)
    deaths.after_exception(None, {0: LOST_PEER})
    deaths.after_exception(None, {0: LOST_PEER})
    first, second = (tmp_path / "train.log").read_text().splitlines()
    assert "restart 1 of 1" in first
    assert "no restart is left" in second
