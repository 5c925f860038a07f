"""Tables of all pinned parts of a facet, one below the other, and checked column access.

Place in the flow: `catalog_build.py` compiles these. Each part is read once, for its digest and its columns; columns
leave as numpy arrays. Refuses tensors of mixed types, of a shape their bytes do not fit, or outside their tar.

Arrow's `string` ends at 2 GiB per array, which the captions of some 10 M rows would reach: they are hashed to their
keys unit by unit, and all other text is `large_string`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qwenimg_dist.data.catalog import ITEM_BYTES, Ints
from qwenimg_dist.data.errors import MENDING
from qwenimg_dist.data.facets import DataError, Dataset, Part
from qwenimg_dist.data.pins import Pin, UnitPins, parallel, read_part_bytes
from qwenimg_dist.schema import (
    EDIT,
    IMAGE,
    LABEL_PREFIX,
    LISTING,
    OPTIONAL_COLUMNS,
    PROMPT,
    ROWS,
    SCAN,
    SCORE_PREFIX,
    Kind,
    caption_key,
)

_PLACE: Final = ("tar", "offset", "nbytes", "dtype", "shape")
_COLUMNS: Final = {
    LISTING: ("row", "captions", "caption_kinds", "kind"),
    SCAN: ("row", "bytes", "format"),
    ROWS: ("row", "key", "status", "width", "height", "caption_faults"),
}
_TEXT_COLUMNS: Final = ("key", "num_tokens", *_PLACE)
_LATENTS_COLUMNS: Final = ("row", "key", "bucket_height", "bucket_width", *_PLACE)
FURTHER: Final = "further"
_MADE_BY: Final = {"logvar": "produce with encode.posterior=mean_logvar", "rejected": "produce from source=pairs"}


@dataclass(frozen=True, kw_only=True)
class FacetTable:
    """All pinned parts of one facet, one below the other, with `unit` beside each row."""

    name: str
    table: pa.Table
    pins: list[Pin]
    tars: dict[str, int]
    """Name -> size in bytes, of the committed tars."""


def load_facets(
    dataset: Dataset, units: Sequence[UnitPins], *, further: bool = False, kind: Kind = IMAGE
) -> dict[str, FacetTable]:
    """Read every pinned part once: bytes for the digest, then columns, with `further` of latents' other tensors too.

    Of prompts each row's text (`prompt`) and what its source told of it (`meta`). Of edits captions stay text (their
    keys are also of pictures), and `scan` has `pictures`, the sha256 of each further picture.
    """
    parts = [part for unit in units for part in unit.parts()]
    read = parallel(lambda part: _read(dataset, part, further, kind), parts)
    loaded: dict[str, FacetTable] = {}
    for facet in sorted({part.facet for part in parts}):
        mine = [(part, result) for part, result in zip(parts, read, strict=True) if part.facet == facet]
        tars = {tar["name"]: int(tar["size_bytes"]) for _, (_, meta, _) in mine for tar in meta.get("tars", [])}
        loaded[facet] = FacetTable(
            name=facet,
            table=pa.concat_tables([table for _, (_, _, table) in mine], promote_options="default").combine_chunks(),
            pins=[Pin(part=part, sha256=sha256) for part, (sha256, _, _) in mine],
            tars=tars,
        )
    return loaded


def _read(dataset: Dataset, part: Part, further: bool, kind: Kind) -> tuple[str, dict[str, Any], pa.Table]:
    raw = read_part_bytes(dataset, part)
    file = dataset.parquet(part)
    try:
        # One thread per file: the files themselves are read side by side.
        parquet = pq.ParquetFile(pa.BufferReader(raw))
        wanted = _wanted(part.facet, parquet.schema_arrow.names, further, kind)
        table = parquet.read(columns=wanted, use_threads=False)
        meta = json.loads((parquet.schema_arrow.metadata or {})[b"qwenimg_dist"])
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}): {MENDING}") from error
    table = _without_limits(table.replace_schema_metadata(None), kind)
    table = table.append_column("unit", pa.array(np.full(len(table), part.unit, dtype=np.int32)))
    return hashlib.sha256(raw).hexdigest(), meta, table


def _without_limits(table: pa.Table, kind: Kind) -> pa.Table:
    """`captions` become `caption_keys`, the first of each beside them for prompts, text as it is for edits, whose
    `others` become `pictures`; text gets 64-bit offsets."""
    if kind == PROMPT and "captions" in table.column_names:
        first = [texts[0] if texts else None for texts in table["captions"].to_pylist()]
        table = table.append_column("prompt", pa.array(first, pa.large_string()))
    for index, field in enumerate(table.schema):
        if field.name == "captions" and kind == EDIT:
            table = table.set_column(index, "captions", table["captions"].cast(pa.large_list(pa.large_string())))
        elif field.name == "others":
            table = table.set_column(index, "pictures", _sha256s(table["others"]))
        elif field.name == "captions":
            table = table.set_column(index, "caption_keys", caption_keys(table["captions"]))
        elif field.type == pa.string():
            table = table.set_column(index, field.name, table[field.name].cast(pa.large_string()))
    return table


def caption_keys(captions: pa.ChunkedArray) -> pa.LargeListArray:
    """list<string> of one part -> large_list<large_string> of the keys of their text features."""
    lists = captions.combine_chunks()
    counts = to_array(pc.fill_null(pc.list_value_length(lists), 0), np.int64)
    keys = [caption_key(text) for text in pc.list_flatten(lists).to_pylist()]
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(keys, pa.large_string()))


def _sha256s(others: pa.ChunkedArray) -> pa.LargeListArray:
    """list<struct> of further pictures -> large_list<large_string> of their hashes; empty where there are none."""
    lists = others.combine_chunks()
    counts = to_array(pc.fill_null(pc.list_value_length(lists), 0), np.int64)
    found = pc.struct_field(pc.list_flatten(lists), "sha256").cast(pa.large_string())
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
    return pa.LargeListArray.from_arrays(pa.array(offsets), found)


def _wanted(facet: str, names: Sequence[str], further: bool, kind: Kind) -> list[str]:
    if facet == SCAN and kind == EDIT:
        return _there((*_COLUMNS[SCAN], "others"), names)
    if facet == ROWS:
        values = sorted(name for name in names if name.startswith((SCORE_PREFIX, LABEL_PREFIX)))
        return [*_there(_COLUMNS[ROWS], names), *values]
    if facet in _COLUMNS:
        return _there([*_COLUMNS[facet], *(["meta"] if kind == PROMPT and facet == LISTING else [])], names)
    if facet.startswith("text-"):
        return list(_TEXT_COLUMNS)
    return [*_LATENTS_COLUMNS, *(_there([FURTHER], names) if further else ())]


def _there(columns: Sequence[str], names: Sequence[str]) -> list[str]:
    return [name for name in columns if name in names or name not in OPTIONAL_COLUMNS]


def newest(table: pa.Table) -> pa.Table:
    """One row per listing number, ascending; a later part supersedes an earlier one."""
    numbers = to_array(table["row"], np.int64)
    if (np.diff(numbers) > 0).all():
        return table
    _, from_end = np.unique(numbers[::-1], return_index=True)
    return table.take(pa.array(len(numbers) - 1 - from_end))


def match_rows(facet: str, table: pa.Table, rows: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Where each of `rows` stands in a table made by `newest`, and whether it is there."""
    there = to_array(table["row"], np.int64)
    at = np.searchsorted(there, rows)
    found = np.zeros(len(rows), dtype=np.bool_)
    inside = at < len(there)
    found[inside] = there[at[inside]] == rows[inside]
    return at, found


