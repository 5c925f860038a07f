"""Compile a catalog from pinned parts: parquet of many units -> a folder of `.npy` columns, committed by a rename.

Place in the flow: rank 0 calls `build_catalog` once per generation; see `catalog.py` for the reading side. All work
per row is done by arrow and numpy: a million rows take well under a minute. Refuses parts that contradict each other
(a kept row without text features, a tensor of another shape than its bucket), naming file and key.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qwenimg_dist.data.catalog import CATALOG_VERSION, HEAD, ITEM_BYTES, CatalogFolder, Ints, RunFacets
from qwenimg_dist.data.draws import hash_keys
from qwenimg_dist.data.facets import DataError, Dataset, Part
from qwenimg_dist.data.pins import (
    Pin,
    UnitPins,
    check_tar,
    digest_of,
    parallel,
    pin_to_json,
    read_part_bytes,
)
from qwenimg_dist.debug import fault_point
from qwenimg_dist.files import fsync_dir, temporary_name
from qwenimg_dist.schema import LISTING, ROWS, SCAN, caption_key

PARTS: Final = "parts.json"
_PLACE: Final = ("tar", "offset", "nbytes", "dtype", "shape")
_COLUMNS: Final = {
    LISTING: ("row", "captions"),
    SCAN: ("row", "bytes", "format"),
    ROWS: ("row", "key", "status", "width", "height"),
}
_TEXT_COLUMNS: Final = ("key", "num_tokens", *_PLACE)
_LATENTS_COLUMNS: Final = ("row", "key", "bucket_height", "bucket_width", *_PLACE)


@dataclass(frozen=True, kw_only=True)
class _Facet:
    """All pinned parts of one facet, one below the other, with `unit` beside each row."""

    name: str
    table: pa.Table
    pins: list[Pin]
    tars: dict[str, int]
    """Name -> size in bytes, of the committed tars."""


@dataclass(kw_only=True)
class _Output:
    """What will be written."""

    arrays: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    head: dict[str, Any] = field(default_factory=dict)
    tars: list[tuple[str, str, int]] = field(default_factory=list)

    def add_tars(self, facet: _Facet) -> dict[str, int]:
        """Number the facet's tars; returns name -> number."""
        numbers = {}
        for name in sorted(facet.tars):
            numbers[name] = len(self.tars)
            self.tars.append((facet.name, name, facet.tars[name]))
        return numbers


def build_catalog(dataset: Dataset, units: Sequence[UnitPins], facets: RunFacets, folder: Path) -> CatalogFolder:
    """Compile and commit to `folder`; an identical catalog that is there already is kept, another one replaced.

    Raises `DataError` naming the part, tar or key where the data set contradicts itself.
    """
    loaded = _load(dataset, units)
    out = _Output()
    kept = _kept_rows(loaded[ROWS], out)
    _add_columns(loaded, kept, out)
    _add_texts(loaded, kept, facets, out)
    out.head["latents"] = {
        str(resolution): _add_latents(loaded[facet], kept, resolution, out)
        for resolution, facet in sorted(facets.latents.items())
    }
    parallel(lambda tar: check_tar(dataset, *tar), out.tars)
    pins = [pin for facet in loaded.values() for pin in facet.pins]
    out.head |= {"version": CATALOG_VERSION, "digest": digest_of(pins), "tars": out.tars}
    _commit(out, pins, folder)
    return CatalogFolder(folder=folder, num_rows=len(kept.rows), num_texts=len(out.arrays["text_tokens"]))


def _load(dataset: Dataset, units: Sequence[UnitPins]) -> dict[str, _Facet]:
    """Read every pinned part once: bytes for the digest, then columns."""
    parts = [part for unit in units for part in unit.parts()]
    read = parallel(lambda part: _read(dataset, part), parts)
    loaded: dict[str, _Facet] = {}
    for facet in sorted({part.facet for part in parts}):
        mine = [(part, result) for part, result in zip(parts, read, strict=True) if part.facet == facet]
        tars = {tar["name"]: int(tar["size_bytes"]) for _, (_, meta, _) in mine for tar in meta.get("tars", [])}
        loaded[facet] = _Facet(
            name=facet,
            table=pa.concat_tables([table for _, (_, _, table) in mine], promote_options="default").combine_chunks(),
            pins=[Pin(part=part, sha256=sha256) for part, (sha256, _, _) in mine],
            tars=tars,
        )
    return loaded


