"""Texts and captions of a catalog: where features lie, and which of them each kept row may come with.

Place in the flow: `catalog_build.py` calls `add_texts` once the kept rows are known. Captions that filters left out are
left out here too. Refuses a kept row without a caption, and a caption without features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qwenimg_dist.data.catalog import ROW_EMPTY, Ints, RunFacets
from qwenimg_dist.data.catalog_output import Kept, Output
from qwenimg_dist.data.edit_tables import edit_keys
from qwenimg_dist.data.facets import DataError
from qwenimg_dist.data.part_tables import (
    FacetTable,
    check_places,
    match_rows,
    newest,
    one_dtype,
    require,
    shapes_of,
    tar_numbers,
    to_array,
    to_strings,
)
from qwenimg_dist.schema import (
    EDIT,
    LISTING,
    RAW,
    SCAN,
    caption_key,
)


def add_texts(loaded: dict[str, FacetTable], kept: Kept, facets: RunFacets, out: Output) -> None:
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


def _captions(loaded: dict[str, FacetTable], kept: Kept, facet: FacetTable, *, edits: bool) -> _Captions:
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
    loaded: dict[str, FacetTable], listing: pa.Table, at: Ints, kept: Kept, *, edits: bool
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


def _positions(facet: FacetTable, keys: Any, row_of: Ints, kept: Kept) -> npt.NDArray[np.int32]:
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


def _fit(kept: Kept, listed: Ints) -> npt.NDArray[np.bool_]:
    """(captions,) True where no filter found fault with the caption."""
    fit = np.ones(int(listed.sum()), dtype=np.bool_)
    if "caption_faults" in kept.table.column_names:
        spread = _spread(kept.table["caption_faults"], kept, listed, "caption_faults")
        if spread is not None:
            where, faults = spread
            fit[where] = to_array(pc.equal(faults, ""), np.bool_)
    return fit


def _kinds(listing: pa.Table, at: Ints, kept: Kept, listed: Ints) -> tuple[npt.NDArray[np.int16], list[str]]:
    """(captions,) kind of every listed caption as a code; `raw` where the source named none."""
    codes, words = np.zeros(int(listed.sum()), dtype=np.int16), [RAW]
    if "caption_kinds" in listing.column_names:
        spread = _spread(listing["caption_kinds"].combine_chunks().take(pa.array(at)), kept, listed, "caption_kinds")
        if spread is not None:
            where, kinds = spread
            words = [RAW, *sorted(set(pc.unique(kinds).to_pylist()) - {RAW})]
            codes[where] = to_array(pc.index_in(kinds, pa.array(words, kinds.type)), np.int16)
    return codes, words


def _spread(column: Any, kept: Kept, listed: Ints, name: str) -> tuple[npt.NDArray[np.bool_], Any] | None:
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


def _unit_key(units: pa.Array, keys: pa.Array) -> pa.Array:
    return pc.binary_join_element_wise(pc.cast(units, pa.large_string()), keys, pa.scalar(":", pa.large_string()))
