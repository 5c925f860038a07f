"""`run` on a cluster that stays: the driver dies, and the same command takes over without a second set of actors."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from ray_head import RayHead, ray_head
from run_command import BOUND, kept_keys, num_ready, num_steps, ray_processes, real_keys, words
from small_run import lines
from undisturbed import write_source

from qwenimg_dist.data.facets import Dataset

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
UNITS, STEPS = 20, 24
ACTORS = ("UnitActor", "TrainWorker")


def until(condition: Callable[[], object], head: RayHead, job: str, timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, head.job("logs", job).stdout[-4000:]
        time.sleep(0.1)


def status(head: RayHead, job: str) -> str:
    return head.job("status", job).stdout


def driver(head: RayHead) -> psutil.Process | None:
    for process in psutil.Process(head.pid).children(recursive=True):
        try:
            if process.cmdline()[1:4] == ["-m", "qwenimg_dist", "run"]:
                return process
        except psutil.Error:
            continue
    return None


def actors(head: RayHead) -> dict[int, str]:
    """Those that are at work for any job: pid -> which kind."""
    found = {}
    for kind in ACTORS:
        found |= {one.pid: kind for one in ray_processes(head.pid, kind)}
    return found


def test_the_driver_is_killed_and_the_same_command_takes_over(tmp_path: Path) -> None:
    write_source(tmp_path / "source", 5 * UNITS, 5 * UNITS)
    extra = (f"train.steps={STEPS}", "checkpoint.every=2", f"cluster.max_ahead_bytes={BOUND}")
    command = ("python", "-m", "qwenimg_dist", "run", *words(tmp_path, "run", *extra))
    with ray_head(num_cpus=4) as head:
        assert head.submit(*command, submission_id="first", wait=False).returncode == 0
        until(lambda: num_steps(tmp_path, "run") >= 3, head, "first")
        assert num_ready(tmp_path) < UNITS, "make the source longer"
        old = actors(head)
        assert sorted(old.values()) == ["TrainWorker", "TrainWorker", "UnitActor", "UnitActor"]
        killed = driver(head)
        assert killed is not None
        killed.kill()
        # At once: whatever of the first job is still there must not keep the second one out, nor work beside it.
        assert head.submit(*command, submission_id="second", wait=False).returncode == 0
        until(lambda: "failed" in status(head, "first").lower(), head, "first")
        steps = num_steps(tmp_path, "run")
        most: list[str] = []

        def has_gone_on() -> bool:
            nonlocal most
            if num_steps(tmp_path, "run") > steps:
                now = actors(head)
                assert not now.keys() & old.keys(), "actors of the first job are still at work"
                most = max(most, sorted(now.values()), key=len)
            return num_steps(tmp_path, "run") >= STEPS

        until(has_gone_on, head, "second")
        assert most == ["TrainWorker", "TrainWorker", "UnitActor", "UnitActor"]
        until(lambda: "succeeded" in status(head, "second").lower(), head, "second", timeout_s=60)
        until(lambda: not actors(head), head, "second", timeout_s=60)
    samples = lines(tmp_path / "run" / "samples.jsonl")
    assert [line["step"] for line in samples] == list(range(1, STEPS + 1))
    first = [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl") if line["train/epoch"] == 0]
    kept = kept_keys(Dataset.open(tmp_path / "data"))
    assert len(kept) == 5 * UNITS - 1
    assert real_keys(samples, first) == kept  # type: ignore[arg-type]
