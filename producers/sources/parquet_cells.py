"""Pictures that lie inside a parquet file, read one at a time by the uri of their cell.

Place in the flow: sources name such a picture with `uri_of`, `base.read_bytes` reads it where it is wanted; nothing is
unpacked to disk. Parquet gives a column of a row group only as a whole (within it, a page may well be all of it), so
what was read last is kept, up to 2 GiB in all: rows are worked on in the order of the file. Refuses row groups whose
pictures together are more, as their columns would push each other out at every row (`check_size`).
"""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from typing import Any, Final
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.parquet as pq

SCHEME: Final = "cell:"
MAX_BYTES: Final = 2 * 1024**3
"""Held in memory by one process, and the most that one row group may have."""


class _Chunk:
    """A column of a row group, in memory once it was read. `lock` is of its reading: others need not wait for that."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.values: pa.ChunkedArray | None = None
        self.num_bytes = 0


_lock = threading.Lock()
_chunks: OrderedDict[tuple[Any, ...], _Chunk] = OrderedDict()


def uri_of(file_uri: str, row_group: int, row: int, column: str, index: int | None = None) -> str:
    """Uri of a cell: `row` counts within the row group, `index` within a list column."""
    item = "" if index is None else str(index)
    return f"{SCHEME}{row_group}/{row}/{item}/{quote(column, safe='')}/{file_uri}"


def file_of(uri: str) -> str:
    """Uri of the parquet file that the cell lies in."""
    return uri.removeprefix(SCHEME).split("/", 4)[4]


def read(place: str, uri: str) -> bytes:
    """Bytes of a cell, none for an empty one; `place` is the file's path or URL. Raises FileNotFoundError where the
    file is not there, another OSError where it cannot be read."""
    group, row, item, column, _ = uri.removeprefix(SCHEME).split("/", 4)
    values = _chunk(place, int(group), unquote(column))
    if int(row) >= len(values):
        raise OSError(errno.EINVAL, f"row group {group} has no row {row}: the file was changed", place)
    value = values[int(row)].as_py()
    if item:
        value = value[int(item)] if value is not None and int(item) < len(value) else None
    if isinstance(value, dict):  # an image of Hugging Face datasets
        value = value.get("bytes")
    if value is None:  # empty for good, other than a missing file, which may turn up
        return b""
    if not isinstance(value, bytes):
        raise OSError(errno.EINVAL, f"column {unquote(column)} holds {type(value).__name__}, not bytes", place)
    return value


def check_size(file: pq.ParquetFile, name: str, columns: list[str]) -> None:
    """Raises ValueError for a row group of which the columns of pictures cannot be held in memory together."""
    for group in range(file.metadata.num_row_groups):
        num_bytes = _size(file, group, columns)
        if num_bytes > MAX_BYTES:
            raise ValueError(
                f"{name}: the pictures of row group {group} ({', '.join(columns)}) have {num_bytes / 1024**3:.1f} GiB, "
                "and are read as a whole; write the file again with smaller row groups (pyarrow: row_group_size=256)"
            )


def _size(file: pq.ParquetFile, group: int, columns: list[str]) -> int:
    meta = file.metadata.row_group(group)
    chunks = (meta.column(number) for number in range(meta.num_columns))
    return sum(int(one.total_uncompressed_size) for one in chunks if one.path_in_schema.split(".")[0] in columns)


def _chunk(place: str, group: int, column: str) -> pa.ChunkedArray:
    key = (place, group, column, _state(place))
    with _lock:
        chunk = _chunks.setdefault(key, _Chunk())
        _chunks.move_to_end(key)
    with chunk.lock:
        if chunk.values is None:
            try:
                chunk.values = _read_chunk(place, group, column, chunk)
            except BaseException:
                with _lock:
                    _chunks.pop(key, None)
                raise
        return chunk.values


def _make_room(chunk: _Chunk, num_bytes: int) -> None:
    """Let go of what was not read for longest, before `chunk` gets so many bytes."""
    with _lock:
        chunk.num_bytes = num_bytes
        held = sum(one.num_bytes for one in _chunks.values())
        for key, one in list(_chunks.items()):
            if held <= MAX_BYTES:
                break
            if one.values is not None:  # what is being read is not given back by forgetting it
                held -= one.num_bytes
                del _chunks[key]


def _state(place: str) -> tuple[int, ...]:
    """What changes when the file does, so that an old chunk is not taken for the new file's."""
    if "://" in place:
        return ()
    status = os.stat(place)
    return (status.st_ino, status.st_size, status.st_mtime_ns)


def _read_chunk(place: str, group: int, column: str, chunk: _Chunk) -> pa.ChunkedArray:
    try:
        if "://" in place:
            import fsspec  # only remote sources pay for it

            with fsspec.open(place, "rb") as remote, pq.ParquetFile(remote) as file:
                return _column(file, place, group, column, chunk)
        # Buffered ahead (the default), the raw bytes would be held a second time.
        with pq.ParquetFile(place, memory_map=True, pre_buffer=False) as file:
            return _column(file, place, group, column, chunk)
    except pa.ArrowException as error:
        raise OSError(errno.EIO, f"cannot be read as parquet ({error})", place) from error


def _column(file: pq.ParquetFile, place: str, group: int, column: str, chunk: _Chunk) -> pa.ChunkedArray:
    if group >= file.num_row_groups or column not in file.schema_arrow.names:
        raise OSError(errno.EINVAL, f"has no row group {group} with a column {column}: the file was changed", place)
    _make_room(chunk, _size(file, group, [column]))
    return file.read_row_group(group, columns=[column])[column]
