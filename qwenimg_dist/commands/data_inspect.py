"""`data inspect`: which rows a contact sheet shows, and what is shown of them.

Reads committed parts and the source's files; a file that is gone or broken leaves a placeholder with the reason. More
rows than `inspect.max_rows` are sampled evenly, half of the places for kept rows and half for the others, which share
theirs among the reasons, so that a rare reason is seen too. What is left out is said on the page. Deliberately left
out: pictures decoded from latents.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from rich.console import Console
from rich.progress import track

from producers.load import ImageFault, load_image
from producers.sources import open_source
from producers.sources.base import OUTSIDE_ROOT, read_bytes
from qwenimg_dist.config import Config
from qwenimg_dist.data.facets import DataError, Dataset
from qwenimg_dist.report.contact_sheet import Cut, SheetRow, write_contact_sheet
from qwenimg_dist.report.funnel import facet_labels, funnel
from qwenimg_dist.report.stats import stats
from qwenimg_dist.report.table import show_bytes
from qwenimg_dist.schema import LISTING, ROWS, SCAN

Group = tuple[str, str]
"""(status, reason)."""

_SCORE: Final = "score_"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Rows to show, and how many there are of each kind."""

    rows: npt.NDArray[np.int64]
    """Ascending."""
    there: dict[Group, int]
    shown: dict[Group, int]

    @property
    def left_out(self) -> str:
        """What the page says about rows it does not show; empty if it shows all."""
        if sum(self.shown.values()) == sum(self.there.values()):
            return ""
        kinds = ", ".join(
            f"{self.shown[group]:,} of {count:,} {' '.join(filter(None, group))}"
            for group, count in sorted(self.there.items(), key=lambda item: -item[1])
        )
        return (
            f"A sample, evenly spaced: {sum(self.shown.values()):,} of {sum(self.there.values()):,} rows ({kinds}). "
            "Raise inspect.max_rows to see more."
        )


def inspect(dataset: Dataset, config: Config, console: Console) -> int:
    """Write the sheet and say where. Raises `DataError` if nothing is decided, ValueError for an unusable source."""
    root = _source_root(config)
    choice = choose(dataset, config.inspect.max_rows)
    if len(choice.rows) == 0:
        raise DataError(f"{dataset.root} has no decided row yet: run `qwenimg-dist produce` first")
    counted = funnel(dataset)
    labels = facet_labels(counted.encoded)
    rows = read_rows(dataset, choice.rows, labels)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="thumbnail") as pool:
        finished = pool.map(lambda row: with_thumbnail(row, root, config.inspect.thumbnail), rows)
        progress = track(
            finished, description="thumbnails", total=len(rows), console=console, disable=not console.is_terminal
        )
        rows = list(progress)
    out = Path(config.inspect.out) if config.inspect.out else dataset.root / "inspect.html"
    pending = counted.listed - counted.decided
    write_contact_sheet(
        out,
        title="Data set " + "/".join(dataset.root.resolve().parts[-2:]),
        subtitle=f"{counted.listed:,} rows listed, {counted.admitted:,} admitted"
        + (f", {pending:,} not decided yet" if pending else ""),
        left_out=choice.left_out,
        tables=[*counted.tables(), *stats(dataset).tables()],
        classes=list(labels.values()),
        rows=rows,
    )
    missing = sum(1 for row in rows if not row.thumb)
    note = f", {missing:,} without a thumbnail" if missing else ""
    note += "" if root is not None else " (source.path=... would show them)"
    size = show_bytes(out.stat().st_size)
    for line in (f"{out}: {len(rows):,} rows, {size}{note}", choice.left_out):
        if line:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def choose(dataset: Dataset, max_rows: int) -> Choice:
    """All decided rows, or a sample. Memory: 8 bytes per row of the data set."""
    found: defaultdict[Group, list[npt.NDArray[np.int64]]] = defaultdict(list)
    for _, parts in sorted(dataset.parts_by_unit(ROWS).items()):
        table = dataset.merge(parts, ["row", "status", "reason"])
        for group in table.group_by(["status", "reason"]).aggregate([]).to_pylist():
            same = pc.and_(pc.equal(table["status"], group["status"]), pc.equal(table["reason"], group["reason"]))
            rows = table.filter(same)["row"].to_numpy()
            found[group["status"], group["reason"]].append(rows)
    groups = {group: np.sort(np.concatenate(rows)) for group, rows in found.items()}
    there = {group: len(rows) for group, rows in groups.items()}
    shown = allot(there, max_rows)
    chosen = [_evenly(groups[group], count) for group, count in shown.items()]
    return Choice(
        rows=np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64), there=there, shown=shown
    )


