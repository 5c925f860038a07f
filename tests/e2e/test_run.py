"""`run` as a user starts it: both sides in one Ray job on one machine, training while producing."""

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

import pytest
from produce_command import environment
from small_run import lines
from undisturbed import write_source

from qwenimg_dist.commands.main import main
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


def start(command: str, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "qwenimg_dist", command, *overrides],
        env=environment(),
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


def until(condition: Callable[[], object], process: subprocess.Popen[str], timeout_s: float = 200) -> None:
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


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_source(folder / "source", 5 * NUM_UNITS, 5 * NUM_UNITS)
    return folder


def test_training_begins_before_half_of_the_units_are_there_and_takes_each_sample_once(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = words(root, "run", f"cluster.max_ahead_bytes={BOUND}")
    with ending(start("run", *command)) as process:
        until(lambda: num_steps(root, "run") > 0, process)
        ready, ahead = num_ready(root), bytes_on_disk(Dataset.open(root / "data"))
        out, err = process.communicate(timeout=250)
    assert process.returncode == 0, out + err
    assert 0 < ready <= NUM_UNITS // 2
    assert ahead <= 1.1 * BOUND
    assert "training complete" in err
    assert "all units are ready" in err
    assert "Funnel" in out
    dataset, samples = Dataset.open(root / "data"), lines(root / "run" / "samples.jsonl")
    assert [line["step"] for line in samples] == list(range(1, EPOCH + 1))
    assert len(lines(root / "run" / "generations.jsonl")) > 1
    assert real_keys(samples, list(range(1, EPOCH + 1))) == kept_keys(dataset)
    assert main(["run", *command]) == 0
    assert "training complete already" in capsys.readouterr().err
