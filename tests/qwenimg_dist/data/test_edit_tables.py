"""Conditions of edits in the catalog: every contradiction is named before a run begins; buckets are told apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from qwenimg_dist.data.edit_tables import bucket_of, conditions_of_rows, distinct, edit_keys
from qwenimg_dist.data.facets import DataError
from qwenimg_dist.data.part_tables import FacetTable
from qwenimg_dist.schema import LATENTS_COLUMNS, Bucket, edit_caption_key

TAR_BYTES = 10_000


def place(name: str, height: int = 4, width: int = 4, offset: int = 2048, **changes: Any) -> dict[str, Any]:
    nbytes = 16 * height * width * 2
    entry = {"name": name, "offset": offset, "nbytes": nbytes, "dtype": "bfloat16", "shape": [16, height, width]}
    return {**entry, **changes}


def facet(*further: list[dict[str, Any]] | None) -> FacetTable:
    rows = [
        {
            "row": number,
            "key": f"key{number}",
            "bucket_height": 32,
            "bucket_width": 32,
            "tar": "a.tar",
            "offset": 512,
            "nbytes": 512,
            "dtype": "bfloat16",
            "shape": [16, 4, 4],
            "further": of_row,
        }
        for number, of_row in enumerate(further)
    ]
    table = pa.Table.from_pylist(rows, schema=LATENTS_COLUMNS)
    table = table.set_column(table.column_names.index("tar"), "tar", table["tar"].cast(pa.large_string()))
    table = table.append_column("unit", pa.array(np.zeros(len(rows), dtype=np.int32))).combine_chunks()
    return FacetTable(name="latents-32-x", table=table, pins=[], tars={"a.tar": TAR_BYTES})


def test_numbers_and_sizes_of_conditions() -> None:
    found = conditions_of_rows(
        facet(
            [place("condition_0"), place("condition_0_logvar", offset=9000)],
            [place("condition_1", 8, 4, offset=5000), place("logvar"), place("condition_0", 4, 8, offset=4000)],
        ),
        "bfloat16",
        16,
    )
    assert found.names() == ["condition_0", "condition_1"]
    assert found.offsets.tolist() == [[2048, -1], [4000, 5000]]
    assert found.sizes.tolist() == [[32, 32, 0, 0], [32, 64, 64, 32]]
    two = bucket_of(np.array([32, 16, *found.sizes[1]]))
    assert two == Bucket(height=32, width=16, conditions=((32, 64), (64, 32)))
    assert str(two) == "16x32+64x32+32x64"
    assert (two.image_tokens, two.tokens) == (2, 2 + 8 + 8)


@pytest.mark.parametrize(
    ("further", "expected"),
    [
        (None, "key1: the sample has no condition picture"),
        ([place("logvar")], "key1: the sample has no condition picture"),
        ([place("condition_1")], "key1: its conditions are not numbered through"),
        ([place("condition_0"), place("condition_2")], "key1: its conditions are not numbered through"),
        ([place("condition_0", shape=[16, 16])], "key1: a condition's latents have not 3 dimensions"),
        ([place("condition_0", shape=[16, 16]), place("condition_1")], "latents have not 3 dimensions"),
        ([place("condition_0", dtype="float32")], "key1: a condition's latents are of another type"),
        ([place("condition_0", 3, 4)], "key1: a condition's latents are of another type"),  # no whole patches
        ([place("condition_0", nbytes=7)], "key1: a condition's latents are of another type"),
        ([place("condition_0", offset=TAR_BYTES - 511)], "or lie outside their tar"),
        ([place("condition_0"), place("condition_1", offset=-1)], "or lie outside their tar"),
    ],
)
def test_what_contradicts_itself_is_named(further: list[dict[str, Any]] | None, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        conditions_of_rows(facet([place("condition_0")], further, [place("condition_0")]), "bfloat16", 16)
    conditions_of_rows(facet([place("condition_0", offset=TAR_BYTES - 512)]), "bfloat16", 16)


def test_distinct_rows_are_those_of_numpy() -> None:
    rows = np.random.default_rng(0).integers(0, 3, (500, 4)) * 32
    sizes, code = distinct(rows)
    assert np.array_equal(sizes, np.unique(rows, axis=0))
    assert np.array_equal(sizes[code], rows)


def test_keys_are_of_words_and_pictures() -> None:
    captions = pa.array([["a", "b"], None, ["a"]], pa.large_list(pa.large_string()))
    pictures = pa.array([["1", "2"], ["3"], ["3"]], pa.large_list(pa.large_string()))
    keys, empty = edit_keys(captions, pictures)
    assert keys.to_pylist() == [
        [edit_caption_key("a", ["1", "2"]), edit_caption_key("b", ["1", "2"])],
        [edit_caption_key("", ["3"])],
        [edit_caption_key("a", ["3"])],
    ]
    assert empty.to_pylist() == [edit_caption_key("", one) for one in (["1", "2"], ["3"], ["3"])]
