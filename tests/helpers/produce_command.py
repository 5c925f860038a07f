"""Runs the real `produce` in a process of its own, as a user does."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

TIMEOUT_S = 280


def environment(fault_dir: Path | None = None) -> dict[str, str]:
    extra = {"QWENIMG_DIST_FAULT_DIR": str(fault_dir)} if fault_dir is not None else {}
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **extra}


def start(*overrides: str, fault_dir: Path | None = None) -> subprocess.Popen[str]:
    """In a session of its own, so that all of it can be killed at once."""
    return subprocess.Popen(
        [sys.executable, "-m", "qwenimg_dist", "produce", *overrides],
        env=environment(fault_dir),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def produce(*overrides: str, fault_dir: Path | None = None) -> subprocess.CompletedProcess[str]:
    process = start(*overrides, fault_dir=fault_dir)
    out, err = process.communicate(timeout=TIMEOUT_S)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_for(folder: Path, name: str, *, gone_first: bool = False, timeout_s: float = 120.0) -> None:
    """Until the file is there; with `gone_first`, until it is there again."""
    deadline = time.monotonic() + timeout_s
    for wanted in (False, True) if gone_first else (True,):
        while (folder / name).exists() is not wanted:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{folder / name}: waited {timeout_s:.0f} s for it to be {'there' if wanted else 'gone'}"
                )
            time.sleep(0.02)


def tree_hash(folder: Path) -> str:
    """Names and contents of everything under a folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        digest.update(os.fsencode(str(file.relative_to(folder))) + b"\0")
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()
