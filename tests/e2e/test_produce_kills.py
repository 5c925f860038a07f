"""`produce` is killed with SIGKILL, some of the times inside a tar write, and the same command is run again: rows,
decisions, keys and tensors are those of an undisturbed run, and stock webdataset reads every tar."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest
from produce_command import TIMEOUT_S, produce, start
from producer_world import rows_of
from undisturbed import assert_same, produce_quietly, words, write_source

from producers.dedup import KEPT
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.schema import ROWS, is_dedup


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("kills") / "source", 30, 25)


@pytest.fixture(scope="module")
def undisturbed(source: Path) -> Dataset:
    return produce_quietly(source, source.parent / "undisturbed")


def kill_in_tar_write(command: list[str], faults: Path, count: int) -> bool:
    """A worker dies in the middle of a tar, and the driver right after it. False if the run ended before."""
    faults.mkdir(exist_ok=True)
    token = faults / f"tar_write@{count}"
    token.touch()
    process = start(*command, fault_dir=faults)
    while token.exists() and process.poll() is None:
        time.sleep(0.01)
    return end(process) and not token.exists()


def kill_after(command: list[str], data: Path, num_parts: int) -> bool:
    """The driver dies once this many further parts were committed."""
    before = len(list(data.glob("*/*.parquet")))
    process = start(*command)
    while len(list(data.glob("*/*.parquet"))) < before + num_parts and process.poll() is None:
        time.sleep(0.01)
    return end(process)


def end(process: object) -> bool:
    assert hasattr(process, "pid")
    alive = process.poll() is None
    if alive:
        os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=TIMEOUT_S)
    return alive


def assert_as_undisturbed(dataset: Dataset, calm: Dataset) -> None:
    assert_same(dataset, calm)
    settled = next(filter(is_dedup, calm.facets()))
    assert sum(entry["duplicate_of"] != KEPT for entry in rows_of(calm, settled).values()) == 5
    assert {entry["reason"] for entry in rows_of(calm, ROWS).values()} == {"", "duplicate", "truncated"}


def test_a_kill_and_a_worker_that_dies_leave_no_trace(source: Path, undisturbed: Dataset, tmp_path: Path) -> None:
    command = words(source, tmp_path / "data")
    assert kill_in_tar_write(command, tmp_path / "faults", 9)
    # A worker's death alone costs a retry and nothing else.
    (tmp_path / "faults" / "tar_write@5").touch()
    done = produce(*command, fault_dir=tmp_path / "faults")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "faults" / "tar_write@5").exists()
    assert_as_undisturbed(Dataset.open(tmp_path / "data"), undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_kills(tmp_path: Path) -> None:
    source, data = write_source(tmp_path / "source", 300, 295), tmp_path / "data"
    command = words(source, data)
    choose = random.Random(0)
    kills = in_tar = 0
    while kills < 10:
        if kills % 2 == 0:
            killed = kill_in_tar_write(command, tmp_path / "faults", choose.randint(3, 9))
            in_tar += killed
        else:
            killed = kill_after(command, data, choose.randint(1, 3))
        kills += killed
        assert killed, f"the run ended after {kills} kills: make it longer"
    assert in_tar >= 3
    done = produce(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_as_undisturbed(Dataset.open(data), produce_quietly(source, tmp_path / "undisturbed"))


@pytest.mark.slow
def test_a_unit_that_always_dies_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "faults").mkdir()
    for name in ("unit_start@1",):
        (tmp_path / "faults" / name).touch()
    command = [*words(source, tmp_path / "data"), "cluster.producers=1", "cluster.unit_retries=0"]
    done = produce(*command, fault_dir=tmp_path / "faults")
    assert done.returncode == 1
    assert "unit 0: encode failed 1 times" in done.stderr
    assert "killed" in done.stderr


@pytest.mark.slow
def test_a_worker_that_hangs_is_replaced(source: Path, undisturbed: Dataset, tmp_path: Path) -> None:
    (tmp_path / "faults").mkdir()
    command = [*words(source, tmp_path / "data")[:-1], "cluster.producers=1", "cluster.unit_timeout_s=40"]
    process = start(*command, fault_dir=tmp_path / "faults")
    stopped = None
    while stopped is None and process.poll() is None:
        time.sleep(0.05)
        if (tmp_path / "data" / ROWS).exists():
            stopped = next(iter(workers_with(tmp_path / "faults")), None)
    assert stopped is not None
    stopped.suspend()
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, out + err
    assert not stopped.is_running() or stopped.status() == psutil.STATUS_ZOMBIE
    assert_as_undisturbed(Dataset.open(tmp_path / "data"), undisturbed)


def workers_with(fault_dir: Path) -> list[psutil.Process]:
    """Producer processes of the run with this variable; others may run on this machine."""
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        with contextlib.suppress(psutil.Error):
            ours = process.environ().get("QWENIMG_DIST_FAULT_DIR") == str(fault_dir)
            if ours and "ray::UnitActor" in " ".join(process.info["cmdline"] or []):
                found.append(process)
    return found
