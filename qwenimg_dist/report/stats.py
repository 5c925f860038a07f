"""What a data set holds beyond its funnel: sizes, aspects, buckets, text lengths, captions, labels, bytes per facet.

Place in the flow: `data stats` and the run report show it. Reads committed parts only; all work per row is done by
arrow and numpy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.data.row_columns import RowColumns, load_row_columns
from qwenimg_dist.report.funnel import LATENTS_PREFIX, TEXT_PREFIX, facet_labels, latents_order
from qwenimg_dist.report.table import Table, show_bytes, show_share
from qwenimg_dist.schema import LABEL_PREFIX, LISTING, ROWS, Bucket

_ASPECTS: Final = ("1:4", "1:3", "1:2", "9:16", "2:3", "3:4", "1:1", "4:3", "3:2", "16:9", "2:1", "3:1", "4:1")
"""Ascending."""


@dataclass(frozen=True, kw_only=True)
class TextLengths:
    """Tokens per distinct caption, as stored (template suffix included); the empty prompt is one of them."""

    captions: int
    p10: int
    p50: int
    p90: int
    p99: int
    max: int


@dataclass(frozen=True, kw_only=True)
class Disk:
    """What a facet takes up."""

    index_bytes: int
    tar_bytes: int
    files: int

    @property
    def all_bytes(self) -> int:
        return self.index_bytes + self.tar_bytes


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A distribution over rows."""

    min: float
    p10: float
    p50: float
    p90: float
    max: float


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Counts are of admitted rows."""

    buckets: dict[str, dict[Bucket, int]]
    """Latents facet -> bucket -> rows."""
    text_lengths: dict[str, TextLengths]
    """Text facet -> distribution."""
    captions_per_row: dict[int, int]
    """Number of captions -> rows."""
    disk: dict[str, Disk]
    """Facet -> what lies in its folder, leftovers included."""
    sizes: dict[str, Spread]
    """What is measured of the pictures -> its distribution."""
    shapes: dict[str, int]
    """Aspect (`3:2`) -> rows that are nearest to it."""
    labels: dict[str, dict[str, int]]
    """Label -> word -> rows."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a bucket is named WIDTHxHEIGHT."""
        return {
            "buckets": {
                facet: {str(bucket): n for bucket, n in counts.items()} for facet, counts in self.buckets.items()
            },
            "text_lengths": {facet: vars(lengths) for facet, lengths in self.text_lengths.items()},
            "captions_per_row": {str(number): rows for number, rows in self.captions_per_row.items()},
            "disk": {facet: vars(disk) for facet, disk in self.disk.items()},
            "sizes": {name: vars(spread) for name, spread in self.sizes.items()},
            "shapes": dict(self.shapes),
            "labels": {name: dict(counts) for name, counts in self.labels.items()},
        }

    def tables(self) -> list[Table]:
        """One per kind; what there is nothing of is left out."""
        labels = facet_labels(self.buckets)
        buckets = tuple(
            (labels[facet], str(bucket), bucket.image_tokens, count, show_share(count, sum(counts.values())))
            for facet, counts in self.buckets.items()
            for bucket, count in counts.items()
        )
        texts = tuple((facet, t.captions, t.p10, t.p50, t.p90, t.p99, t.max) for facet, t in self.text_lengths.items())
        captions = tuple(self.captions_per_row.items())
        sizes = tuple((name, s.min, s.p10, s.p50, s.p90, s.max) for name, s in self.sizes.items())
        rows = sum(self.shapes.values())
        shapes = tuple((name, count, show_share(count, rows)) for name, count in self.shapes.items())
        words = tuple(
            (name, word or "(none)", count, show_share(count, sum(counts.values())))
            for name, counts in self.labels.items()
            if set(counts) != {""}
            for word, count in counts.items()
        )
        columns = ("facet", "captions", "p10", "p50", "p90", "p99", "max")
        tables = [
            Table(title="Sizes of admitted pictures", columns=("", "min", "p10", "p50", "p90", "max"), rows=sizes),
            Table(title="Aspects", columns=("nearest to", "rows", "share"), rows=shapes),
            Table(title="Buckets", columns=("class", "bucket", "image tokens", "rows", "share"), rows=buckets),
            Table(title="Text lengths (tokens per distinct caption)", columns=columns, rows=texts),
            Table(title="Captions per picture", columns=("captions", "rows"), rows=captions),
            Table(title="Labels", columns=("label", "word", "rows", "share"), rows=words),
            self._disk_table(rows),
        ]
        return [table for table in tables if table.rows]

    def _disk_table(self, rows: int) -> Table:
        """By kind, the facets of each below it."""
        kinds: dict[str, list[tuple[str, Disk]]] = {}
        for facet, disk in self.disk.items():
            kinds.setdefault(facet.partition("-")[0], []).append((facet, disk))
        total = sum(disk.all_bytes for disk in self.disk.values())
        lines: list[tuple[str, ...]] = []
        for kind, facets in sorted(kinds.items(), key=lambda item: -sum(disk.all_bytes for _, disk in item[1])):
            lines += [_disk_line(kind, facet, [disk], total, rows) for facet, disk in facets]
        lines.append(_disk_line("all", "", list(self.disk.values()), total, rows))
        columns = ("kind", "facet", "files", "index", "tars", "share", "per admitted row")
        return Table(title="Disk", columns=columns, rows=tuple(lines))


