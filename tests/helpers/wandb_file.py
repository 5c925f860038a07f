"""Reads a `.wandb` file back: LevelDB's log format around W&B's own protobuf records, every checksum checked.

W&B's Python package ships no reader of it any more; the layout is 7 bytes of header, then blocks of 32 KiB with records
of (crc32, length, type), where a record that does not fit goes on in the next block.
"""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK = 32 * 1024
_HEADER = 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass(kw_only=True)
class WandbFile:
    """What an offline run holds."""

    run: Any
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, str] = field(default_factory=dict)
    """Name or glob -> its step metric, as defined."""
    files: set[str] = field(default_factory=set)
    ended: bool = False


def offline_files(run_dir: Path) -> list[Path]:
    """The files of a run directory's offline attempts, oldest first."""
    return sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))


def finished(file: Path) -> WandbFile:
    """A file whose run has ended: W&B's background process writes it a moment later."""
    deadline = time.monotonic() + 30
    while not (found := read_wandb(file)).ended:
        assert time.monotonic() < deadline, f"{file} has no end"
        time.sleep(0.1)
    return found


def read_wandb(file: Path) -> WandbFile:
    """All records of one file."""
    found = WandbFile(run=None)
    for raw in _records(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(raw)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            found.config |= {
                item.key or "/".join(item.nested_key): item.value_json for item in record.run.config.update
            }
        elif kind == "history":
            items = record.history.item
            found.history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        elif kind == "metric":
            found.metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "exit":
            found.ended = True
        elif kind == "files":
            found.files |= {entry.path for entry in record.files.files}
    return found


def _records(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B", data[:8]
    position, parts = _HEADER, b""
    while position + _HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:
            position += left
            continue
        checksum, length, kind = struct.unpack("<IHB", data[position : position + _HEADER])
        part = data[position + _HEADER : position + _HEADER + length]
        if len(part) < length:
            return  # still being written
        assert zlib.crc32(bytes([kind]) + part) == checksum, f"a damaged record at byte {position}"
        position += _HEADER + length
        parts = part if kind in (_FULL, _FIRST) else parts + part
        if kind in (_FULL, _LAST):
            yield parts
