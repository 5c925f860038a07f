"""The index columns of every decided row of a data set, kept or not: for looking at it as a whole.

Place in the flow: `data inspect` and `data stats` select, count and draw from these; training compiles a catalog of the
kept rows instead. Named as `where` names them, so an expression selects here what it selects there. All work per row
is done by arrow and numpy. Memory: about 40 bytes per row, and 4 more per score, 2 per label (4 of more than
32,767 words).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qwenimg_dist.data.catalog import Ints
from qwenimg_dist.data.catalog_build import coded, index_columns
from qwenimg_dist.data.columns import Columns
from qwenimg_dist.data.facets import Dataset, Part
from qwenimg_dist.data.part_tables import match_rows, newest, to_array
from qwenimg_dist.data.pins import parallel
from qwenimg_dist.schema import LABEL_PREFIX, ROWS, SCAN, SCORE_PREFIX, Bucket, is_dedup

NEAR_FACET: Final = re.compile(r"^near-(\d+)(?:-(\w+))?$")
"""Facet with near duplicates: distance, and a fingerprint of which rows took part."""

_OF_SINGLE_ROWS: Final = ("key", "detail", "caption_faults")


@dataclass(frozen=True, kw_only=True)
class ClassBuckets:
    """Buckets of one latents facet over the rows."""

    buckets: tuple[Bucket, ...]
    bucket: npt.NDArray[np.int16]
    """(rows,) index into `buckets`; -1 where the facet has no latents of the row."""


@dataclass(frozen=True, kw_only=True)
class RowColumns:
    """Arrays over the decided rows, ascending by row number."""

    rows: Ints
    arrays: Mapping[str, npt.NDArray[Any]]
    """Numbers, and text as codes; `columns` spells these out."""
    words: Mapping[str, list[str]]

    @property
    def columns(self) -> Columns:
        """What `where` takes; text is spelt out when asked for."""
        return Columns(self.arrays, self.words)

    @property
    def scores(self) -> list[str]:
        """Names without prefix."""
        return sorted(name.removeprefix(SCORE_PREFIX) for name in self.arrays if name.startswith(SCORE_PREFIX))

    @property
    def labels(self) -> list[str]:
        """Names without prefix."""
        return sorted(name.removeprefix(LABEL_PREFIX) for name in self.arrays if name.startswith(LABEL_PREFIX))

    def is_word(self, column: str, word: str) -> npt.NDArray[np.bool_]:
        """(rows,) where a text column has this word."""
        words = self.words[column]
        same: npt.NDArray[np.bool_] = self.arrays[column] == (words.index(word) if word in words else -1)
        return same

    def counts(self, column: str, mask: npt.NDArray[np.bool_] | None = None) -> dict[str, int]:
        """Word -> rows, most frequent first."""
        codes = self.arrays[column] if mask is None else self.arrays[column][mask]
        counted: list[int] = np.bincount(codes, minlength=len(self.words[column])).tolist()
        pairs = ((word, count) for word, count in zip(self.words[column], counted, strict=True) if count)
        return dict(sorted(pairs, key=lambda item: (-item[1], item[0])))


def load_row_columns(dataset: Dataset) -> RowColumns:
    """Read the `rows` and `scan` facets. Raises `DataError` naming a part that cannot be read."""
    table = _facet(dataset, ROWS)
    if table is None:
        return RowColumns(rows=np.empty(0, dtype=np.int64), arrays={}, words={})
    units = pa.array((to_array(table["row"], np.int64) // dataset.unit_size).astype(np.int32))
    scan = _facet(dataset, SCAN, ["row", "bytes", "format"])
    arrays, words = index_columns(table.append_column("unit", units), scan)
    arrays["reason"], words["reason"] = coded(table["reason"])
    return RowColumns(rows=arrays["row"], arrays=arrays, words=words)


def load_buckets(dataset: Dataset, facet: str, rows: Ints) -> ClassBuckets:
    """The buckets of a latents facet, for `rows`."""
    bucket = np.full(len(rows), -1, dtype=np.int16)
    table = _facet(dataset, facet, ["row", "bucket_height", "bucket_width"])
    if table is None:
        return ClassBuckets(buckets=(), bucket=bucket)
    height, width = (to_array(table[f"bucket_{side}"], np.int64) for side in ("height", "width"))
    sizes, inverse = np.unique((height << 32) + width, return_inverse=True)
    at, found = match_rows(facet, table, rows)
    bucket[found] = inverse[at[found]]
    buckets = tuple(Bucket(height=int(size >> 32), width=int(size & 0xFFFFFFFF)) for size in sizes)
    return ClassBuckets(buckets=buckets, bucket=bucket)


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Rows that are duplicates of another row; ascending by row."""

    name: str
    """`exact`, or `near` with the greatest distance looked for, and its facet's fingerprint where there are several."""
    rows: Ints
    originals: Ints
    distance: Ints
    """Of the perceptual hashes; 0 for exact ones."""


def load_pairs(dataset: Dataset) -> list[Pairs]:
    """Exact duplicates, and near ones where a facet has them."""
    found = []
    facets = dataset.facets()
    num_exact = sum(map(is_dedup, facets))
    distances = [near[1] for facet in facets if (near := NEAR_FACET.match(facet))]
    for facet in facets:
        near = NEAR_FACET.match(facet)
        if near is None and not is_dedup(facet):
            continue
        column = "duplicate_of" if near is None else "near_duplicate_of"
        table = _facet(dataset, facet, ["row", column] if near is None else ["row", column, "distance"])
        if table is None:
            continue
        originals = to_array(table[column], np.int64, missing=-1)
        mask = originals >= 0
        distance = to_array(table["distance"], np.int64, missing=0) if near is not None else np.zeros_like(originals)
        name = "exact" if near is None else f"near, up to {near[1]}"
        if near is None and num_exact > 1:
            name += f" ({facet})"
        if near is not None and distances.count(near[1]) > 1:
            name += f" ({near[2]})"
        rows = to_array(table["row"], np.int64)
        found.append(Pairs(name=name, rows=rows[mask], originals=originals[mask], distance=distance[mask]))
    return found


def _facet(dataset: Dataset, facet: str, columns: Sequence[str] | None = None) -> pa.Table | None:
    """All parts of a facet, newest rows only; None if there is none. What only single rows are asked for is left."""

    def read(part: Part) -> pa.Table:
        table = dataset.read(part, columns).replace_schema_metadata(None)
        return table.drop_columns([name for name in _OF_SINGLE_ROWS if name in table.column_names])

    tables = parallel(read, dataset.parts(facet))
    return newest(pa.concat_tables(tables, promote_options="default")) if tables else None
