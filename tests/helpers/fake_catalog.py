"""Catalogs in memory, for properties of the order that need many examples and no files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwenimg_dist.data.catalog import Catalog, LatentsIndex
from qwenimg_dist.data.catalogs import CatalogFolder, Catalogs
from qwenimg_dist.data.columns import Columns
from qwenimg_dist.data.draws import hash_keys
from qwenimg_dist.schema import Bucket, row_key

BUCKETS = (Bucket(height=16, width=32), Bucket(height=32, width=16), Bucket(height=32, width=32))
EDIT_BUCKETS = (  # the same target with other conditions is another bucket
    Bucket(height=32, width=32, conditions=((32, 32),)),
    Bucket(height=32, width=32, conditions=((16, 32), (32, 32))),
)


class MemoryCatalogs(Catalogs):
    """`Catalogs` whose catalogs were never written; `names` make each one a data set of its own."""

    def __init__(self, catalogs: Sequence[Catalog], names: Sequence[str] | None = None) -> None:
        super().__init__({name: Path("nowhere") for name in names or [""]})
        self._memory = list(catalogs)
        for index, catalog in enumerate(catalogs):
            self.add(
                CatalogFolder(
                    folder=Path(str(index)),
                    num_rows=catalog.num_rows,
                    num_texts=catalog.num_texts,
                    dataset=names[index] if names else "",
                )
            )

    def _load(self, index: int) -> Catalog:
        return self._memory[index]


def memory_catalog(
    buckets: Sequence[int],
    lengths: Sequence[Sequence[int]],
    *,
    unit_size: int = 4,
    first_row: int = 0,
    resolutions: Sequence[int] = (32,),
    kinds: Sequence[Sequence[int]] | None = None,
    columns: Mapping[str, npt.NDArray[Any]] | None = None,
) -> Catalog:
    """Row i has bucket `buckets[i]` (-1: none) and captions of `lengths[i]` tokens and `kinds[i]` (none: all raw).
    Text 0 is the empty prompt."""
    num = len(buckets)
    rows = np.arange(first_row, first_row + num)
    flat = [length for row in lengths for length in row]
    keys = np.array([row_key(str(row)) for row in rows], dtype="S20") if num else np.zeros(0, dtype="S20")
    index = LatentsIndex(
        facet="latents",
        dtype="bfloat16",
        channels=16,
        buckets=BUCKETS + EDIT_BUCKETS,
        bucket=np.array(buckets, dtype=np.int16),
        tar=np.zeros(num, dtype=np.int32),
        offset=np.zeros(num, dtype=np.int64),
    )
    return Catalog(
        folder=Path("nowhere"),
        digest="",
        keys=keys,
        rows=rows,
        units=(rows // unit_size).astype(np.int32),
        key_hash=hash_keys(keys),
        caption_start=np.concatenate([[0], np.cumsum([len(row) for row in lengths])]).astype(np.int64),
        caption_text=np.arange(1, len(flat) + 1, dtype=np.int32),
        caption_kind=np.array([kind for row in kinds for kind in row] if kinds else [0] * len(flat), dtype=np.int16),
        caption_kinds=("raw", "recaption", "fused"),
        text_keys=np.zeros(len(flat) + 1, dtype="S21"),
        text_tokens=np.array([1, *flat], dtype=np.int32),
        text_tar=np.zeros(len(flat) + 1, dtype=np.int32),
        text_offset=np.zeros(len(flat) + 1, dtype=np.int64),
        text_dtype="bfloat16",
        text_width=8,
        empty_text=0,
        latents=dict.fromkeys(resolutions, index),
        tars=[],
        columns=Columns({"row": rows, **(columns or {})}, {}),
    )
