"""What can befall Ray itself under a running `produce`, each time with the real thing: its daemons are killed, its
memory monitor ends a producer, a picture never returns. The same command again, or the same run, ends as if nothing had
happened."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from produce_command import TIMEOUT_S, produce, start
from producer_world import rows_of
from undisturbed import assert_same, produce_quietly, words, write_source

from producers.poison import POISON
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.schema import ROWS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("ray") / "source", 20, 18)


@pytest.fixture(scope="module")
def calm(source: Path) -> Dataset:
    return produce_quietly(source, source.parent / "undisturbed")


def mark(folder: Path, file: Path, word: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"decode@{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}").write_text(word)
    return folder


def daemons(driver: int, *names: str) -> list[psutil.Process]:
    """Processes below the driver with one of these words in their command."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(name in Path(process.cmdline()[0]).name for name in names):
                found.append(process)
    return found


def wait_until_committed(data: Path, num_parts: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while len(list(data.glob("*/*.parquet"))) < num_parts:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("names", [("raylet", "gcs_server"), ("raylet",), ("gcs_server",)], ids="+".join)
def test_ray_is_killed(names: tuple[str, ...], source: Path, calm: Dataset, tmp_path: Path) -> None:
    command = words(source, tmp_path / "data")
    faults = mark(tmp_path / "faults", source / "013.png", "sleep")  # so that it cannot end before it is noticed
    process = start(*command, fault_dir=faults)
    try:
        wait_until_committed(tmp_path / "data", 6, process)
        killed = daemons(process.pid, *names)
        assert len(killed) == len(names)
        for one in killed:
            one.send_signal(signal.SIGKILL)
        _, err = process.communicate(timeout=TIMEOUT_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode not in (0, None)
    assert err
    done = produce(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(Dataset.open(tmp_path / "data"), calm)


def test_rays_memory_monitor_ends_a_producer(source: Path, calm: Dataset, tmp_path: Path) -> None:
    memory = psutil.virtual_memory()
    room = 5 * 1024**3
    if memory.available < 2 * room:
        pytest.skip("too little memory is free to waste some of it")
    faults = mark(tmp_path / "faults", source / "013.png", "gorge")
    threshold = (memory.total - memory.available + room) / memory.total
    ray_settings = {"RAY_memory_usage_threshold": f"{threshold:.3f}", "RAY_memory_monitor_refresh_ms": "100"}
    command = [*words(source, tmp_path / "data"), "cluster.unit_retries=0"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ray_settings.items():
            patch.setenv(name, value)
        named = produce(*command, fault_dir=faults)
        assert named.returncode == 1, named.stdout + named.stderr
        assert "unit 2: encode failed 1 times" in named.stderr
        assert "its machine ran out of memory" in named.stderr
        mark(faults, source / "013.png", "gorge")
        done = produce(*command[:-1], fault_dir=faults)
    assert not list(faults.iterdir())
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(Dataset.open(tmp_path / "data"), calm)


def test_a_picture_that_never_returns_is_left_out(source: Path, calm: Dataset, tmp_path: Path) -> None:
    faults = mark(tmp_path / "faults", source / "006.png", "sleep")
    done = produce(*words(source, tmp_path / "data"), "cluster.unit_timeout_s=40", fault_dir=faults)
    assert done.returncode == 0, done.stdout + done.stderr
    dataset = Dataset.open(tmp_path / "data")
    assert rows_of(dataset, ROWS)[6]["reason"] == POISON
    assert "no answer for cluster.unit_timeout_s=40 s" in rows_of(dataset, ROWS)[6]["detail"]
    assert_same(dataset, calm, but={6})
