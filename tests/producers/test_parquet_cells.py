"""Pictures inside parquet are kept in bounded memory, and threads do not wait for columns that they do not read."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from producers.sources import parquet_cells
from producers.sources.base import read_bytes

GROUP_ROWS = 10
CELL_BYTES = 100_000


def picture(row: int, column: str) -> bytes:
    return f"{column}{row:03d}".encode() * (CELL_BYTES // 4)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Two columns in 8 row groups, 1 MB for each column of a group."""
    columns = {name: [picture(row, name) for row in range(8 * GROUP_ROWS)] for name in "ab"}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=GROUP_ROWS, use_dictionary=False)
    parquet_cells._chunks.clear()
    yield tmp_path
    parquet_cells._chunks.clear()


def cell(folder: Path, row: int, column: str) -> bytes:
    return read_bytes(str(folder), parquet_cells.uri_of("t.parquet", row // GROUP_ROWS, row % GROUP_ROWS, column))


def held_bytes() -> int:
    return sum(one.values.nbytes for one in parquet_cells._chunks.values() if one.values is not None)


def test_what_is_held_is_bounded_in_all_and_a_row_groups_columns_stay_together(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_cells, "MAX_BYTES", 3_000_000)
    read: list[Any] = []
    column = parquet_cells._column
    monkeypatch.setattr(parquet_cells, "_column", lambda *given: read.append(given[2:4]) or column(*given))
    for row in range(8 * GROUP_ROWS):
        for name in "ab":
            assert cell(folder, row, name) == picture(row, name)
            assert held_bytes() <= 3_100_000
    assert read == [(group, name) for group in range(8) for name in "ab"]  # each once
    assert held_bytes() > 1_900_000


def test_many_threads_read_a_column_once_and_get_their_own_cells(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    column = parquet_cells._column
    monkeypatch.setattr(parquet_cells, "_column", lambda *given: read.append(given[2:4]) or column(*given))
    with ThreadPoolExecutor(8) as pool:
        rows = [row % 20 for row in range(200)]
        found = list(pool.map(lambda row: cell(folder, row, "a"), rows))
    assert found == [picture(row, "a") for row in rows]
    assert sorted(read) == [(0, "a"), (1, "a")]


def test_a_column_does_not_wait_for_another_that_is_being_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck, go = threading.Event(), threading.Event()
    column = parquet_cells._column

    def slow(*given: Any) -> Any:
        if given[3] == "a":
            stuck.set()
            assert go.wait(20)
        return column(*given)

    monkeypatch.setattr(parquet_cells, "_column", slow)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(cell, folder, 0, "a")
        assert stuck.wait(20)
        assert pool.submit(cell, folder, 1, "b").result(20) == picture(1, "b")
        go.set()
        assert waiting.result(20) == picture(0, "a")


def test_what_could_not_be_read_is_tried_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(parquet_cells, "_column", fails)
        with pytest.raises(OSError, match="once"):
            cell(folder, 0, "a")
    assert not parquet_cells._chunks
    assert cell(folder, 0, "a") == picture(0, "a")


def fails(*given: Any) -> Any:
    raise OSError(5, "once")
