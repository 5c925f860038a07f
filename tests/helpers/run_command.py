"""The real `run` (and `produce`, `train`) in a process of its own, on a source of small units, and what came of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from produce_command import environment

from qwenimg_dist.data.ahead import part_bytes
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.schema import ROWS

NUM_UNITS = 8
EPOCH = 7
"""Steps: 40 rows, of which one is broken, in batches of 6."""
BOUND = 500_000
"""Three units or four."""


def words(root: Path, run: str, *extra: str) -> list[str]:
    """Units of five rows, two producers, two ranks; one phase of one epoch."""
    return [
        f"source.path={root / 'source'}",
        f"data.path={root / 'data'}",
        f"run.path={root / run}",
        "data.unit_size=5",
        "data.held_out=0",
        "encode.resolutions=[64]",
        "encode.dtype=float32",
        "engine.precision=fp32",
        "~curriculum.phases.high",
        "curriculum.phases.low.global_batch=6",
        "curriculum.phases.low.micro_batch_tokens=200",
        f"train.steps={EPOCH}",
        "train.log_every=1",
        "train.log_samples=true",
        "train.report=off",
        "checkpoint.every=4",
        "checkpoint.certify=off",
        "evaluate.every=0",
        "cluster.producers=2",
        "cluster.ranks=2",
        *extra,
    ]


def start(command: str, *overrides: str, fault_dir: Path | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "qwenimg_dist", command, *overrides],
        env=environment(fault_dir),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@contextlib.contextmanager
def ending(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Nothing of it outlives the test."""
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def until(condition: Callable[[], object], process: subprocess.Popen[str], timeout_s: float = 400) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def num_ready(root: Path) -> int:
    return len(list((root / "data" / ROWS).glob("*.parquet")))


def num_steps(root: Path, run: str) -> int:
    file = root / run / "samples.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def bytes_on_disk(dataset: Dataset) -> int:
    facets = [facet for facet in dataset.facets() if facet.startswith(("text-", "latents-"))]
    units = dataset.units(ROWS)
    return sum(part_bytes(dataset, dataset.unit_parts(facet, unit)) for facet in facets for unit in units)


def kept_keys(dataset: Dataset) -> list[str]:
    tables = [dataset.read_unit(ROWS, unit) for unit in dataset.units(ROWS)]
    rows = [row for table in tables if table is not None for row in table.to_pylist()]
    return sorted(row["key"] for row in rows if row["status"] == "kept")


def real_keys(samples: list[dict[str, Any]], epoch: list[int]) -> list[str]:
    """Keys of these steps, a fill slot's not counted: it repeats a key of its own batch."""
    return sorted(key for line in samples if line["step"] in epoch for key in set(line["keys"]))


def ray_processes(driver: int, *names: str) -> list[psutil.Process]:
    """Processes below the driver that have one of these words in their name."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        with contextlib.suppress(psutil.Error, IndexError):
            if any(name in Path(process.cmdline()[0]).name for name in names):
                found.append(process)
    return found


def kill_one(process: subprocess.Popen[str], name: str) -> None:
    until(lambda: ray_processes(process.pid, name), process)
    ray_processes(process.pid, name)[0].kill()
