"""What a catalog needs of edits besides what it needs of pictures: keys of their texts, and their conditions' places.

Place in the flow: `catalog_build.py` asks here when the run trains on edits. The text features of an edit saw its
condition pictures, so that their keys are hashes of the instruction and the pictures' sha256; the condition latents are
further tensors of the sample, each of a size of its own, and number and sizes of them belong to the bucket. Hashing the
keys is one pass in Python, the rest is done by arrow and numpy. Refuses samples whose conditions have a gap, another
type than the target's latents, or lie outside their tar.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qwenimg_dist.data.catalog import ITEM_BYTES, Ints
from qwenimg_dist.data.part_tables import FURTHER, FacetTable, require, to_array
from qwenimg_dist.schema import Bucket, condition_name, edit_caption_key

MAX_BUCKETS: Final = 32767
"""Of a resolution class: what the catalog's 16-bit column tells apart."""
_CONDITION: Final = re.compile(r"condition_(\d+)\Z")


def edit_keys(captions: Any, pictures: Any) -> tuple[pa.LargeListArray, pa.Array]:
    """Keys of each row's instructions, in lists as `captions`, and of the empty instruction with its pictures, which is
    also the only instruction of a row that has none (reconstruction).

    `captions` and `pictures` (sha256) are arrays of lists of text, a list per row.
    """
    instructions, sha256s = captions.to_pylist(), pictures.to_pylist()
    keys = [
        [edit_caption_key(text, seen or ()) for text in texts or ("",)]
        for texts, seen in zip(instructions, sha256s, strict=True)
    ]
    empty = [edit_caption_key("", seen or ()) for seen in sha256s]
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum([len(of_row) for of_row in keys])])
    flat = pa.array([key for of_row in keys for key in of_row], pa.large_string())
    return pa.LargeListArray.from_arrays(pa.array(offsets.astype(np.int64)), flat), pa.array(empty, pa.large_string())


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The conditions of a facet's rows, K being the most that any row has."""

    sizes: Ints
    """(rows, 2 K) height and width in px of each, in order; zeros behind the last one."""
    offsets: Ints
    """(rows, K) where each begins in the sample's tar; -1 behind the last one."""

    def names(self) -> list[str]:
        return [condition_name(index) for index in range(self.offsets.shape[1])]


def conditions_of_rows(facet: FacetTable, dtype: str, channels: int) -> Conditions:
    """Raises `DataError` naming the first sample that contradicts itself."""
    num = len(facet.table)
    if FURTHER not in facet.table.column_names or not num:
        require(facet, np.zeros(num, dtype=np.bool_), "the sample has no condition picture (produce from source=edits)")
        return Conditions(sizes=np.zeros((0, 0), dtype=np.int64), offsets=np.zeros((0, 0), dtype=np.int64))
    lists = facet.table[FURTHER].combine_chunks()
    rows, places = to_array(pc.list_parent_indices(lists), np.int64), pc.list_flatten(lists)
    index = _indices(pc.struct_field(places, "name"))
    mine = np.flatnonzero(index >= 0)
    rows, index, places = rows[mine], index[mine], places.take(pa.array(mine))
    count = np.bincount(rows, minlength=num)
    require(facet, count > 0, "the sample has no condition picture (produce from source=edits)")
    offsets = np.full((num, int(count.max())), -1, dtype=np.int64)
    fits = np.ones(num, dtype=np.bool_)
    fits[rows[index >= count[rows]]] = False
    require(facet, fits, "its conditions are not numbered through")
    shapes = pc.struct_field(places, "shape")
    np.logical_and.at(fits, rows, to_array(pc.list_value_length(shapes), np.int64) == 3)
    require(facet, fits, "a condition's latents have not 3 dimensions")
    shape = to_array(pc.list_flatten(shapes), np.int64).reshape(-1, 3)
    offset, nbytes = (to_array(pc.struct_field(places, name), np.int64) for name in ("offset", "nbytes"))
    good = to_array(pc.equal(pc.struct_field(places, "dtype").cast(pa.string()), dtype), np.bool_)
    good &= (shape[:, 0] == channels) & (shape[:, 1:] > 0).all(axis=1) & (shape[:, 1:] % 2 == 0).all(axis=1)
    good &= nbytes == shape.prod(axis=1) * ITEM_BYTES[dtype]
    good &= (offset >= 0) & (offset + nbytes <= _tar_sizes(facet)[rows])
    np.logical_and.at(fits, rows, good)
    require(facet, fits, "a condition's latents are of another type than the target's, or lie outside their tar")
    offsets[rows, index] = offset
    sizes = np.zeros((num, offsets.shape[1], 2), dtype=np.int64)
    sizes[rows, index] = shape[:, 1:] * 8
    return Conditions(sizes=sizes.reshape(num, -1), offsets=offsets)


def distinct(sizes: Ints) -> tuple[Ints, Ints]:
    """Different rows of (rows, n) numbers below 2^20, ascending, and which of them each row is: `numpy.unique` of rows,
    but by integer sorts, which a million rows feel."""
    code = np.zeros(len(sizes), dtype=np.int64)
    for column in sizes.T:
        _, code = np.unique((code << 20) | column, return_inverse=True)
    _, first = np.unique(code, return_index=True)
    return sizes[first], code


def bucket_of(sizes: npt.NDArray[np.int64]) -> Bucket:
    """Of target height and width, and the conditions' `Conditions.sizes`."""
    height, width, *rest = sizes.tolist()
    pairs = zip(rest[::2], rest[1::2], strict=True)
    return Bucket(height=height, width=width, conditions=tuple(pair for pair in pairs if pair[0]))


def _indices(names: Any) -> Ints:
    """(n,) which condition each tensor is; -1: none."""
    coded = names.dictionary_encode()
    found = [_CONDITION.match(name) for name in coded.dictionary.to_pylist()]
    numbers = np.array([int(one[1]) if one else -1 for one in found] or [-1], dtype=np.int64)
    index: Ints = numbers[to_array(coded.indices, np.int64)]
    return index


def _tar_sizes(facet: FacetTable) -> Ints:
    """(rows,) bytes of the tar that a sample lies in."""
    names = pa.array(list(facet.tars), pa.large_string())
    number = to_array(pc.index_in(facet.table["tar"], names), np.int64, missing=-1)
    sizes: Ints = np.array([*facet.tars.values(), 0], dtype=np.int64)[number]
    return sizes
