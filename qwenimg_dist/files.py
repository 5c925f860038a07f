"""Durable writes: a file appears whole under its name, or not at all, whatever dies in between."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any


def temporary_name(file: Path) -> Path:
    """A name beside `file` that no reader looks at. The random part keeps two writers apart."""
    return file.with_name(f".tmp-{file.name}-{uuid.uuid4().hex[:8]}")


def fsync_dir(folder: Path) -> None:
    """Make renames in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(file: Path, value: Any) -> None:
    """Write JSON durably: temporary, fsync, rename."""
    write_bytes(file, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def write_bytes(file: Path, data: bytes) -> None:
    """Write a file durably: temporary, fsync, rename."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(file)
    try:
        with open(temporary, "wb") as sink:
            sink.write(data)
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(temporary, file)
        fsync_dir(file.parent)
    finally:
        temporary.unlink(missing_ok=True)
