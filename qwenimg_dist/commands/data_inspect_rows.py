"""What the contact sheet shows of its rows: what the parts say of them, and a thumbnail from the source's file.

Place in the flow: `data inspect` has chosen the rows. Only the parts of their units are read. A file that is gone or
broken leaves a placeholder with the reason.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from rich.console import Console
from rich.progress import track

from producers.load import ImageFault, load_image
from producers.sources.base import BAD_ROW, OUTSIDE_ROOT, read_bytes
from qwenimg_dist.data.catalog import Ints
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.data.pins import parallel
from qwenimg_dist.report.contact_sheet import Cut, Further, SheetRow
from qwenimg_dist.schema import IMAGE, LABEL_PREFIX, LISTING, PROMPT, RAW, ROWS, SCAN, SCORE_PREFIX, role_of

Entries = dict[int, dict[str, Any]]
"""Row -> its columns."""


def read_rows(dataset: Dataset, rows: Ints, labels: Mapping[str, str]) -> list[SheetRow]:
    """What the parts say of these rows (ascending); `labels` names the latents facets' classes."""
    entries = {facet: read_entries(dataset, facet, rows) for facet in (LISTING, SCAN, ROWS, *labels)}
    return [
        SheetRow(
            row=row,
            key=entry["key"],
            uri=entries[LISTING].get(row, {}).get("uri", ""),
            status=entry["status"],
            reason=entry["reason"] or "",
            detail=entry["detail"] or "",
            width=entry["width"] or 0,
            height=entry["height"] or 0,
            num_bytes=entries[SCAN].get(row, {}).get("bytes") or 0,
            captions=tuple(entries[LISTING].get(row, {}).get("captions") or ()),
            caption_notes=_caption_notes(entries[LISTING].get(row, {}), entry),
            scores=_scores(entry),
            labels=_labels(entry),
            cuts={label: _cut(entries[facet][row]) for facet, label in labels.items() if row in entries[facet]},
            thumb="",
            kind=entries[LISTING].get(row, {}).get("kind") or IMAGE,
            others=_others(entries[LISTING].get(row, {})),
        )
        for row, entry in sorted(entries[ROWS].items())
    ]


def read_entries(dataset: Dataset, facet: str, rows: Ints) -> Entries:
    """All columns of these rows of one facet; reads the units that they lie in."""
    parts = dataset.parts_by_unit(facet)
    wanted = pa.array(rows)

    def read(unit: int) -> list[dict[str, Any]]:
        if unit not in parts:
            return []
        tables = [dataset.read(part) for part in parts[unit]]
        some = [table.filter(pc.is_in(table["row"], value_set=wanted)) for table in tables]
        # Later parts supersede earlier ones.
        found: list[dict[str, Any]] = pa.concat_tables(some, promote_options="default").to_pylist()
        return found

    units = np.unique(rows // dataset.unit_size).tolist()
    return {entry["row"]: entry for of_unit in parallel(read, units) for entry in of_unit}


def with_thumbnails(rows: Sequence[SheetRow], root: str | None, side: int, console: Console) -> list[SheetRow]:
    """Each row with its thumbnail or the reason why there is none; a bar on a terminal."""
    if root is None:
        return [replace(row, no_thumb="source.path not given") for row in rows]
    # A local disk needs as many threads as there are processors; a network wants more pictures asked for at once.
    with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1)), thread_name_prefix="thumbnail") as pool:
        finished = pool.map(partial(_with_thumbnail, root=root, side=side), rows)
        return list(_tracked(finished, "thumbnails", len(rows), console))


def jpeg_url(picture: Image.Image, side: int) -> str:
    """A `data:` URL of the picture, longer side at most `side` px."""
    picture.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
    sink = io.BytesIO()
    picture.save(sink, format="JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(sink.getvalue()).decode()


def _with_thumbnail(row: SheetRow, root: str, side: int) -> SheetRow:
    if row.reason in (OUTSIDE_ROOT, BAD_ROW):
        return replace(row, no_thumb="outside of source.path" if row.reason == OUTSIDE_ROOT else "no row of the source")
    others = []
    for other in row.others:
        found = _picture(root, other.uri)
        if isinstance(found, str):
            others.append(replace(other, no_thumb=found))
        else:
            others.append(replace(other, thumb=jpeg_url(found, side)))
    row = replace(row, others=tuple(others))
    if row.kind == PROMPT:
        return replace(row, no_thumb="a prompt, without a picture")
    picture = _picture(root, row.uri)
    if isinstance(picture, str):
        return replace(row, no_thumb=picture)
    # The picture's own sides: the file may have changed since it was scanned.
    width, height = picture.size
    return replace(row, thumb=jpeg_url(picture, side), width=width, height=height)


def _picture(root: str, uri: str) -> Image.Image | str:
    """Read as `produce` reads it; or why there is none."""
    try:
        return load_image(read_bytes(root, uri)).image
    except ImageFault as fault:
        return f"no picture: {fault.detail}"
    except FileNotFoundError:
        return "file not found"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def _others(listed: Mapping[str, Any]) -> tuple[Further, ...]:
    kind, uris = listed.get("kind") or IMAGE, listed.get("others") or ()
    return tuple(Further(role=role_of(kind, index), uri=uri) for index, uri in enumerate(uris, start=1))


def _tracked(items: Any, description: str, total: int, console: Console) -> Any:
    return track(items, description=description, total=total, console=console, disable=not console.is_terminal)


def _caption_notes(listed: Mapping[str, Any], decided: Mapping[str, Any]) -> tuple[str, ...]:
    """Beside each caption: its kind where it is not the picture's own, and why it is left out."""
    count = len(listed.get("captions") or ())
    kinds = listed.get("caption_kinds") or [RAW] * count
    faults = decided.get("caption_faults") or [""] * count
    return tuple(
        ", ".join(filter(None, (kind if kind != RAW else "", f"left out: {fault}" if fault else "")))
        for kind, fault in zip(kinds, faults)
    )


def _scores(entry: Mapping[str, Any]) -> dict[str, float]:
    named = _prefixed(entry, SCORE_PREFIX, float)
    return {name: value for name, value in named.items() if math.isfinite(value)}


def _labels(entry: Mapping[str, Any]) -> dict[str, str]:
    return {name: word for name, word in _prefixed(entry, LABEL_PREFIX, str).items() if word}


def _prefixed(entry: Mapping[str, Any], prefix: str, kind: Callable[[Any], Any]) -> dict[str, Any]:
    return {n.removeprefix(prefix): kind(v) for n, v in entry.items() if n.startswith(prefix) and v is not None}


def _cut(place: Mapping[str, Any]) -> Cut:
    return Cut(
        bucket=(place["bucket_height"], place["bucket_width"]),
        crop=(place["crop_top"], place["crop_left"]),
        resized=(place["resized_height"], place["resized_width"]),
    )
