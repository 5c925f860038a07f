"""Buckets, lengths and bytes are those of what was written."""

from __future__ import annotations

from pathlib import Path

from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.report.stats import stats
from qwenimg_dist.schema import Bucket
from tests.helpers.picture_dataset import TEXT, make_picture_dataset


def test_counts_are_of_admitted_rows(tmp_path: Path) -> None:
    made = make_picture_dataset(tmp_path, rows=30, resolutions=(64,), source=False)
    held = stats(made.dataset)
    kept = [row for row, status in made.status.items() if status == "kept"]
    shapes = [row % 3 for row in kept]
    assert held.buckets[made.latents[64]] == {
        Bucket(height=48, width=80): shapes.count(1),
        Bucket(height=64, width=64): shapes.count(0),
        Bucket(height=80, width=48): shapes.count(2),
    }
    assert held.captions_per_row == {1: len(kept)}


def test_text_lengths_and_disk(tmp_path: Path) -> None:
    made = make_picture_dataset(tmp_path, rows=30, source=False)
    held = stats(made.dataset)
    tokens = {
        key: number
        for part in made.dataset.parts(TEXT)
        for key, number in zip(*(made.dataset.read(part)[c].to_pylist() for c in ("key", "num_tokens")))
    }
    lengths = held.text_lengths[TEXT]
    assert (lengths.captions, lengths.max) == (len(tokens), max(tokens.values()))
    assert min(tokens.values()) <= lengths.p10 <= lengths.p50 <= lengths.p90 <= lengths.p99 <= lengths.max
    on_disk = sum(file.stat().st_size for file in made.dataset.root.rglob("*") if file.parent != made.dataset.root)
    assert sum(disk.index_bytes + disk.tar_bytes for disk in held.disk.values()) == on_disk - _folders(made.dataset)


def _folders(dataset: Dataset) -> int:
    return sum(f.stat().st_size for f in dataset.root.rglob("*") if f.is_dir() and f.parent != dataset.root)


def test_empty_data_set(tmp_path: Path) -> None:
    held = stats(Dataset.create(tmp_path, 4))
    assert [table.title for table in held.tables()] == ["Disk"]
