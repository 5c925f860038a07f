"""The process beside a rank: a real process is stopped, stalled, killed, starved of memory, or ends well."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from small_run import REPOSITORY

from consumers import watchdog_process
from consumers.hooks import Hooks
from consumers.watchdog import watched
from qwenimg_dist.compose import load_config

TIMEOUT_S, STALL_S = 3.0, 6.0
RANK = """
import sys, time
from pathlib import Path
from consumers.watchdog import Watch
folder, what = Path(sys.argv[1]), sys.argv[2]
watch = Watch(
    rank=3,
    heartbeat_timeout_s=float(sys.argv[3]),
    stall_timeout_s=float(sys.argv[4]),
    note=folder / "note",
    log=str(folder / "log"),
    warn=print,
)
watch.advance(17)
watch.stage("forward")
(folder / "ready").touch()
if what == "work":  # longer than both limits, with a stage as long as either
    for name in ("loading", "forward", "saving"):
        watch.stage(name)
        time.sleep(4)
elif what == "hang":
    time.sleep(60)
elif what == "gorge":
    taken = []
    while True:
        taken.append(b"1" * 2**22)
watch.close()
"""


@dataclass(frozen=True, kw_only=True)
class Watched:
    process: subprocess.Popen[bytes]
    folder: Path

    def log(self) -> str:
        """What was said, once the watch has had the time to."""
        file, deadline = self.folder / "log", time.monotonic() + 20
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return file.read_text()


@contextlib.contextmanager
def rank(folder: Path, what: str) -> Iterator[Watched]:
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", RANK, str(folder), what, str(TIMEOUT_S), str(STALL_S)]
    process = subprocess.Popen(command, env=environment)
    try:
        deadline = time.monotonic() + 60
        while not (folder / "ready").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1.5)  # a sign or two
        yield Watched(process=process, folder=folder)
    finally:
        process.kill()
        process.wait()


def watchdog_of(pid: int) -> int:
    """The child of a process."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if file.read_text().rpartition(")")[2].split()[1] == str(pid):
                return int(file.parent.name)
    raise AssertionError(f"{pid} has no child")


def test_a_stopped_rank_is_named_and_ended_and_working_ones_are_not(tmp_path: Path) -> None:
    with rank(tmp_path / "at_work", "work") as at_work, rank(tmp_path / "stopped", "hang") as stopped:
        begin = time.monotonic()
        os.kill(watchdog_of(stopped.process.pid), signal.SIGTERM)  # a scheduler that ends a job tells all its processes
        stopped.process.send_signal(signal.SIGSTOP)
        assert stopped.process.wait(timeout=30) == -signal.SIGKILL
        assert TIMEOUT_S - 1 < time.monotonic() - begin < TIMEOUT_S + 10
        said = stopped.log()
        for words in ("rank 3", f"pid {stopped.process.pid}", "with 17 steps done", "stage 'forward'", "T (stopped)"):
            assert words in said
        assert "no sign of life for" in said
        assert at_work.process.wait(timeout=60) == 0
        assert not (at_work.folder / "log").exists()


@pytest.mark.slow
def test_a_rank_that_lives_but_stands_still_is_ended_later(tmp_path: Path) -> None:
    with rank(tmp_path, "hang") as hanging:
        begin = time.monotonic()
        assert hanging.process.wait(timeout=60) == -signal.SIGKILL
        assert time.monotonic() - begin > STALL_S - 2
        assert "has been in one place for" in hanging.log()
        assert "train.stall_timeout_s=6" in hanging.log()


@pytest.mark.slow
def test_a_killed_rank_is_told_of_once_per_gang(tmp_path: Path) -> None:
    with rank(tmp_path, "hang") as first, rank(tmp_path, "hang") as second:
        first.process.kill()
        said = first.log()
        second.process.kill()
        second.process.wait()
        time.sleep(2)
        assert first.log() == said
    assert said.count("\n") == 1
    assert "died without a word, with 17 steps done" in said
    assert "SIGKILL, or a crash in native code" in said


@contextlib.contextmanager
def memory_limit(limit_bytes: int) -> Iterator[Path | None]:
    """A control group whose `cgroup.procs` takes a process in; None where none can be made."""
    folder = Path(f"/sys/fs/cgroup/memory/qwenimg-test-{os.getpid()}")
    limit = folder / "memory.limit_in_bytes"
    if not folder.parent.is_dir():
        folder = Path(f"/sys/fs/cgroup/qwenimg-test-{os.getpid()}")
        limit = folder / "memory.max"
    try:
        folder.mkdir()
    except OSError:
        yield None
        return
    try:
        limit.write_text(str(limit_bytes))
        yield folder / "cgroup.procs"
    except OSError:
        yield None
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


def test_host_memory_that_ran_out_is_told_from_other_kills(tmp_path: Path) -> None:
    """The kernel's own out-of-memory killer, in a control group of 400 MB."""
    with memory_limit(400_000_000) as group:
        if group is None:
            pytest.skip("no control group for memory can be made here")
        with rank(tmp_path, "gorge") as gorging:
            group.write_text(str(gorging.process.pid))
            assert gorging.process.wait(timeout=60) == -signal.SIGKILL
            said = gorging.log()
    assert "SIGKILL by the kernel, which ran out of host memory (it held " in said
    assert "Fewer ranks per machine" in said


def test_a_run_goes_on_where_no_watchdog_can_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said: list[str] = []
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere"))
    with watched(load_config([]), Hooks(say=said.append)) as hooks:
        hooks.stage("forward")
        hooks.heartbeat(1)
    assert len(said) == 1
    assert "the watchdog of rank 0 does not start" in said[0]


def test_little_memory_is_suspected_where_the_kernel_has_counted_nothing() -> None:
    """Ray's monitor kills before the kernel does, and leaves no counter."""
    seen = watchdog_process.Seen(told={"memory_gb": 12.5}, available=[0.3, 0.05, 0.4])
    assert "host memory had run low, 5.0% of it was left (it held 12.50 GB)" in watchdog_process.cause_of_death(seen)
    seen = watchdog_process.Seen(told={"memory_gb": 12.5}, available=[0.3, 0.5])
    assert "30% of the host memory were free" in watchdog_process.cause_of_death(seen)
