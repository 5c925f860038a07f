"""Rows that are never trained on: those whose key hashes smallest, so that membership does not depend on order.

Place in the flow: the first generation of a run fixes the threshold, the ledger leaves out every row below it, and
validation uses the rows below it in that generation's catalog, fixed for the run.

How `max_held_out` is settled: the threshold is data.held_out of the hash space, lowered so that at most
`max_held_out` rows of the first generation fall below it, and then stays for the run. More data can therefore only
lower the threshold of a later run: what one run validates on, no earlier run on less of the same data has trained on.
Each of several data sets has a threshold of its own, so each is validated on.
With `follow`, later units also hold out their share (the first generation is small), but are not validated on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qwenimg_dist.data.catalog import Catalog, Ints
from qwenimg_dist.data.catalogs import Catalogs
from qwenimg_dist.data.where import Where
from qwenimg_dist.schema import Bucket


@dataclass(frozen=True, kw_only=True)
class HeldOutBucket:
    """The held-out samples of one bucket, ordered by text length."""

    resolution: int
    bucket: Bucket
    rows: Ints
    """(n,) row positions in `Catalogs`."""
    texts: Ints
    """(n,) text positions: always the first caption, never dropped."""
    slots: Ints
    """(n,) number of the sample in the held-out set; seeds its noise."""
    dataset: str = ""
    """Which of several data sets it is of; empty in a run with one."""


def held_out_threshold(key_hash: npt.NDArray[np.uint64], share: float, maximum: int) -> int:
    """Rows with key hash below this are held out: `share` of them, at most `maximum`."""
    below = min(int(share * 2.0**64), 2**64 - 1)
    out = np.sort(key_hash[key_hash < np.uint64(below)])
    return int(out[maximum]) if len(out) > maximum else below


def held_out_rows(catalog: Catalog, *, below: int | None, where: Where | None) -> Ints:
    """Positions of the rows that are held out (None: all are), ascending, whatever latents they have."""
    mask = catalog.key_hash < np.uint64(below) if below is not None else np.ones(catalog.num_rows, dtype=np.bool_)
    if where is not None:
        mask = mask & where.mask(catalog.columns, catalog.num_rows)
    return np.flatnonzero(mask)


def held_out_set(
    catalogs: Catalogs,
    index: int,
    *,
    below: int | None,
    where: Where | None,
    resolution: int,
    limit: int,
    first_slot: int = 0,
) -> list[HeldOutBucket]:
    """The first `limit` held-out rows (by hash) of a catalog with latents at this resolution, by bucket.

    Slots are numbered from `first_slot`. Empty if there are no such rows.
    """
    catalog = catalogs[index]
    latents = catalog.latents[resolution]
    rows = held_out_rows(catalog, below=below, where=where)
    rows = rows[latents.bucket[rows] >= 0]
    rows = rows[np.argsort(catalog.key_hash[rows], kind="stable")][:limit]
    slots = first_slot + np.arange(len(rows))
    texts = catalog.caption_text[catalog.caption_start[rows]].astype(np.int64)
    tokens = catalog.text_tokens[texts]
    found = []
    for bucket in np.unique(latents.bucket[rows]):
        mine = np.flatnonzero(latents.bucket[rows] == bucket)
        mine = mine[np.argsort(tokens[mine], kind="stable")]
        found.append(
            HeldOutBucket(
                resolution=resolution,
                bucket=latents.buckets[bucket],
                rows=rows[mine] + catalogs.row_base(index),
                texts=texts[mine] + catalogs.text_base(index),
                slots=slots[mine],
                dataset=catalogs.dataset(index),
            )
        )
    return found