def allot(there: Mapping[Group, int], places: int) -> dict[Group, int]:
    """Places per group: half for kept rows, half for the others, shared evenly; what one does not need, others get."""
    kept = {group: count for group, count in there.items() if group[0] == "kept"}
    lost = {group: count for group, count in there.items() if group[0] != "kept"}
    for_lost = min(sum(lost.values()), max(places // 2, places - sum(kept.values())))
    return _share(kept, places - for_lost) | _share(lost, for_lost)


def read_rows(dataset: Dataset, rows: npt.NDArray[np.int64], labels: Mapping[str, str]) -> list[SheetRow]:
    """What the parts say of these rows (ascending); `labels` names the latents facets' classes."""
    parts = {facet: dataset.parts_by_unit(facet) for facet in (LISTING, SCAN, ROWS, *labels)}
    shown: list[SheetRow] = []
    for unit in np.unique(rows // dataset.unit_size).tolist():
        wanted = pa.array(rows[rows // dataset.unit_size == unit])

        def read(facet: str, unit: int = unit, wanted: pa.Array = wanted) -> dict[int, dict[str, Any]]:
            if unit not in parts[facet]:
                return {}
            table = dataset.merge(parts[facet][unit])
            table = table.filter(pc.is_in(table["row"], value_set=wanted))
            return {entry["row"]: entry for entry in table.to_pylist()}

        shown += _unit_rows(read, labels)
    return shown


def with_thumbnail(row: SheetRow, root: str | None, side: int) -> SheetRow:
    """The row with its thumbnail, longer side `side` px, read as `produce` reads it; or with why there is none."""
    if root is None:
        return replace(row, no_thumb="source.path not given")
    if row.reason == OUTSIDE_ROOT:
        return replace(row, no_thumb="outside of source.path")
    try:
        picture = load_image(read_bytes(root, row.uri)).image
    except ImageFault as fault:
        return replace(row, no_thumb=f"no picture: {fault.detail}")
    except FileNotFoundError:
        return replace(row, no_thumb="file not found")
    except OSError as error:
        return replace(row, no_thumb=f"cannot be read: {error.strerror or error}")
    # The picture's own sides: the file may have changed since it was scanned.
    width, height = picture.size
    picture.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
    sink = io.BytesIO()
    picture.save(sink, format="JPEG", quality=82)
    url = "data:image/jpeg;base64," + base64.b64encode(sink.getvalue()).decode()
    return replace(row, thumb=url, width=width, height=height)


def _unit_rows(read: Callable[[str], dict[int, dict[str, Any]]], labels: Mapping[str, str]) -> list[SheetRow]:
    listing, scan, decided = read(LISTING), read(SCAN), read(ROWS)
    latents = {label: read(facet) for facet, label in labels.items()}
    return [
        SheetRow(
            row=row,
            key=entry["key"],
            uri=listing.get(row, {}).get("uri", ""),
            status=entry["status"],
            reason=entry["reason"] or "",
            detail=entry["detail"] or "",
            width=entry["width"] or 0,
            height=entry["height"] or 0,
            num_bytes=scan.get(row, {}).get("bytes") or 0,
            captions=tuple(listing.get(row, {}).get("captions") or ()),
            scores=_scores(entry),
            cuts={label: _cut(places[row]) for label, places in latents.items() if row in places},
            thumb="",
        )
        for row, entry in sorted(decided.items())
    ]


def _scores(entry: Mapping[str, Any]) -> dict[str, float]:
    named = {name.removeprefix(_SCORE): value for name, value in entry.items() if name.startswith(_SCORE)}
    return {name: float(value) for name, value in named.items() if value is not None and math.isfinite(value)}


def _cut(place: Mapping[str, Any]) -> Cut:
    return Cut(
        bucket=(place["bucket_height"], place["bucket_width"]),
        crop=(place["crop_top"], place["crop_left"]),
        resized=(place["resized_height"], place["resized_width"]),
    )


def _source_root(config: Config) -> str | None:
    """What uris are relative to; None if no source was named. Raises ValueError if it is not there."""
    if config.source.path is None:
        return None
    root = open_source(config.source).root
    if "://" not in root and not Path(root).is_dir():
        raise ValueError(f"source.path: {root} is not a folder; leave source.path out to do without thumbnails")
    return root


def _evenly(rows: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    if count >= len(rows):
        return rows
    return rows[np.linspace(0, len(rows) - 1, count).astype(np.int64)]


def _share(there: Mapping[Group, int], places: int) -> dict[Group, int]:
    """Evenly, but to none more than it has: the small groups first, the rest shares what they leave."""
    shares: dict[Group, int] = {}
    order: Sequence[tuple[Group, int]] = sorted(there.items(), key=lambda item: item[1])
    for position, (group, count) in enumerate(order):
        shares[group] = min(count, places // (len(order) - position))
        places -= shares[group]
    return shares
