"""Compile a catalog from pinned parts: parquet of many units -> a folder of `.npy` columns, committed by a rename.

Place in the flow: rank 0 calls `build_catalog` once per generation; see `catalog.py` for the reading side. All work
per row is done by arrow and numpy: a million rows take well under a minute. Refuses parts that contradict each other
(a kept row without text features, a tensor of another shape than its bucket), naming file and key.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qwenimg_dist.data.catalog import CATALOG_VERSION, HEAD, ROW_EMPTY, CatalogFolder, Ints, RunFacets, further_array
from qwenimg_dist.data.draws import hash_keys
from qwenimg_dist.data.edit_tables import MAX_BUCKETS, bucket_of, conditions_of_rows, distinct, edit_keys
from qwenimg_dist.data.facets import DataError, Dataset
from qwenimg_dist.data.part_tables import (
    FacetTable,
    check_places,
    further_offsets,
    load_facets,
    match_rows,
    newest,
    one_dtype,
    require,
    shapes_of,
    tar_numbers,
    to_array,
    to_strings,
)
from qwenimg_dist.data.pins import (
    Pin,
    UnitPins,
    check_tar,
    digest_of,
    parallel,
    pin_to_json,
)
from qwenimg_dist.data.takedown import NOTHING, Takedown, rows_taken_down
from qwenimg_dist.debug import fault_point
from qwenimg_dist.files import fsync_dir, temporary_name
from qwenimg_dist.schema import (
    EDIT,
    IMAGE,
    LABEL_PREFIX,
    LISTING,
    PREFERENCE,
    PROMPT,
    RAW,
    ROWS,
    SCAN,
    SCORE_PREFIX,
    Kind,
    caption_key,
)

PARTS: Final = "parts.json"


@dataclass(kw_only=True)
class _Output:
    """What will be written."""

    arrays: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    head: dict[str, Any] = field(default_factory=dict)
    tars: list[tuple[str, str, int]] = field(default_factory=list)

    def add_tars(self, facet: FacetTable) -> dict[str, int]:
        """Number the facet's tars; returns name -> number."""
        numbers = {}
        for name in sorted(facet.tars):
            numbers[name] = len(self.tars)
            self.tars.append((facet.name, name, facet.tars[name]))
        return numbers


def build_catalog(
    dataset: Dataset,
    units: Sequence[UnitPins],
    facets: RunFacets,
    folder: Path,
    takedown: Takedown = NOTHING,
) -> CatalogFolder:
    """Compile and commit to `folder`; an identical catalog that is there already is kept, another one replaced.

    Rows that are taken down are left out. Raises `DataError` naming the part, tar or key where the data set contradicts
    itself, or if it holds rows of another kind than the run trains on.
    """
    edits = facets.kind == EDIT
    loaded = load_facets(dataset, units, further=bool(facets.further) or edits, kind=facets.kind)
    out = _Output()
    taken_down = rows_taken_down(dataset, units, takedown)
    kept = _kept_rows(loaded[ROWS], out, taken_down.rows)
    out.head["taken_down"] = list(taken_down.matched)
    _add_columns(loaded, kept, out)
    _add_kind(loaded, kept, facets.kind, dataset, out)
    _add_texts(loaded, kept, facets, out)
    out.head["latents"] = {
        str(resolution): _add_latents(loaded[facet], kept, resolution, out, further=facets.further, edits=edits)
        for resolution, facet in sorted(facets.latents.items())
    }
    out.head["latents"] |= {str(resolution): _add_drawn(kept, resolution, out) for resolution in facets.drawn}
    if facets.kind == PROMPT:
        _add_prompts(loaded[LISTING], kept, out)
    parallel(lambda tar: check_tar(dataset, *tar), out.tars)
    pins = [pin for facet in loaded.values() for pin in facet.pins]
    out.head |= {"version": CATALOG_VERSION, "digest": digest_of(pins, takedown.digest), "tars": out.tars}
    _commit(out, pins, folder)
    return CatalogFolder(folder=folder, num_rows=len(kept.rows), num_texts=len(out.arrays["text_tokens"]))


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """Kept rows in listing order."""

    rows: Ints
    units: npt.NDArray[np.int32]
    keys: npt.NDArray[np.bytes_]
    table: pa.Table


