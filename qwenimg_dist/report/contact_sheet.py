"""The contact sheet: a data set's pictures, scores and duplicates, to filter and page through, as one HTML file.

Place in the flow: `data inspect` picks rows, reads thumbnails and calls `write_contact_sheet`. The page holds its rows
as JSON and builds only the cards it shows, so ten thousand rows stay quick; histograms and tables are of all rows and
come counted. Nothing outside the file is referred to; no text of the data set is ever read as HTML.
"""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenimg_dist.report.histograms import Histogram
from qwenimg_dist.report.page import asset, page, write_html
from qwenimg_dist.report.table import Table


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a picture went into a class: resized, then cropped to the bucket. All (height or top, width or left), px."""

    bucket: tuple[int, int]
    crop: tuple[int, int]
    resized: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Further:
    """A picture that belongs to a row beside its own."""

    role: str
    """`rejected`, `condition_0`."""
    uri: str
    thumb: str = ""
    no_thumb: str = ""


@dataclass(frozen=True, kw_only=True)
class SheetRow:
    """One row as it is shown."""

    row: int
    key: str
    uri: str
    status: str
    reason: str
    detail: str
    width: int
    height: int
    num_bytes: int
    captions: tuple[str, ...]
    caption_notes: tuple[str, ...]
    """Beside each caption; mostly empty."""
    scores: dict[str, float]
    labels: dict[str, str]
    cuts: dict[str, Cut]
    """Class (`64 px`) -> cut."""
    thumb: str
    """`data:` URL of the thumbnail; empty if there is none."""
    no_thumb: str = ""
    """Why there is none."""
    kind: str = "image"
    others: tuple[Further, ...] = ()
    """The row's further pictures: what was rejected, or the conditions of an edit."""
    decoded: tuple[str, str] | None = None
    """(class, `data:` URL) of the picture decoded from the latents."""

    def as_dict(self) -> dict[str, Any]:
        """For the page's script."""
        return {
            "row": self.row,
            "key": self.key,
            "uri": self.uri,
            "status": self.status,
            "reason": self.reason,
            "detail": self.detail,
            "width": self.width,
            "height": self.height,
            "bytes": self.num_bytes,
            "captions": self.captions,
            "captionNotes": self.caption_notes,
            "scores": self.scores,
            "labels": self.labels,
            "places": {name: vars(cut) for name, cut in self.cuts.items()},
            "thumb": self.thumb,
            "no_thumb": self.no_thumb,
            "kind": self.kind,
            "others": [vars(other) for other in self.others],
            "decoded": self.decoded,
        }


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Rows that were found to be the same picture."""

    kind: str
    """`exact`, or `near` with its distance."""
    rows: tuple[int, ...]
    """The kept one first; not more than are shown."""
    distances: tuple[int, ...]
    """Of each to the first."""
    size: int
    """Of the whole cluster."""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """All that the page shows."""

    title: str
    subtitle: str
    notices: tuple[str, ...]
    """Said above the pictures: what is selected, what is left out."""
    classes: tuple[str, ...]
    rows: tuple[SheetRow, ...]
    histograms: tuple[Histogram, ...]
    clusters: tuple[Cluster, ...]
    cluster_rows: tuple[SheetRow, ...]
    """Rows that are shown in clusters only."""
    tables: tuple[Table, ...]

    def content(self) -> dict[str, Any]:
        """What the script gets."""
        return {
            "classes": self.classes,
            "scores": sorted({name for row in self.rows for name in row.scores}),
            "labels": sorted({name for row in self.rows for name in row.labels}),
            "histograms": [one.as_dict() for one in self.histograms],
            "clusters": [vars(cluster) for cluster in self.clusters],
            "clusterRows": [row.as_dict() for row in self.cluster_rows],
            "rows": [row.as_dict() for row in self.rows],
        }


def write_contact_sheet(path: Path, sheet: Sheet) -> None:
    """Write the page; an older one is replaced in one move."""
    # `<` could end the script element; escaped, it is the same JSON.
    data = json.dumps(sheet.content(), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    body = asset("contact_sheet.html")
    for name, text in {
        "title": html.escape(sheet.title),
        "subtitle": html.escape(sheet.subtitle),
        "notices": "".join(f'<p class="notice">{html.escape(text)}</p>' for text in sheet.notices),
        "tables": "".join(f'<div class="wide">{table.html()}</div>' for table in sheet.tables),
    }.items():
        body = body.replace(f"<!-- {name} -->", text, 1)
    scripts = asset("contact_sheet.js") + asset("contact_sheet_histograms.js") + asset("contact_sheet_cards.js")
    body += f'\n<script type="application/json" id="data">{data}</script>\n<script>\n{_strict(scripts)}</script>'
    write_html(path, page(sheet.title, asset("report.css") + asset("contact_sheet.css"), body))


def _strict(scripts: str) -> str:
    """One scope of its own, so that no name meets one of the browser's."""
    return f'(() => {{\n"use strict";\n{scripts}}})();\n'
