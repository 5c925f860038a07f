"""What a data set holds beyond its funnel: buckets, text lengths, captions per picture, bytes per facet.

Place in the flow: `data stats` and the run report show it. Reads committed parts only, unit by unit.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.report.funnel import LATENTS_PREFIX, TEXT_PREFIX, facet_labels, latents_order
from qwenimg_dist.report.table import Table, show_bytes, show_share
from qwenimg_dist.schema import LISTING, ROWS, Bucket


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

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a bucket is named WIDTHxHEIGHT."""
        return {
            "buckets": {
                facet: {str(bucket): n for bucket, n in counts.items()} for facet, counts in self.buckets.items()
            },
            "text_lengths": {facet: vars(lengths) for facet, lengths in self.text_lengths.items()},
            "captions_per_row": {str(number): rows for number, rows in self.captions_per_row.items()},
            "disk": {facet: vars(disk) for facet, disk in self.disk.items()},
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
        disk = [(facet, d.files, show_bytes(d.index_bytes), show_bytes(d.tar_bytes)) for facet, d in self.disk.items()]
        total = [d.index_bytes + d.tar_bytes for d in self.disk.values()]
        disk.append(("all", sum(d.files for d in self.disk.values()), "", show_bytes(sum(total))))
        tables = [
            Table(title="Buckets", columns=("class", "bucket", "image tokens", "rows", "share"), rows=buckets),
            Table(
                title="Text lengths (tokens per distinct caption)",
                columns=("facet", "captions", "p10", "p50", "p90", "p99", "max"),
                rows=texts,
            ),
            Table(title="Captions per picture", columns=("captions", "rows"), rows=captions),
            Table(title="Disk", columns=("facet", "files", "index", "tars"), rows=tuple(disk)),
        ]
        return [table for table in tables if table.rows]


def stats(dataset: Dataset) -> Stats:
    """Read a data set's committed parts. Raises `DataError` naming a part that cannot be read."""
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
            captions.update(len(texts or ()) for texts in mine["captions"].to_pylist())
        for facet in latents:
            if unit in parts[facet]:
                places = dataset.merge(parts[facet][unit], ["row", "bucket_height", "bucket_width"])
                places = places.filter(pc.is_in(places["row"], value_set=kept))
                sides = zip(places["bucket_height"].to_pylist(), places["bucket_width"].to_pylist())
                buckets[facet].update(Bucket(height=height, width=width) for height, width in sides)
    return buckets, captions


def _text_lengths(dataset: Dataset, facet: str) -> TextLengths | None:
    tokens: dict[str, int] = {}
    for part in dataset.parts(facet):
        table = dataset.read(part, ["key", "num_tokens"])
        tokens.update(zip(table["key"].to_pylist(), table["num_tokens"].to_pylist()))
    if not tokens:
        return None
    p10, p50, p90, p99 = np.percentile(list(tokens.values()), (10, 50, 90, 99), method="nearest").tolist()
    longest = max(tokens.values())
    return TextLengths(captions=len(tokens), p10=int(p10), p50=int(p50), p90=int(p90), p99=int(p99), max=longest)


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
