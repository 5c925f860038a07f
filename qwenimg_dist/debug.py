"""Named fault points: places where a test may end the process as a real SIGKILL would, once per token.

A test puts empty files `NAME@COUNT` into the folder named by `QWENIMG_DIST_FAULT_DIR`; the process that passes point
NAME for the COUNT-th time (counted per process) and wins the removal of the file kills itself. `NAME@next` is for
whoever passes next. A token with `fill FILE` in it fills the disk under FILE instead, `stop` stops the process as
SIGSTOP does, `raise ESTALE` (or another name of an errno) raises that OSError, as does `away ESTALE`, whose token stays
until somebody removes it. What happened is written to the file beside the folder, `….log`. A file `NAME@SHA16` with a
word in it marks a picture by the first 16 digits of its sha256: what happens at each opening of that picture is what
the word says. Without the variable a fault point costs one dictionary look-up.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Final

FAULT_DIR_VARIABLE: Final = "QWENIMG_DIST_FAULT_DIR"
_BITE_BYTES: Final = 128 * 1024**2
_FILL_BYTES: Final = 4096
_passed: Counter[str] = Counter()


def fault_point(name: str) -> None:
    """Die here if a token asks for it (or do what stands in it). Names in use: `tar_write`, `part_commit`,
    `checkpoint_write`, `checkpoint_commit`, `tar_read`, `train_step`, `update`, `rollout`, `reference_block`,
    `unit_start`, `catalog_write`, `generation_write`, `doctor_rank`, `eval_pictures`, `pairs_drawn`, `pairs_picture`,
    `reward_actor`, `encoder_call`."""
    folder = os.environ.get(FAULT_DIR_VARIABLE)
    if not folder:
        return
    _passed[name] += 1
    for token in (Path(folder) / f"{name}@{_passed[name]}", Path(folder) / f"{name}@next"):
        try:
            words = token.read_text().split(maxsplit=1)
            if words[:1] != ["away"]:
                token.unlink()
        except OSError:
            continue
        with open(f"{folder}.log", "a", encoding="utf-8") as log:
            log.write(f"{' '.join(words) or 'kill'} at {name}, pass {_passed[name]}, rank {os.environ.get('RANK')}\n")
        if not words:
            os.kill(os.getpid(), signal.SIGKILL)
        elif words[0] == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif words[0] == "fill":
            _fill_disk(Path(words[1]))
        elif words[0] in ("raise", "away"):
            number = getattr(errno, words[1].strip())
            raise OSError(number, os.strerror(number))


def _fill_disk(file: Path) -> None:
    """Write zeros until the file system has no more room."""
    with contextlib.suppress(OSError), open(file, "wb", buffering=0) as sink:
        while True:
            sink.write(bytes(_FILL_BYTES))


def picture_point(name: str, sha256: str) -> None:
    """Do to this process what a mark on the picture asks for. Names in use: `scan`, `decode`. Words:

    `crash`    a segmentation fault in native code, at every opening
    `starve`   no further memory may be had from now on (RLIMIT_AS); once
    `gorge`    takes memory until somebody ends the process; once
    `sleep`    never returns, at every opening
    """
    folder = os.environ.get(FAULT_DIR_VARIABLE)
    if not folder:
        return
    mark = Path(folder) / f"{name}@{sha256[:16]}"
    try:
        word = mark.read_text()
        if word in ("starve", "gorge"):
            mark.unlink()
    except OSError:
        return
    if word == "crash":
        ctypes.string_at(0)
    elif word == "starve":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used, used))
    elif word == "gorge":
        taken = []
        while True:
            taken.append(b"\1" * _BITE_BYTES)
            time.sleep(0.05)
    elif word == "sleep":
        time.sleep(1e6)