def _read(dataset: Dataset, part: Part) -> tuple[str, dict[str, Any], pa.Table]:
    raw = read_part_bytes(dataset, part)
    file = dataset.parquet(part)
    try:
        # One thread per file: the files themselves are read side by side.
        parquet = pq.ParquetFile(pa.BufferReader(raw))
        table = parquet.read(columns=_wanted(part.facet, parquet.schema_arrow.names), use_threads=False)
        meta = json.loads((parquet.schema_arrow.metadata or {})[b"qwenimg_dist"])
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}): restore it, `data verify` lists all") from error
    table = table.replace_schema_metadata(None)
    table = table.append_column("unit", pa.array(np.full(len(table), part.unit, dtype=np.int32)))
    return hashlib.sha256(raw).hexdigest(), meta, table


def _wanted(facet: str, names: Sequence[str]) -> list[str]:
    if facet == ROWS:
        return [*_COLUMNS[ROWS], *sorted(name for name in names if name.startswith("score_"))]
    if facet in _COLUMNS:
        return list(_COLUMNS[facet])
    return list(_TEXT_COLUMNS if facet.startswith("text-") else _LATENTS_COLUMNS)


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """Kept rows in listing order."""

    rows: Ints
    units: npt.NDArray[np.int32]
    keys: npt.NDArray[np.bytes_]
    table: pa.Table


def _kept_rows(facet: _Facet, out: _Output) -> _Kept:
    table = _newest(facet.table)
    table = table.filter(pc.equal(table["status"], "kept"))
    kept = _Kept(
        rows=_numpy(table["row"], np.int64),
        units=_numpy(table["unit"], np.int32),
        keys=_strings(table["key"]),
        table=table,
    )
    out.arrays |= {"keys": kept.keys, "rows": kept.rows, "units": kept.units, "key_hash": hash_keys(kept.keys)}
    return kept


def _newest(table: pa.Table) -> pa.Table:
    """One row per listing number, ascending; a later part supersedes an earlier one."""
    numbers = _numpy(table["row"], np.int64)
    _, from_end = np.unique(numbers[::-1], return_index=True)
    return table.take(pa.array(len(numbers) - 1 - from_end))


