"""Latents of a catalog: bucket and place of every kept row at one resolution class.

Place in the flow: `catalog_build.py` calls this for each class of the run. Refuses tensors whose shape is not their
bucket's, and more combinations of sizes than can be told apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qwenimg_dist.data.catalog import further_array
from qwenimg_dist.data.catalog_output import Kept, Output
from qwenimg_dist.data.edit_tables import MAX_BUCKETS, bucket_of, conditions_of_rows, distinct
from qwenimg_dist.data.facets import DataError
from qwenimg_dist.data.part_tables import (
    FacetTable,
    check_places,
    further_offsets,
    match_rows,
    newest,
    one_dtype,
    require,
    shapes_of,
    tar_numbers,
    to_array,
)


def add_latents(
    facet: FacetTable, kept: Kept, resolution: int, out: Output, *, further: Sequence[str], edits: bool
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


def add_drawn(kept: Kept, resolution: int, out: Output) -> dict[str, Any]:
    """A class without latents: the run draws every row. The one bucket stands for all: shapes are the ledger's."""
    prefix = f"latents-{resolution}-"
    out.arrays[f"{prefix}bucket"] = np.zeros(len(kept.rows), dtype=np.int16)
    out.arrays[f"{prefix}tar"] = np.full(len(kept.rows), -1, dtype=np.int32)
    out.arrays[f"{prefix}offset"] = np.full(len(kept.rows), -1, dtype=np.int64)
    return {"facet": "", "dtype": "float32", "channels": 16, "further": [], "buckets": [[resolution, resolution]]}