def _kept_rows(facet: FacetTable, out: _Output, taken_down: Ints) -> _Kept:
    table = newest(facet.table)
    table = table.filter(pc.equal(table["status"], "kept"))
    if len(taken_down):
        table = table.filter(pc.invert(pc.is_in(table["row"], value_set=pa.array(taken_down))))
    kept = _Kept(
        rows=to_array(table["row"], np.int64),
        units=to_array(table["unit"], np.int32),
        keys=to_strings(table["key"]),
        table=table,
    )
    out.arrays |= {"keys": kept.keys, "rows": kept.rows, "units": kept.units, "key_hash": hash_keys(kept.keys)}
    return kept


def _add_columns(loaded: dict[str, FacetTable], kept: _Kept, out: _Output) -> None:
    scan = newest(loaded[SCAN].table) if SCAN in loaded else None
    columns, words = index_columns(kept.table, scan)
    out.arrays |= {f"column-{name}": array for name, array in columns.items()}
    out.head |= {"columns": list(columns), "words": words}


def index_columns(table: pa.Table, scan: pa.Table | None) -> tuple[dict[str, npt.NDArray[Any]], dict[str, list[str]]]:
    """Columns that `where` may name, of the `rows` and `scan` facets; text as codes, with the words beside it.

    Both tables are as `newest` makes them; `table` has its `unit` besides.
    """
    rows = to_array(table["row"], np.int64)
    width, height = to_array(table["width"], np.int32), to_array(table["height"], np.int32)
    columns: dict[str, npt.NDArray[Any]] = {
        "row": rows,
        "unit": to_array(table["unit"], np.int32),
        "width": width,
        "height": height,
        "aspect": width / np.maximum(height, 1),
    }
    words: dict[str, list[str]] = {}
    columns["status"], words["status"] = coded(table["status"])
    for name in table.column_names:
        if name.startswith(SCORE_PREFIX):
            columns[name] = to_array(pc.cast(table[name], pa.float32()), np.float32, missing=np.nan)
        elif name.startswith(LABEL_PREFIX):
            columns[name], words[name] = coded(table[name])
    if scan is not None:
        at, found = match_rows(SCAN, scan, rows)
        if found.all():
            columns["bytes"] = to_array(scan["bytes"], np.int64, missing=0)[at]
            formats, words["format"] = coded(scan["format"])
            columns["format"] = formats[at]
    return columns, words


def _add_kind(loaded: dict[str, FacetTable], kept: _Kept, kind: Kind, dataset: Dataset, out: _Output) -> None:
    """The column `kind`. A preference's chosen picture has captions and latents too, and would pass for an image."""
    found = {kind} if not len(kept.rows) else {IMAGE}  # what was listed before there were kinds
    if "kind" in loaded[LISTING].table.column_names:
        listing = newest(loaded[LISTING].table)
        at, there = match_rows(LISTING, listing, kept.rows)
        kinds = pc.fill_null(listing["kind"].combine_chunks().take(pa.array(at[there])), IMAGE)
        found = set(pc.unique(kinds).to_pylist()) or found
    if found != {kind}:
        raise DataError(f"{dataset.root} {wrong_kind(found, kind)}")
    out.arrays["column-kind"] = np.zeros(len(kept.rows), dtype=np.int8)
    out.head["columns"].append("kind")
    out.head["words"]["kind"] = [kind]


def wrong_kind(found: Iterable[str], kind: Kind) -> str:
    """What is wrong with a data set of other kinds than the run reads, and the way out."""
    said = {IMAGE: "data.kind=image", EDIT: "data.kind=edit (stage=edit)", PREFERENCE: "stage=dpo"}
    ways = [said[one] for one in sorted(set(found)) if one in said]
    return (
        f"holds samples of kind {', '.join(sorted(found))}, this run trains on kind {kind}: give it a data set that "
        "`qwenimg-dist produce` made from a source of that kind"
        + (f", or train on these with {' or '.join(ways)}, in a mix with `kind` of the data set" if ways else "")
    )


