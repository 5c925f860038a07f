"""One pipeline, one data set and one two-rank gang for all tests of the consumers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from gang_checks import SCRIPT
from small_run import run_gang, write_input

CHECKS = (
    "parity",
    "norms",
    "skip",
    "updates",
    "ema_swap",
    "bf16",
    "recompute",
    "away",
    "start_weights",
    "certificate",
    "save",
    "damage",
)
DAMAGE_CHECKS = ("each_damage", "retention", "background", "full_disk")
OPTION_CHECKS = ("groups", "frozen_save", "offload", "hpz")
"""hpz last: DeepSpeed makes its process groups once per process."""
Results = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="session")
def small_input(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `pipeline` and `data`, not to be changed."""
    root = tmp_path_factory.mktemp("input")
    write_input(root)
    return root


@pytest.fixture(scope="session")
def gang_out(small_input: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two-rank gang left its results."""
    return run_checks(small_input, tmp_path_factory.mktemp("gang"), CHECKS)


@pytest.fixture(scope="session")
def damage_out(small_input: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where another gang left those of damaged checkpoints and full disks."""
    out = tmp_path_factory.mktemp("damage")
    weights = small_input / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors"
    # Two and a half checkpoints: masters and two moments are three times the fp32 weights.
    with small_disk(out / "small", round(2.5 * 3 * weights.stat().st_size)):
        yield run_checks(small_input, out, DAMAGE_CHECKS)


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[None]:
    """A file system of this size at `folder`, where this process may mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "none", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session")
def options_out(small_input: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a second gang left those of training options."""
    return run_checks(small_input, tmp_path_factory.mktemp("options"), OPTION_CHECKS)


def run_checks(small_input: Path, out: Path, checks: tuple[str, ...]) -> Path:
    """Two ranks run the checks; what they found lies in `out`."""
    ended = run_gang([SCRIPT, str(small_input / "pipeline"), str(out), *checks], 2, out / "logs")
    for rank, end in enumerate(ended):
        if end.code != 0:
            print(f"rank {rank} ended with {end.code}:\n{end.output[-3000:]}")
    return out


@pytest.fixture(scope="session")
def results(gang_out: Path) -> Results:
    """What a check of the gang found; fails where the gang did not come so far."""
    return reader_of(gang_out)


@pytest.fixture(scope="session")
def damage_results(damage_out: Path) -> Results:
    """As `results`, of the gang with damaged checkpoints."""
    return reader_of(damage_out)


@pytest.fixture(scope="session")
def option_results(options_out: Path) -> Results:
    """As `results`, of the second gang."""
    return reader_of(options_out)


def reader_of(gang_out: Path) -> Results:
    """Check -> what it found."""

    def read(name: str) -> dict[str, Any]:
        file = gang_out / f"{name}.json"
        if not file.exists():
            logs = "\n".join(log.read_text()[-2000:] for log in sorted((gang_out / "logs").glob("*.log")))
            pytest.fail(f"the gang ended before or in check {name!r}:\n{logs}")
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    return read
