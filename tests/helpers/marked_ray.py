"""A Ray whose actors look into a folder for marks: what is to go wrong at which picture or point."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from producers.ray_cluster import ray_session
from qwenimg_dist.compose import load_config


@contextmanager
def ray_with_marks(folder: Path, *words: str) -> Iterator[Path]:
    """Ray as this config starts it; it takes its environment from this process when it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWENIMG_DIST_FAULT_DIR", str(folder))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("RAY_ADDRESS", raising=False)
        with ray_session(load_config(list(words)).cluster):
            yield folder


def clear(folder: Path) -> None:
    """Take all marks away."""
    for mark in folder.iterdir():
        mark.unlink()