def _match(facet: str, table: pa.Table, rows: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Where each of `rows` stands in a table made by `_newest`, and whether it is there."""
    there = _numpy(table["row"], np.int64)
    at = np.searchsorted(there, rows)
    found = np.zeros(len(rows), dtype=np.bool_)
    inside = at < len(there)
    found[inside] = there[at[inside]] == rows[inside]
    return at, found


def _add_columns(loaded: dict[str, _Facet], kept: _Kept, out: _Output) -> None:
    """Columns that `where` may name."""
    width, height = _numpy(kept.table["width"], np.int32), _numpy(kept.table["height"], np.int32)
    columns: dict[str, npt.NDArray[Any]] = {
        "row": kept.rows,
        "unit": kept.units,
        "width": width,
        "height": height,
        "aspect": width / np.maximum(height, 1),
    }
    words: dict[str, list[str]] = {"status": ["kept"]}
    columns["status"] = np.zeros(len(kept.rows), dtype=np.int8)
    for name in kept.table.column_names:
        if name.startswith("score_"):
            columns[name] = _numpy(pc.cast(kept.table[name], pa.float32()), np.float32, missing=np.nan)
    if SCAN in loaded:
        scan = _newest(loaded[SCAN].table)
        at, found = _match(SCAN, scan, kept.rows)
        if found.all():
            columns["bytes"] = _numpy(scan["bytes"], np.int64, missing=0)[at]
            formats = pc.fill_null(scan["format"], "").combine_chunks().dictionary_encode()
            formats = formats.combine_chunks() if isinstance(formats, pa.ChunkedArray) else formats
            columns["format"] = _numpy(formats.indices, np.int16)[at]
            words["format"] = formats.dictionary.to_pylist() or [""]
    out.arrays |= {f"column-{name}": array for name, array in columns.items()}
    out.head |= {"columns": list(columns), "words": words}


def _add_texts(loaded: dict[str, _Facet], kept: _Kept, facets: RunFacets, out: _Output) -> None:
    """Text positions, their places, and the captions of every kept row as text positions."""
    facet = loaded[facets.text]
    table = facet.table
    shapes = _shapes(facet, dims=2)
    tokens = _numpy(table["num_tokens"], np.int32)
    _require(facet, shapes[:, 0] == tokens, "num_tokens differs from the tensor's length")
    _require(facet, shapes[:, 1] == (shapes[0, 1] if len(shapes) else 0), "the features' width differs")
    dtype = _one_dtype(facet)
    _check_places(facet, shapes, dtype)
    numbers = out.add_tars(facet)
    out.arrays |= {
        "text_keys": _strings(table["key"]),
        "text_tokens": tokens,
        "text_tar": _tar_numbers(table, numbers),
        "text_offset": _numpy(table["offset"], np.int64),
    }
    starts, texts = _captions(loaded, kept, facet)
    out.arrays |= {"caption_start": starts, "caption_text": texts}
    empty = pc.index(table["key"], caption_key("")).as_py()
    if empty < 0:
        raise DataError(f"{facet.name} has no features of the empty prompt in part 0: run `qwenimg-dist produce` again")
    out.head["text"] = {"facet": facet.name, "dtype": dtype, "width": int(shapes[0, 1]), "empty": empty}


def _captions(loaded: dict[str, _Facet], kept: _Kept, facet: _Facet) -> tuple[Ints, npt.NDArray[np.int32]]:
    """CSR of every kept row's captions as positions in the text table. Features lie in the row's own unit."""
    listing = _newest(loaded[LISTING].table)
    at, found = _match(LISTING, listing, kept.rows)
    if not found.all():
        raise DataError(f"row {int(kept.rows[~found][0])} is kept but not in the listing: the data set is damaged")
    captions = listing["captions"].combine_chunks()
    captions = captions.take(pa.array(at))
    counts = _numpy(pc.fill_null(pc.list_value_length(captions), 0), np.int64)
    if not (counts > 0).all():
        key = kept.keys[counts == 0][0].decode()
        raise DataError(f"row {key} is kept without a caption: run `qwenimg-dist produce` again")
    encoded = pc.list_flatten(captions).dictionary_encode()
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    keys = pa.array([caption_key(text) for text in encoded.dictionary.to_pylist()], pa.string())
    units = np.repeat(kept.units, counts)
    wanted = _unit_key(pa.array(units), keys.take(encoded.indices))
    texts = pc.index_in(wanted, _unit_key(facet.table["unit"], facet.table["key"]))
    if texts.null_count:
        flat = int(np.flatnonzero(_numpy(texts.is_null(), np.bool_))[0])
        row = int(np.searchsorted(np.cumsum(counts), flat, side="right"))
        caption = encoded.dictionary[encoded.indices[flat].as_py()].as_py()
        raise DataError(
            f"caption {caption[:60]!r} of row {kept.keys[row].decode()} (unit {int(units[flat])}) has no features in "
            f"{facet.name}: run `qwenimg-dist produce` again"
        )
    starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
    return starts, _numpy(texts, np.int32)


def _add_latents(facet: _Facet, kept: _Kept, resolution: int, out: _Output) -> dict[str, Any]:
    """Bucket and place per kept row; -1 where this class has no latents of it."""
    numbers = out.add_tars(facet)
    shapes = _shapes(facet, dims=3)
    dtype = _one_dtype(facet)
    _check_places(facet, shapes, dtype)
    height = _numpy(facet.table["bucket_height"], np.int64)
    width = _numpy(facet.table["bucket_width"], np.int64)
    channels = int(shapes[0, 0]) if len(shapes) else 16
    expected = np.stack([np.full(len(height), channels), height // 8, width // 8], axis=1)
    _require(facet, (shapes == expected).all(axis=1), "the latents' shape is not their bucket's")
    sizes, inverse = np.unique((height << 32) + width, return_inverse=True)
    table = facet.table.select(["row", "offset"])
    table = table.append_column("bucket", pa.array(inverse.astype(np.int16)))
    table = _newest(table.append_column("number", pa.array(_tar_numbers(facet.table, numbers))))
    at, found = _match(facet.name, table, kept.rows)
    at = at[found]
    for name, column, kind in (
        ("bucket", "bucket", np.int16),
        ("tar", "number", np.int32),
        ("offset", "offset", np.int64),
    ):
        array = np.full(len(kept.rows), -1, dtype=kind)
        array[found] = _numpy(table[column], kind)[at]
        out.arrays[f"latents-{resolution}-{name}"] = array
    return {
        "facet": facet.name,
        "dtype": dtype,
        "channels": channels,
        "buckets": [[int(size >> 32), int(size & 0xFFFFFFFF)] for size in sizes],
    }


def _shapes(facet: _Facet, *, dims: int) -> Ints:
    """(rows, dims) shapes of the tensors."""
    column = facet.table["shape"].combine_chunks()
    _require(facet, _numpy(pc.list_value_length(column), np.int64) == dims, f"a tensor has not {dims} dimensions")
    return _numpy(pc.list_flatten(column), np.int64).reshape(-1, dims)


def _one_dtype(facet: _Facet) -> str:
    found = pc.unique(facet.table["dtype"]).to_pylist()
    if len(found) > 1 or (found and found[0] not in ITEM_BYTES):
        raise DataError(f"{facet.name} has tensors of type {', '.join(found)}; one of {', '.join(ITEM_BYTES)} is read")
    return str(found[0]) if found else "bfloat16"


def _check_places(facet: _Facet, shapes: Ints, dtype: str) -> None:
    """Every tensor has the bytes its shape needs and lies inside its tar."""
    nbytes, offset = _numpy(facet.table["nbytes"], np.int64), _numpy(facet.table["offset"], np.int64)
    _require(facet, nbytes == shapes.prod(axis=1) * ITEM_BYTES[dtype], "nbytes is not what the shape needs")
    names = pa.array(list(facet.tars), pa.string())
    number = pc.index_in(facet.table["tar"], names)
    _require(facet, ~_numpy(pc.is_null(number), np.bool_), "its tar is not among the tars committed with the part")
    sizes = np.array([*facet.tars.values(), 0], dtype=np.int64)[_numpy(number, np.int64, missing=-1)]
    _require(facet, (offset >= 0) & (offset + nbytes <= sizes), "it lies outside its tar")


def _require(facet: _Facet, holds: npt.NDArray[np.bool_], what: str) -> None:
    if not holds.all():
        row = int(np.flatnonzero(~holds)[0])
        key, unit = facet.table["key"][row].as_py(), facet.table["unit"][row].as_py()
        raise DataError(f"{facet.name}, unit {unit}, key {key}: {what}; check it with `qwenimg-dist data verify`")


def _tar_numbers(table: pa.Table, numbers: dict[str, int]) -> npt.NDArray[np.int32]:
    index = pc.index_in(table["tar"], pa.array(list(numbers), pa.string()))
    array: npt.NDArray[np.int32] = np.array([*numbers.values(), -1], dtype=np.int32)
    numbered: npt.NDArray[np.int32] = array[_numpy(index, np.int64, missing=-1)]
    return numbered


def _unit_key(units: pa.Array, keys: pa.Array) -> pa.Array:
    return pc.binary_join_element_wise(pc.cast(units, pa.string()), keys, ":")


def _numpy(column: Any, kind: Any, *, missing: Any = None) -> npt.NDArray[Any]:
    if missing is not None and column.null_count:
        column = pc.fill_null(column, missing)
    return np.asarray(
        column.to_numpy(zero_copy_only=False) if isinstance(column, pa.Array) else column.to_numpy()
    ).astype(kind, copy=False)


def _strings(column: Any) -> npt.NDArray[np.bytes_]:
    return np.array(column.to_pylist(), dtype=np.bytes_) if len(column) else np.zeros(0, dtype="S20")


def _commit(out: _Output, pins: Sequence[Pin], folder: Path) -> None:
    """Write under a temporary name, fsync, rename. A crash leaves no half catalog under the final name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(folder)
    temporary.mkdir()
    try:
        for name, array in out.arrays.items():
            _write(temporary / f"{name}.npy", partial(np.save, arr=array, allow_pickle=False))
        _write(temporary / PARTS, lambda sink: sink.write(json.dumps([pin_to_json(pin) for pin in pins]).encode()))
        _write(temporary / HEAD, lambda sink: sink.write(json.dumps(out.head, sort_keys=True).encode()))
        fsync_dir(temporary)
        if folder.exists():
            # Left by an attempt that died before it recorded its generation: nobody reads it.
            shutil.rmtree(folder)
        os.rename(temporary, folder)
        fsync_dir(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(file: Path, write: Callable[[Any], Any]) -> None:
    fault_point("catalog_write")
    with open(file, "wb") as sink:
        write(sink)
        sink.flush()
        os.fsync(sink.fileno())