def coded(column: pa.ChunkedArray) -> tuple[npt.NDArray[np.int16 | np.int32], list[str]]:
    """A text column as codes and their words; what is missing is the empty word. 2 bytes a row, 4 where there are more
    words than these can number."""
    encoded = pc.fill_null(column, "").combine_chunks().dictionary_encode()
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    words = encoded.dictionary.to_pylist() or [""]
    return to_array(encoded.indices, np.int16 if len(words) <= np.iinfo(np.int16).max else np.int32), words


def _add_texts(loaded: dict[str, FacetTable], kept: _Kept, facets: RunFacets, out: _Output) -> None:
    """Text positions, their places, and the captions of every kept row as text positions."""
    facet = loaded[facets.text]
    table = facet.table
    shapes = shapes_of(facet, dims=2)
    tokens = to_array(table["num_tokens"], np.int32)
    require(facet, shapes[:, 0] == tokens, "num_tokens differs from the tensor's length")
    require(facet, shapes[:, 1] == (shapes[0, 1] if len(shapes) else 0), "the features' width differs")
    dtype = one_dtype(facet)
    check_places(facet, shapes, dtype)
    numbers = out.add_tars(facet)
    out.arrays |= {
        "text_keys": to_strings(table["key"]),
        "text_tokens": tokens,
        "text_tar": tar_numbers(table, numbers),
        "text_offset": to_array(table["offset"], np.int64),
    }
    captions = _captions(loaded, kept, facet, edits=facets.kind == EDIT)
    out.arrays |= {"caption_start": captions.start, "caption_text": captions.texts, "caption_kind": captions.kinds}
    out.head["caption_kinds"] = captions.kind_words
    if captions.empty is not None:
        out.arrays[ROW_EMPTY] = captions.empty
        out.head["row_empty"] = True
    empty = pc.index(table["key"], caption_key("")).as_py()
    if empty < 0:
        raise DataError(f"{facet.name} has no features of the empty prompt in part 0: run `qwenimg-dist produce` again")
    out.head["text"] = {"facet": facet.name, "dtype": dtype, "width": int(shapes[0, 1]), "empty": empty}


@dataclass(frozen=True, kw_only=True)
class _Captions:
    """CSR of every kept row's fit captions."""

    start: Ints
    texts: npt.NDArray[np.int32]
    """Positions in the text table."""
    kinds: npt.NDArray[np.int16]
    """Index into `kind_words`."""
    kind_words: list[str]
    empty: npt.NDArray[np.int32] | None
    """(rows,) of edits: position of the empty instruction."""


def _captions(loaded: dict[str, FacetTable], kept: _Kept, facet: FacetTable, *, edits: bool) -> _Captions:
    """Captions that filters left out are left out here too. Features lie in the row's own unit."""
    listing = newest(loaded[LISTING].table)
    at, found = match_rows(LISTING, listing, kept.rows)
    if not found.all():
        raise DataError(f"row {int(kept.rows[~found][0])} is kept but not in the listing: the data set is damaged")
    captions, empty_keys = _caption_keys(loaded, listing, at, kept, edits=edits)
    listed = to_array(pc.fill_null(pc.list_value_length(captions), 0), np.int64)
    fit = _fit(kept, listed)
    row_of = np.repeat(np.arange(len(listed)), listed)[fit]
    counts = np.bincount(row_of, minlength=len(listed)).astype(np.int64)
    if not (counts > 0).all():
        key = kept.keys[counts == 0][0].decode()
        raise DataError(f"row {key} is kept without a caption: run `qwenimg-dist produce` again")
    keys = pc.list_flatten(captions).filter(pa.array(fit))
    kinds, words = _kinds(listing, at, kept, listed)
    return _Captions(
        start=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)]),
        texts=_positions(facet, keys, row_of, kept),
        kinds=kinds[fit],
        kind_words=words,
        empty=None if empty_keys is None else _positions(facet, empty_keys, np.arange(len(kept.rows)), kept),
    )


