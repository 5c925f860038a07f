"""A small data set with its source folder, written through `Dataset` and `ShardWriter` as a producer would.

Eight of ten pictures are fine; of every ten, one is a duplicate of an earlier row (`duplicate`) and one is no picture
(`unreadable`). Features and latents are random, at the true shapes of their buckets.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from qwenimg_dist.data.facets import Dataset, Part
from qwenimg_dist.data.shards import RawTensor, ShardWriter
from qwenimg_dist.schema import (
    DEDUP,
    DEDUP_COLUMNS,
    LATENTS_COLUMNS,
    LISTING,
    LISTING_COLUMNS,
    ROWS,
    ROWS_COLUMNS,
    SCAN,
    SCAN_COLUMNS,
    TEXT_COLUMNS,
    caption_key,
    latents_facet,
    row_key,
    text_facet,
)

TEXT = text_facet("0123456789ab")
SIZES = {0: (96, 96), 1: (128, 80), 2: (80, 128)}
COLOURS = ("red", "green", "blue", "orange", "purple", "teal")


@dataclass
class PictureDataset:
    """What was written, for tests to compare with."""

    dataset: Dataset
    source: Path
    latents: dict[int, str]
    status: dict[int, str] = field(default_factory=dict)

    def copy(self, root: Path) -> PictureDataset:
        """The same data set in another place, to be damaged there."""
        shutil.copytree(self.dataset.root, root / "data")
        return replace(self, dataset=Dataset(root / "data", self.dataset.unit_size))


def caption_of(row: int) -> str:
    return f"a {COLOURS[row % len(COLOURS)]} disc on grey <b>ground</b> & more, number {row % 7}"


def make_picture_dataset(
    root: Path, *, rows: int = 40, unit_size: int = 16, resolutions: tuple[int, ...] = (64, 96), source: bool = True
) -> PictureDataset:
    """Write `rows` rows; with `source=False` the pictures' files are left out."""
    made = PictureDataset(
        dataset=Dataset.create(root / "data", unit_size),
        source=root / "source",
        latents={r: latents_facet(r, "ba9876543210") for r in resolutions},
    )
    made.source.mkdir(parents=True, exist_ok=True)
    for unit in range(-(-rows // unit_size)):
        _write_unit(made, unit, range(unit * unit_size, min(rows, (unit + 1) * unit_size)), source)
    return made


def _write_unit(made: PictureDataset, unit: int, rows: range, source: bool) -> None:
    listing, scan, dedup, decided = [], [], [], []
    for row in rows:
        uri = f"pictures/{row:05d}.jpg"
        width, height = SIZES[row % 3]
        bad, twin = row % 10 == 9, row % 10 == 7
        if source:
            _draw(made.source / uri, row - 1 if twin else row, width, height, bad)
        listing.append({"row": row, "key": row_key(uri), "uri": uri, "captions": [caption_of(row)]})
        scan.append(
            {
                "row": row,
                "bytes": 1000,
                "sha256": f"{row:064x}",
                "width": 0 if bad else width,
                "height": 0 if bad else height,
                "orientation": 1,
                "fault": "unreadable" if bad else None,
            }
        )
        dedup.append({"row": row, "duplicate_of": row - 1 if twin else -1})
        status, reason = ("fault", "unreadable") if bad else ("rejected", "duplicate") if twin else ("kept", "")
        made.status[row] = status
        decided.append(
            {
                "row": row,
                "key": row_key(uri),
                "status": status,
                "reason": reason,
                "detail": f"same picture as row {row - 1}" if twin else "",
                "width": 0 if bad else width,
                "height": 0 if bad else height,
                "score_aspect": None if bad else width / height,
            }
        )
    dataset = made.dataset
    _commit(dataset, Part(facet=LISTING, unit=unit, part=0), listing, LISTING_COLUMNS)
    _commit(dataset, Part(facet=SCAN, unit=unit, part=0), scan, SCAN_COLUMNS)
    _commit(dataset, Part(facet=DEDUP, unit=unit, part=0), dedup, DEDUP_COLUMNS)
    kept = [row for row in rows if made.status[row] == "kept"]
    _write_text(dataset, unit, kept)
    left_out = {
        str(resolution): len(kept) - _write_latents(dataset, Part(facet=facet, unit=unit, part=0), resolution, kept)
        for resolution, facet in made.latents.items()
    }
    inputs = dict.fromkeys([LISTING, SCAN, DEDUP, TEXT, *made.latents.values()], 1)
    schema = ROWS_COLUMNS.append(pa.field("score_aspect", pa.float32()))
    _commit(
        dataset, Part(facet=ROWS, unit=unit, part=0), decided, schema, extra={"inputs": inputs, "left_out": left_out}
    )


def _write_text(dataset: Dataset, unit: int, rows: list[int]) -> None:
    part = Part(facet=TEXT, unit=unit, part=0)
    random = np.random.default_rng(unit)
    index: list[dict[str, Any]] = []
    with ShardWriter(dataset, part, max_shard_bytes=10**6) as writer:
        for caption in sorted({"", *(caption_of(row) for row in rows)}):
            tokens = 5 + len(caption.split())
            features = RawTensor(data=random.standard_normal((tokens, 8)).astype(np.float32), dtype="float32")
            key = caption_key(caption)
            place = writer.write(key, {"caption": caption, "num_tokens": tokens}, {"features": features})
            index.append({"key": key, "num_tokens": tokens, **place.columns()})
        tars = writer.close()
    table = pa.Table.from_pylist(index, schema=TEXT_COLUMNS)
    dataset.commit(part, table, config_hash="test", tars=tars)


def _write_latents(dataset: Dataset, part: Part, resolution: int, rows: list[int]) -> int:
    """Returns the rows that were large enough."""
    random = np.random.default_rng(part.unit)
    index: list[dict[str, Any]] = []
    with ShardWriter(dataset, part, max_shard_bytes=20_000) as writer:
        for row in rows:
            width, height = SIZES[row % 3]
            if min(width, height) < resolution - 16:
                continue
            bucket_h, bucket_w = (resolution, resolution) if row % 3 == 0 else (resolution - 16, resolution + 16)
            if row % 3 == 2:
                bucket_h, bucket_w = bucket_w, bucket_h
            scale = max(bucket_h / height, bucket_w / width)
            resized_h, resized_w = round(height * scale), round(width * scale)
            mean = RawTensor(
                data=random.standard_normal((16, bucket_h // 8, bucket_w // 8)).astype(np.float32), dtype="float32"
            )
            key = row_key(f"pictures/{row:05d}.jpg")
            place = writer.write(key, {"row": row}, {"mean": mean})
            index.append(
                {
                    "row": row,
                    "key": key,
                    "bucket_height": bucket_h,
                    "bucket_width": bucket_w,
                    "resized_height": resized_h,
                    "resized_width": resized_w,
                    "crop_top": (resized_h - bucket_h) // 2,
                    "crop_left": (resized_w - bucket_w) // 2,
                    **place.columns(),
                }
            )
        tars = writer.close()
    dataset.commit(part, pa.Table.from_pylist(index, schema=LATENTS_COLUMNS), config_hash="test", tars=tars)
    return len(index)


def _draw(file: Path, row: int, width: int, height: int, bad: bool) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if bad:
        file.write_bytes(b"not a picture")
        return
    picture = Image.new("RGB", (width, height), "grey")
    draw = ImageDraw.Draw(picture)
    x, y = width / 2 + (row % 5) * 4 - 8, height / 2
    draw.ellipse((x - 24, y - 24, x + 24, y + 24), fill=COLOURS[row % len(COLOURS)])
    picture.save(file, quality=85)


def _commit(
    dataset: Dataset, part: Part, rows: list[dict[str, Any]], schema: pa.Schema, extra: dict[str, Any] | None = None
) -> None:
    dataset.commit(part, pa.Table.from_pylist(rows, schema=schema), config_hash="test", extra=extra)
