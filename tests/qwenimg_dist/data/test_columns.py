"""Text columns: codes wide enough for their words, spelt out for `where` without their longest word in every row."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from qwenimg_dist.data.catalog_build import coded, index_columns
from qwenimg_dist.data.columns import Columns
from qwenimg_dist.data.where import WhereError, compile_where

NUM_ROWS = 140_000
NUM_WORDS = 70_000


@pytest.fixture(scope="module")
def columns() -> Columns:
    """A label with 70,000 words, each of two rows, and a long one in a few rows."""
    table = pa.table(
        {
            "row": pa.array(np.arange(NUM_ROWS)),
            "unit": pa.array(np.zeros(NUM_ROWS, dtype=np.int32)),
            "width": pa.array(np.full(NUM_ROWS, 64, dtype=np.int32)),
            "height": pa.array(np.full(NUM_ROWS, 64, dtype=np.int32)),
            "status": pa.array(["kept"] * NUM_ROWS),
            "label_site": pa.array([f"w{row % NUM_WORDS}" for row in range(NUM_ROWS)]),
            "label_note": pa.array(["", "x" * 2000] * (NUM_ROWS // 2)),
        }
    )
    return Columns(*index_columns(table, None))


def selected(columns: Columns, expression: str) -> list[int]:
    return np.flatnonzero(compile_where(expression).mask(columns, NUM_ROWS)).tolist()


def test_labels_of_more_words_than_16_bits_can_number_select_their_own_rows(columns: Columns) -> None:
    assert selected(columns, "site == 'w5'") == [5, 70005]
    assert selected(columns, "site in ('w5', 'w65541')") == [5, 65541, 70005, 135541]
    assert selected(columns, "site != 'w5'") == [row for row in range(NUM_ROWS) if row not in (5, 70005)]
    assert selected(columns, "top(1, row, site)") == list(range(NUM_WORDS, NUM_ROWS))
    assert selected(columns, "site == 'w32768' and note == ''") == [32768, 102768]


@pytest.mark.parametrize(("num_words", "num_bytes"), [(32_767, 2), (32_768, 4)])
def test_codes_are_as_wide_as_their_words_need(num_words: int, num_bytes: int) -> None:
    words = [f"w{word}" for word in range(num_words)]
    codes, found = coded(pa.chunked_array([words, words[:1]]))
    assert (codes.itemsize, codes[-2], codes[-1], found) == (num_bytes, num_words - 1, 0, words)


def test_spelling_a_column_out_costs_8_bytes_a_row_whatever_its_longest_word(columns: Columns) -> None:
    assert columns["label_note"].nbytes == 8 * NUM_ROWS
    assert columns["label_note"][1] == "x" * 2000


@pytest.mark.parametrize(
    "expression", ["site == 5", "site + site == 'w5w5'", "site * 2 == 'w5w5'", "-site == 5", "site"]
)
def test_text_is_no_number(columns: Columns, expression: str) -> None:
    with pytest.raises(WhereError):
        selected(columns, expression)
