"""Columns of all decided rows are those of the parts, newest first, and what is remembered of the source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from qwenimg_dist.data.facets import DataError, Dataset, Part
from qwenimg_dist.data.origin import FILE, Origin, read_origin, remember_origin
from qwenimg_dist.data.row_columns import load_buckets, load_pairs, load_row_columns
from qwenimg_dist.data.where import compile_where
from qwenimg_dist.schema import ROWS, Bucket
from tests.helpers.picture_dataset import make_picture_dataset


def test_every_decided_row_stands_with_its_columns(tmp_path: Path) -> None:
    made = make_picture_dataset(tmp_path, rows=40, source=False)
    columns = load_row_columns(made.dataset)
    assert columns.rows.tolist() == list(range(40))
    assert columns.columns["status"].tolist() == [made.status[row] for row in range(40)]
    assert columns.counts("reason") == {"": 32, "duplicate": 4, "unreadable": 4}
    assert columns.counts("reason", columns.is_word("status", "fault")) == {"unreadable": 4}
    assert np.isnan(columns.arrays["score_aspect"]).sum() == 4
    assert columns.arrays["bytes"].tolist() == [1000] * 40
    assert (columns.scores, columns.labels) == (["aspect"], [])
    assert columns.arrays["unit"].tolist() == [row // 16 for row in range(40)]


def test_later_parts_supersede_and_add_columns(tmp_path: Path) -> None:
    made = make_picture_dataset(tmp_path, rows=40, source=False)
    rows = made.dataset.read(Part(facet=ROWS, unit=1, part=0)).slice(2, 1)
    changed = rows.set_column(rows.column_names.index("status"), "status", pa.array(["rejected"]))
    changed = changed.set_column(rows.column_names.index("reason"), "reason", pa.array(["blurred"]))
    changed = changed.append_column("label_language", pa.array(["zh"]))
    made.dataset.commit(Part(facet=ROWS, unit=1, part=1), changed, config_hash="test")
    columns = load_row_columns(made.dataset)
    assert columns.rows.tolist() == list(range(40))
    assert columns.columns["reason"][18] == "blurred"
    assert columns.counts("label_language") == {"": 39, "zh": 1}
    mask = compile_where("language == 'zh' or reason == 'unreadable'").mask(columns.columns, 40)
    assert np.flatnonzero(mask).tolist() == [9, 18, 19, 29, 39]


def test_buckets_and_duplicates(tmp_path: Path) -> None:
    made = make_picture_dataset(tmp_path, rows=20, resolutions=(64,), source=False)
    columns = load_row_columns(made.dataset)
    held = load_buckets(made.dataset, made.latents[64], columns.rows)
    assert held.bucket[[7, 9]].tolist() == [-1, -1]
    assert held.buckets[held.bucket[0]] == Bucket(height=64, width=64)
    assert held.buckets[held.bucket[1]] == Bucket(height=48, width=80)
    (exact,) = load_pairs(made.dataset)
    assert (exact.name, exact.rows.tolist(), exact.originals.tolist()) == ("exact", [7, 17], [6, 16])


def test_a_data_set_without_decisions_has_no_columns(tmp_path: Path) -> None:
    assert len(load_row_columns(Dataset.create(tmp_path, 4)).rows) == 0


def test_the_source_is_remembered_and_a_damaged_note_is_written_anew(tmp_path: Path) -> None:
    dataset = Dataset.create(tmp_path, 4)
    assert read_origin(dataset) is None
    origin = Origin(kind="folder", root="/pictures")
    remember_origin(dataset, origin)
    assert read_origin(dataset) == origin
    written = (tmp_path / FILE).stat().st_mtime_ns
    remember_origin(dataset, origin)
    assert (tmp_path / FILE).stat().st_mtime_ns == written
    (tmp_path / FILE).write_text("{")
    with pytest.raises(DataError, match=r"source.json cannot be read"):
        read_origin(dataset)
    remember_origin(dataset, origin)
    assert read_origin(dataset) == origin
