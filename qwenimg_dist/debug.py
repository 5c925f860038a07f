"""Named fault points: places where a test may end the process as a real SIGKILL would, once per token.

A test puts empty files `NAME@COUNT` into the folder named by `QWENIMG_DIST_FAULT_DIR`; the process that passes point
NAME for the COUNT-th time (counted per process) and wins the removal of the file kills itself. Without the variable a
fault point costs one dictionary look-up.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Final

FAULT_DIR_VARIABLE: Final = "QWENIMG_DIST_FAULT_DIR"
_passed: Counter[str] = Counter()


def fault_point(name: str) -> None:
    """Die here if a token asks for it. Names in use: `tar_write`, `part_commit`, `checkpoint_write`,
    `checkpoint_commit`, `train_step`,
    `unit_start`, `catalog_write`, `generation_write`."""
    folder = os.environ.get(FAULT_DIR_VARIABLE)
    if not folder:
        return
    _passed[name] += 1
    token = Path(folder) / f"{name}@{_passed[name]}"
    try:
        token.unlink()
    except OSError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