def shapes_of(facet: FacetTable, *, dims: int) -> Ints:
    """(rows, dims) shapes of the tensors."""
    column = facet.table["shape"].combine_chunks()
    require(facet, to_array(pc.list_value_length(column), np.int64) == dims, f"a tensor has not {dims} dimensions")
    return to_array(pc.list_flatten(column), np.int64).reshape(-1, dims)


def one_dtype(facet: FacetTable) -> str:
    found = pc.unique(facet.table["dtype"]).to_pylist()
    if len(found) > 1 or (found and found[0] not in ITEM_BYTES):
        raise DataError(f"{facet.name} has tensors of type {', '.join(found)}; one of {', '.join(ITEM_BYTES)} is read")
    return str(found[0]) if found else "bfloat16"


def check_places(facet: FacetTable, shapes: Ints, dtype: str) -> None:
    """Every tensor has the bytes its shape needs and lies inside its tar."""
    nbytes, offset = to_array(facet.table["nbytes"], np.int64), to_array(facet.table["offset"], np.int64)
    require(facet, nbytes == shapes.prod(axis=1) * ITEM_BYTES[dtype], "nbytes is not what the shape needs")
    names = pa.array(list(facet.tars), pa.large_string())
    number = pc.index_in(facet.table["tar"], names)
    require(facet, ~to_array(pc.is_null(number), np.bool_), "its tar is not among the tars committed with the part")
    sizes = np.array([*facet.tars.values(), 0], dtype=np.int64)[to_array(number, np.int64, missing=-1)]
    require(facet, (offset >= 0) & (offset + nbytes <= sizes), "it lies outside its tar")