def _caption_keys(
    loaded: dict[str, FacetTable], listing: pa.Table, at: Ints, kept: _Kept, *, edits: bool
) -> tuple[Any, pa.Array | None]:
    """Per kept row the list of its captions' keys, and of edits the key of the empty instruction."""
    if not edits:
        return listing["caption_keys"].combine_chunks().take(pa.array(at)), None
    scan = newest(loaded[SCAN].table) if SCAN in loaded else None
    where, found = match_rows(SCAN, scan, kept.rows) if scan is not None else (at, np.zeros(len(at), dtype=np.bool_))
    if scan is None or not found.all() or "pictures" not in scan.column_names:
        row = kept.keys[int(np.flatnonzero(~found)[0])].decode() if len(found) and not found.all() else ""
        raise DataError(f"{SCAN} lacks the condition pictures of kept edits ({row}): run `qwenimg-dist produce` again")
    pictures = scan["pictures"].combine_chunks().take(pa.array(where))
    return edit_keys(listing["captions"].combine_chunks().take(pa.array(at)), pictures)


def _positions(facet: FacetTable, keys: Any, row_of: Ints, kept: _Kept) -> npt.NDArray[np.int32]:
    """Where texts stand in the text table, each in the unit of its row."""
    wanted = _unit_key(pa.array(kept.units[row_of]), keys)
    texts = pc.index_in(wanted, _unit_key(facet.table["unit"], facet.table["key"]))
    if texts.null_count:
        flat = int(np.flatnonzero(to_array(texts.is_null(), np.bool_))[0])
        row = int(row_of[flat])
        raise DataError(
            f"caption {keys[flat].as_py()} of row {kept.keys[row].decode()} (unit {int(kept.units[row])}) has no "
            f"features in {facet.name}: run `qwenimg-dist produce` again"
        )
    return to_array(texts, np.int32)


def _fit(kept: _Kept, listed: Ints) -> npt.NDArray[np.bool_]:
    """(captions,) True where no filter found fault with the caption."""
    fit = np.ones(int(listed.sum()), dtype=np.bool_)
    if "caption_faults" in kept.table.column_names:
        spread = _spread(kept.table["caption_faults"], kept, listed, "caption_faults")
        if spread is not None:
            where, faults = spread
            fit[where] = to_array(pc.equal(faults, ""), np.bool_)
    return fit


def _kinds(listing: pa.Table, at: Ints, kept: _Kept, listed: Ints) -> tuple[npt.NDArray[np.int16], list[str]]:
    """(captions,) kind of every listed caption as a code; `raw` where the source named none."""
    codes, words = np.zeros(int(listed.sum()), dtype=np.int16), [RAW]
    if "caption_kinds" in listing.column_names:
        spread = _spread(listing["caption_kinds"].combine_chunks().take(pa.array(at)), kept, listed, "caption_kinds")
        if spread is not None:
            where, kinds = spread
            words = [RAW, *sorted(set(pc.unique(kinds).to_pylist()) - {RAW})]
            codes[where] = to_array(pc.index_in(kinds, pa.array(words, kinds.type)), np.int16)
    return codes, words


def _spread(column: Any, kept: _Kept, listed: Ints, name: str) -> tuple[npt.NDArray[np.bool_], Any] | None:
    """A list column beside the captions: which captions it speaks of, and what it says; None if it says nothing."""
    lists = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    lengths = to_array(pc.fill_null(pc.list_value_length(lists), 0), np.int64)
    wrong = (lengths != 0) & (lengths != listed)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise DataError(
            f"row {kept.keys[row].decode()} (unit {int(kept.units[row])}) has {int(listed[row])} captions and "
            f"{int(lengths[row])} {name}: run `qwenimg-dist produce` again"
        )
    return (np.repeat(lengths > 0, listed), pc.list_flatten(lists)) if lengths.any() else None


