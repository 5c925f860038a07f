"""Compile a catalog from pinned parts: parquet of many units -> a folder of `.npy` columns, committed by a rename.

Place in the flow: rank 0 calls `build_catalog` once per generation; see `catalog.py` for the reading side. All work
per row is done by arrow and numpy: a million rows take well under a minute. Refuses parts that contradict each other
(a kept row without text features, a tensor of another shape than its bucket), naming file and key.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qwenimg_dist.data.catalog import CATALOG_VERSION, Ints, RunFacets
from qwenimg_dist.data.catalog_captions import add_texts
from qwenimg_dist.data.catalog_latents import add_drawn, add_latents
from qwenimg_dist.data.catalog_output import Kept, Output, commit
from qwenimg_dist.data.catalogs import CatalogFolder
from qwenimg_dist.data.draws import hash_keys
from qwenimg_dist.data.facets import DataError, Dataset
from qwenimg_dist.data.part_tables import (
    FacetTable,
    load_facets,
    match_rows,
    newest,
    to_array,
    to_strings,
)
from qwenimg_dist.data.pins import (
    UnitPins,
    check_tar,
    digest_of,
    parallel,
)
from qwenimg_dist.data.takedown import NOTHING, Takedown, rows_taken_down
from qwenimg_dist.schema import (
    EDIT,
    IMAGE,
    LABEL_PREFIX,
    LISTING,
    PREFERENCE,
    PROMPT,
    ROWS,
    SCAN,
    SCORE_PREFIX,
    Kind,
)


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
    out = Output()
    taken_down = rows_taken_down(dataset, units, takedown)
    kept = _kept_rows(loaded[ROWS], out, taken_down.rows)
    out.head["taken_down"] = list(taken_down.matched)
    _add_columns(loaded, kept, out)
    _add_kind(loaded, kept, facets.kind, dataset, out)
    add_texts(loaded, kept, facets, out)
    out.head["latents"] = {
        str(resolution): add_latents(loaded[facet], kept, resolution, out, further=facets.further, edits=edits)
        for resolution, facet in sorted(facets.latents.items())
    }
    out.head["latents"] |= {str(resolution): add_drawn(kept, resolution, out) for resolution in facets.drawn}
    if facets.kind == PROMPT:
        _add_prompts(loaded[LISTING], kept, out)
    parallel(lambda tar: check_tar(dataset, *tar), out.tars)
    pins = [pin for facet in loaded.values() for pin in facet.pins]
    out.head |= {"version": CATALOG_VERSION, "digest": digest_of(pins, takedown.digest), "tars": out.tars}
    commit(out, pins, folder)
    return CatalogFolder(folder=folder, num_rows=len(kept.rows), num_texts=len(out.arrays["text_tokens"]))


def _kept_rows(facet: FacetTable, out: Output, taken_down: Ints) -> Kept:
    table = newest(facet.table)
    table = table.filter(pc.equal(table["status"], "kept"))
    if len(taken_down):
        table = table.filter(pc.invert(pc.is_in(table["row"], value_set=pa.array(taken_down))))
    kept = Kept(
        rows=to_array(table["row"], np.int64),
        units=to_array(table["unit"], np.int32),
        keys=to_strings(table["key"]),
        table=table,
    )
    out.arrays |= {"keys": kept.keys, "rows": kept.rows, "units": kept.units, "key_hash": hash_keys(kept.keys)}
    return kept


def _add_columns(loaded: dict[str, FacetTable], kept: Kept, out: Output) -> None:
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


def _add_kind(loaded: dict[str, FacetTable], kept: Kept, kind: Kind, dataset: Dataset, out: Output) -> None:
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


def _add_prompts(facet: FacetTable, kept: Kept, out: Output) -> None:
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