def further_offsets(facet: FacetTable, name: str) -> Ints:
    """(rows,) where the sample's tensor `name` begins; it must have the shape and type of the sample's first one.

    Raises `DataError` naming the first sample without it.
    """
    offsets = np.full(len(facet.table), -1, dtype=np.int64)
    same = np.zeros(len(facet.table), dtype=np.bool_)
    if FURTHER in facet.table.column_names:
        lists = facet.table[FURTHER].combine_chunks()
        rows = to_array(pc.list_parent_indices(lists), np.int64)
        places = pc.list_flatten(lists)
        mine = to_array(pc.equal(pc.struct_field(places, "name"), name), np.bool_)
        rows, places = rows[mine], places.filter(pa.array(mine))
        offsets[rows] = to_array(pc.struct_field(places, "offset"), np.int64)
        first = facet.table.select(["nbytes", "dtype"]).take(pa.array(rows))
        # Bytes and type are equal; the shape then is too, since both are latents in one bucket.
        same[rows] = to_array(pc.equal(pc.struct_field(places, "nbytes"), first["nbytes"]), np.bool_)
        same[rows] &= to_array(pc.equal(pc.struct_field(places, "dtype"), first["dtype"].cast(pa.string())), np.bool_)
    require(facet, offsets >= 0, f"the sample has no tensor {name!r} ({_MADE_BY.get(name, 'produce it')})")
    require(facet, same, f"the tensor {name!r} has other bytes or another type than the latents")
    return offsets


def require(facet: FacetTable, holds: npt.NDArray[np.bool_], what: str) -> None:
    if not holds.all():
        row = int(np.flatnonzero(~holds)[0])
        key, unit = facet.table["key"][row].as_py(), facet.table["unit"][row].as_py()
        raise DataError(f"{facet.name}, unit {unit}, key {key}: {what}; check it with `qwenimg-dist data verify`")


def tar_numbers(table: pa.Table, numbers: dict[str, int]) -> npt.NDArray[np.int32]:
    index = pc.index_in(table["tar"], pa.array(list(numbers), pa.large_string()))
    array: npt.NDArray[np.int32] = np.array([*numbers.values(), -1], dtype=np.int32)
    numbered: npt.NDArray[np.int32] = array[to_array(index, np.int64, missing=-1)]
    return numbered


def to_array(column: Any, kind: Any, *, missing: Any = None) -> npt.NDArray[Any]:
    if missing is not None and column.null_count:
        column = pc.fill_null(column, missing)
    return np.asarray(
        column.to_numpy(zero_copy_only=False) if isinstance(column, pa.Array) else column.to_numpy()
    ).astype(kind, copy=False)


def to_strings(column: Any) -> npt.NDArray[np.bytes_]:
    return np.array(column.to_pylist(), dtype=np.bytes_) if len(column) else np.zeros(0, dtype="S20")