def stats(dataset: Dataset, columns: RowColumns | None = None) -> Stats:
    """Read a data set's committed parts; `columns` where they are at hand. Raises `DataError` naming a part that
    cannot be read."""
    columns = columns if columns is not None else load_row_columns(dataset)
    kept = columns.is_word("status", "kept") if len(columns.rows) else np.zeros(0, dtype=np.bool_)
    facets = dataset.facets()
    latents = sorted((name for name in facets if name.startswith(LATENTS_PREFIX)), key=latents_order)
    buckets, captions = _count_rows(dataset, latents)
    return Stats(
        buckets={facet: dict(sorted(counts.items())) for facet, counts in buckets.items()},
        text_lengths={
            facet: lengths
            for facet in facets
            if facet.startswith(TEXT_PREFIX) and (lengths := _text_lengths(dataset, facet)) is not None
        },
        captions_per_row=dict(sorted(captions.items())),
        disk={facet: _disk(dataset, facet) for facet in facets},
        sizes=_spreads(columns, kept),
        shapes=_shapes(columns, kept),
        labels={name: columns.counts(f"{LABEL_PREFIX}{name}", kept) for name in columns.labels},
    )


def _count_rows(dataset: Dataset, latents: list[str]) -> tuple[dict[str, Counter[Bucket]], Counter[int]]:
    parts = {facet: dataset.parts_by_unit(facet) for facet in (LISTING, ROWS, *latents)}
    buckets: dict[str, Counter[Bucket]] = {facet: Counter() for facet in latents}
    captions: Counter[int] = Counter()
    for unit in sorted(parts[ROWS]):
        rows = dataset.merge(parts[ROWS][unit], ["row", "status"])
        kept = rows.filter(pc.equal(rows["status"], "kept"))["row"].combine_chunks()
        if unit in parts[LISTING]:
            listing = dataset.merge(parts[LISTING][unit], ["row", "captions"])
            mine = listing.filter(pc.is_in(listing["row"], value_set=kept))
            lengths = pc.fill_null(pc.list_value_length(mine["captions"]), 0)
            captions.update({entry["values"]: entry["counts"] for entry in pc.value_counts(lengths).to_pylist()})
        for facet in latents:
            if unit in parts[facet]:
                places = dataset.merge(parts[facet][unit], ["row", "bucket_height", "bucket_width"])
                places = places.filter(pc.is_in(places["row"], value_set=kept))
                sides = places.group_by(["bucket_height", "bucket_width"]).aggregate([([], "count_all")])
                for height, width, count in zip(*(sides[name].to_pylist() for name in sides.column_names)):
                    buckets[facet][Bucket(height=height, width=width)] += count
    return buckets, captions


def _text_lengths(dataset: Dataset, facet: str) -> TextLengths | None:
    parts = dataset.parts(facet)
    if not parts:
        return None
    # A caption of several units is stored with each, and counted once.
    table = pa.concat_tables([dataset.read(part, ["key", "num_tokens"]) for part in parts])
    tokens = table.group_by("key").aggregate([("num_tokens", "max")])["num_tokens_max"].to_numpy()
    if not len(tokens):
        return None
    p10, p50, p90, p99 = np.percentile(tokens, (10, 50, 90, 99), method="nearest").tolist()
    longest = int(tokens.max())
    return TextLengths(captions=len(tokens), p10=int(p10), p50=int(p50), p90=int(p90), p99=int(p99), max=longest)


def _spreads(columns: RowColumns, kept: npt.NDArray[np.bool_]) -> dict[str, Spread]:
    if not kept.any():
        return {}
    width, height = (columns.arrays[side][kept].astype(np.float64) for side in ("width", "height"))
    measured = {
        "width (px)": width,
        "height (px)": height,
        "short side (px)": np.minimum(width, height),
        "megapixels": width * height / 1e6,
        "aspect (width / height)": width / np.maximum(height, 1),
    }
    return {name: _spread(values) for name, values in measured.items()}


def _spread(values: npt.NDArray[np.float64]) -> Spread:
    low, p10, p50, p90, high = np.percentile(values, (0, 10, 50, 90, 100), method="nearest").tolist()
    return Spread(min=low, p10=p10, p50=p50, p90=p90, max=high)


def _shapes(columns: RowColumns, kept: npt.NDArray[np.bool_]) -> dict[str, int]:
    """Rows by the plain aspect that is nearest, on a logarithmic scale."""
    if not kept.any():
        return {}
    names = np.array(_ASPECTS)
    ratios = np.log([int(w) / int(h) for w, h in (name.split(":") for name in _ASPECTS)])
    aspect = np.log(np.maximum(columns.arrays["aspect"][kept], 1e-6))
    nearest = np.searchsorted((ratios[1:] + ratios[:-1]) / 2, aspect)
    counted = np.bincount(nearest, minlength=len(names)).tolist()
    return {str(name): count for name, count in zip(names, counted, strict=True) if count}


def _disk_line(kind: str, facet: str, disks: Sequence[Disk], total: int, rows: int) -> tuple[str, ...]:
    size = sum(disk.all_bytes for disk in disks)
    index, tars = sum(disk.index_bytes for disk in disks), sum(disk.tar_bytes for disk in disks)
    files = f"{sum(disk.files for disk in disks):,}"
    per_row = show_bytes(size / rows) if rows else "-"
    return (kind, facet, files, show_bytes(index), show_bytes(tars), show_share(size, total), per_row)


def _disk(dataset: Dataset, facet: str) -> Disk:
    files = [file for file in (dataset.root / facet).iterdir() if file.is_file()]
    sizes = [(file.suffix == ".parquet", size) for file in files if (size := size_of(file)) is not None]
    return Disk(
        index_bytes=sum(size for is_index, size in sizes if is_index),
        tar_bytes=sum(size for is_index, size in sizes if not is_index),
        files=len(sizes),
    )


def size_of(file: Path) -> int | None:
    """Bytes; None if it is gone (a working `produce` renames its temporaries)."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return None