def _add_latents(
    facet: FacetTable, kept: _Kept, resolution: int, out: _Output, *, further: Sequence[str], edits: bool
) -> dict[str, Any]:
    """Bucket and place per kept row; -1 where this class has no latents of it. Of edits, the conditions are part of the
    bucket, and further tensors as far as a row has them."""
    numbers = out.add_tars(facet)
    shapes = shapes_of(facet, dims=3)
    dtype = one_dtype(facet)
    check_places(facet, shapes, dtype)
    height = to_array(facet.table["bucket_height"], np.int64)
    width = to_array(facet.table["bucket_width"], np.int64)
    channels = int(shapes[0, 0]) if len(shapes) else 16
    expected = np.stack([np.full(len(height), channels), height // 8, width // 8], axis=1)
    require(facet, (shapes == expected).all(axis=1), "the latents' shape is not their bucket's")
    conditions = conditions_of_rows(facet, dtype, channels) if edits else None
    rows_sizes = np.stack([height, width], axis=1)
    if conditions is not None:
        rows_sizes = np.concatenate([rows_sizes, conditions.sizes], axis=1)
    sizes, inverse = distinct(rows_sizes)
    if len(sizes) > MAX_BUCKETS:
        raise DataError(
            f"{facet.name} has {len(sizes):,} combinations of target and condition sizes, at most {MAX_BUCKETS:,} can "
            "be told apart, and each takes batches of its own: produce with fewer encode.aspects, or fewer conditions"
        )
    buckets = [bucket_of(one) for one in sizes]
    table = facet.table.select(["row", "offset"])
    table = table.append_column("bucket", pa.array(inverse.astype(np.int16)))
    table = table.append_column("number", pa.array(tar_numbers(facet.table, numbers)))
    prefix = f"latents-{resolution}-"
    arrays: list[tuple[str, str, type]] = [
        (f"{prefix}bucket", "bucket", np.int16),
        (f"{prefix}tar", "number", np.int32),
        (f"{prefix}offset", "offset", np.int64),
    ]
    for name in further:
        table = table.append_column(name, pa.array(further_offsets(facet, name)))
        arrays.append((further_array(resolution, name), name, np.int64))
    for index, name in enumerate(conditions.names() if conditions is not None else ()):
        assert conditions is not None
        table = table.append_column(name, pa.array(conditions.offsets[:, index]))
        arrays.append((further_array(resolution, name), name, np.int64))
    table = newest(table)
    at, found = match_rows(facet.name, table, kept.rows)
    at = at[found]
    for name, column, kind in arrays:
        array: npt.NDArray[Any] = np.full(len(kept.rows), -1, dtype=kind)
        array[found] = to_array(table[column], kind)[at]
        out.arrays[name] = array
    return {
        "facet": facet.name,
        "dtype": dtype,
        "channels": channels,
        "further": [*further, *(conditions.names() if conditions is not None else ())],
        "buckets": [[bucket.height, bucket.width] for bucket in buckets],
        **({"conditions": [bucket.conditions for bucket in buckets]} if edits else {}),
    }


def _add_drawn(kept: _Kept, resolution: int, out: _Output) -> dict[str, Any]:
    """A class without latents: the run draws every row. The one bucket stands for all: shapes are the ledger's."""
    prefix = f"latents-{resolution}-"
    out.arrays[f"{prefix}bucket"] = np.zeros(len(kept.rows), dtype=np.int16)
    out.arrays[f"{prefix}tar"] = np.full(len(kept.rows), -1, dtype=np.int32)
    out.arrays[f"{prefix}offset"] = np.full(len(kept.rows), -1, dtype=np.int64)
    return {"facet": "", "dtype": "float32", "channels": 16, "further": [], "buckets": [[resolution, resolution]]}


def _add_prompts(facet: FacetTable, kept: _Kept, out: _Output) -> None:
    """Text and metadata of every kept row, see `catalog.PromptTable`."""
    table = newest(facet.table)
    at, _ = match_rows(LISTING, table, kept.rows)  # all are there, or there were no captions
    texts = table["prompt"].combine_chunks().take(pa.array(at)).to_pylist()
    there = "meta" in table.column_names
    metas = table["meta"].combine_chunks().take(pa.array(at)).to_pylist() if there else [None] * len(texts)
    lines = []
    for key, text, meta in zip(kept.keys, texts, metas, strict=True):
        try:
            told = json.loads(meta) if meta else {}
        except ValueError as error:
            raise DataError(f"{facet.name}: the metadata of row {key.decode()} are no JSON ({error})") from error
        lines.append(json.dumps([text, told]).encode())
    lengths = np.array([0, *(len(line) for line in lines)], dtype=np.int64)
    out.arrays |= {"prompt_data": np.frombuffer(b"".join(lines), dtype=np.uint8), "prompt_start": np.cumsum(lengths)}
    out.head["prompts"] = True


def _unit_key(units: pa.Array, keys: pa.Array) -> pa.Array:
    return pc.binary_join_element_wise(pc.cast(units, pa.large_string()), keys, pa.scalar(":", pa.large_string()))


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
