"""Tables of reference errors: every pair in one block once, whole or not at all, found again by row and text."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_catalog import MemoryCatalogs, memory_catalog

import consumers.reference_errors as module
from consumers.reference_errors import Entries, ErrorTable, ReferenceErrors, entries_of
from qwenimg_dist import patience
from qwenimg_dist.data.facets import DataError
from qwenimg_dist.patience import StorageAwayError

DRAWS = 3
BUCKETS_OF_ROWS = ([0, 1, 2, 1, -1, 0, 1], [2, 2, 0])
LENGTHS = ([[3], [4, 5], [3], [2], [2], [7], [5]], [[4], [1, 2, 3], [6]])


@pytest.fixture
def catalogs() -> MemoryCatalogs:
    made = [memory_catalog(rows, texts) for rows, texts in zip(BUCKETS_OF_ROWS, LENGTHS, strict=True)]
    return MemoryCatalogs(made, ["a", "b"])


def entries(catalogs: MemoryCatalogs, index: int) -> Entries:
    catalog = catalogs[index]
    return entries_of(catalog, index, 32, np.ones(catalog.num_rows, dtype=np.bool_))


def numbers(one: Entries) -> np.ndarray:
    """(entries, DRAWS, 2), another for every caption and draw."""
    base = 1000.0 * one.catalog + one.captions[:, None, None]
    return (base + np.arange(DRAWS)[:, None] / 10 + np.array([0, 0.01])).astype(np.float32)


def write(table: ErrorTable, blocks: list[int]) -> None:
    for number in blocks:
        table.write(number, numbers(table.entries)[table.entries.blocks()[number]])


def test_every_caption_with_latents_is_an_entry_once_and_blocks_have_one_bucket(
    catalogs: MemoryCatalogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", 2)
    one = entries(catalogs, 0)
    assert sorted(one.captions.tolist()) == [0, 1, 2, 3, 4, 6, 7]  # caption 5 is of the row without latents
    for where in one.blocks():
        assert where.stop - where.start <= 2
        assert len(set(one.bucket[where].tolist())) == 1
    assert [at for where in one.blocks() for at in range(where.start, where.stop)] == list(range(len(one)))
    some = entries_of(catalogs[0], 0, 32, np.arange(7) == 1)
    assert some.captions.tolist() == [1, 2]
    assert entries_of(catalogs[0], 0, 32, np.zeros(7, dtype=np.bool_)).blocks() == []


def test_a_table_is_usable_when_whole_and_goes_on_where_it_was(
    catalogs: MemoryCatalogs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", 2)
    one = entries(catalogs, 0)

    def table(draws: int = DRAWS, reference: str = "abc") -> ErrorTable:
        return ErrorTable(tmp_path, {"reference": reference, "draws": draws}, one, draws)

    everything = table().missing()
    write(table(), everything[:2])
    assert table().missing() == everything[2:]
    with pytest.raises(DataError, match=r"errors.npy cannot be read"):
        table().open()
    assert table(reference="other").missing() == everything
    write(table(), everything[2:])
    table().join()
    table().join()
    assert table().complete
    assert table().missing() == []
    assert sorted(file.name for file in table().folder.iterdir()) == ["about.json", "errors.npy"]
    assert np.array_equal(table().open(), numbers(one))


def test_errors_are_found_by_row_and_text_over_data_sets(catalogs: MemoryCatalogs, tmp_path: Path) -> None:
    tables = []
    for index in range(2):
        tables.append(ErrorTable(tmp_path, {"data": index}, entries(catalogs, index), DRAWS))
        write(tables[-1], tables[-1].missing())
        tables[-1].join()
    reference = ReferenceErrors(catalogs, tables)
    # Row 1 of `a` with its second caption, row 1 of `b` with its third, row 6 of `a`. Caption c is text c + 1.
    rows = np.array([1, catalogs.row_base(1) + 1, 6])
    texts = np.array([3, catalogs.text_base(1) + 4, 8])
    found = reference.of(rows, texts, 32)
    assert found[:, 0, 0].tolist() == [2.0, 1003.0, 7.0]
    assert np.allclose(found[1, 2], [1003.2, 1003.21])
    with pytest.raises(DataError, match="has no reference errors of pair"):
        reference.of(rows[:1], np.array([0]), 32)  # the empty prompt
    with pytest.raises(DataError, match="has no reference errors of pair"):
        reference.of(np.array([4]), np.array([6]), 32)  # no latents


def test_other_pairs_than_the_tables_are_refused(catalogs: MemoryCatalogs, tmp_path: Path) -> None:
    table = ErrorTable(tmp_path, {}, entries(catalogs, 0), DRAWS)
    write(table, table.missing())
    table.join()
    with pytest.raises(DataError, match="these pairs have"):
        ErrorTable(tmp_path, {}, entries(catalogs, 1), DRAWS).open()


def test_a_table_that_is_away_is_not_damaged_and_none_is_removed_lightly(
    catalogs: MemoryCatalogs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = ErrorTable(tmp_path, {}, entries(catalogs, 0), DRAWS)
    write(table, table.missing())
    table.join()
    real, left = np.load, [2]

    def stale(file: Path, **options: Any) -> Any:
        if left[0] > 0:
            left[0] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(file))
        return real(file, **options)

    monkeypatch.setattr(np, "load", stale)
    monkeypatch.setattr(patience, "PAUSES_S", (0.0,) * 3)
    assert np.array_equal(table.open(), numbers(table.entries))
    assert left == [0]
    left[0] = 99
    with pytest.raises(StorageAwayError, match=r"errors\.npy: Stale file handle"):
        table.open()
    left[0] = 0
    file = table.folder / "errors.npy"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"restore it\. Remove the folder only where no run .* has made a step"):
        table.open()
