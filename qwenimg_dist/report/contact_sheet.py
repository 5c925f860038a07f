"""The contact sheet: rows of a data set with thumbnails, filters and paging, as one HTML file.

Place in the flow: `data inspect` picks rows, reads thumbnails and calls `write_contact_sheet`. The page holds its rows
as JSON and builds only the cards it shows, so ten thousand rows stay quick. Nothing outside the file is referred to;
no text of the data set is ever read as HTML.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qwenimg_dist.report.page import asset, page, write_html
from qwenimg_dist.report.table import Table

_BAR: Final = """
<div class="bar" id="bar">
<span class="chips" id="status"></span>
<select id="reason" aria-label="reason"></select>
<select id="bucket" aria-label="bucket"></select>
<input id="text" type="search" placeholder="caption, file, key, detail" aria-label="text">
<label>order <select id="order"></select></label>
<label>crop <select id="crop"></select></label>
<span class="where"><span id="count"></span><button id="back">back</button><button id="next">next</button></span>
</div>
<div class="cards" id="cards"></div>
"""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a picture went into a class: resized, then cropped to the bucket. All (height or top, width or left), px."""

    bucket: tuple[int, int]
    crop: tuple[int, int]
    resized: tuple[int, int]


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
    scores: dict[str, float]
    cuts: dict[str, Cut]
    """Class (`64 px`) -> cut."""
    thumb: str
    """`data:` URL of the thumbnail; empty if there is none."""
    no_thumb: str = ""
    """Why there is none."""

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
            "scores": self.scores,
            "places": {name: vars(cut) for name, cut in self.cuts.items()},
            "thumb": self.thumb,
            "no_thumb": self.no_thumb,
        }


def write_contact_sheet(
    path: Path,
    *,
    title: str,
    subtitle: str,
    left_out: str,
    tables: Sequence[Table],
    classes: Sequence[str],
    rows: Sequence[SheetRow],
) -> None:
    """Write the page; `left_out` is said above the rows if it is not empty, `tables` are folded away."""
    content = {
        "classes": list(classes),
        "scores": sorted({name for row in rows for name in row.scores}),
        "rows": [row.as_dict() for row in rows],
    }
    # `<` could end the script element; escaped, it is the same JSON.
    data = json.dumps(content, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    notice = f'<p class="left-out">{html.escape(left_out)}</p>' if left_out else ""
    folded = "".join(f"<div>{table.html()}</div>" for table in tables)
    body = (
        f'<main><h1>{html.escape(title)}</h1><p class="subtitle">{html.escape(subtitle)}</p>{notice}'
        f'<details class="summary"><summary>funnel and buckets</summary><div class="tables">{folded}</div></details>'
        f'{_BAR}</main>\n<script type="application/json" id="data">{data}</script>\n'
        f"<script>\n{asset('contact_sheet.js')}</script>"
    )
    write_html(path, page(title, asset("report.css") + asset("contact_sheet.css"), body))
