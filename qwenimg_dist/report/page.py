"""A report as one HTML file: sections of text, key figures, tables, figures, picture grids and commands.

Nothing outside the file is referred to, so it can be mailed or kept beside a run. Every text is escaped. Deliberately
no template engine and no script: what a report needs are seven kinds of pieces.

    write_report(path, title="Demo", sections=[
        Section(title="Result", pieces=(
            KeyFigures(figures=(KeyFigure(label="colour right", value="97 %", note="of 120 cells"),)),
            Pictures(pictures=(Picture.read(Path("grid.png"), "held-out prompts"),)),
            Code(text="qwenimg-dist demo"),
        )),
    ])
"""

from __future__ import annotations

import base64
import html
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qwenimg_dist.files import temporary_name
from qwenimg_dist.report.table import Table

_ASSETS: Final = Path(__file__).resolve().parent / "assets"
_KEEP_BYTES: Final = 1_500_000
_MAX_SIDE: Final = 2400


@dataclass(frozen=True, kw_only=True)
class Paragraph:
    """Plain text."""

    text: str

    def html(self) -> str:
        return f"<p>{html.escape(self.text)}</p>"


@dataclass(frozen=True, kw_only=True)
class KeyFigure:
    """One number worth a tile."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class KeyFigures:
    """A row of tiles."""

    figures: tuple[KeyFigure, ...]

    def html(self) -> str:
        tiles = (
            f'<div><div class="label">{html.escape(f.label)}</div><div class="value">{html.escape(f.value)}</div>'
            f'<div class="note">{html.escape(f.note)}</div></div>'
            for f in self.figures
        )
        return f'<div class="figures">{"".join(tiles)}</div>'


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing as SVG text (see `curves.py`)."""

    svg: str
    caption: str = ""

    def html(self) -> str:
        # An <img>, so that ids of several drawings do not meet, and no script in an SVG could run.
        data = base64.b64encode(self.svg.encode()).decode()
        image = f'<img alt="{html.escape(self.caption)}" src="data:image/svg+xml;base64,{data}">'
        return f"<figure>{image}{_figcaption(self.caption)}</figure>"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An encoded picture (PNG, JPEG or WebP bytes)."""

    data: bytes
    caption: str = ""

    @classmethod
    def read(cls, file: Path, caption: str = "") -> Picture:
        """A picture file; a large one is scaled down to at most 2400 px and kept as JPEG."""
        data = file.read_bytes()
        return cls(data=_smaller(data) if len(data) > _KEEP_BYTES else data, caption=caption)

    def html(self) -> str:
        data = base64.b64encode(self.data).decode()
        source = f"data:{_media_type(self.data)};base64,{data}"
        return f'<figure><img alt="{html.escape(self.caption)}" src="{source}">{_figcaption(self.caption)}</figure>'


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures side by side, `columns` of them in a row."""

    pictures: tuple[Picture, ...]
    columns: int = 1

    def html(self) -> str:
        style = f"grid-template-columns: repeat({self.columns}, minmax(0, 1fr))"
        return f'<div class="pictures" style="{style}">{"".join(picture.html() for picture in self.pictures)}</div>'


@dataclass(frozen=True, kw_only=True)
class Code:
    """Commands or a config, in fixed width; with a `summary` it is folded away under it."""

    text: str
    summary: str = ""

    def html(self) -> str:
        block = f"<pre>{html.escape(self.text)}</pre>"
        return f"<details><summary>{html.escape(self.summary)}</summary>{block}</details>" if self.summary else block


Piece = Paragraph | KeyFigures | Figure | Picture | Pictures | Code | Table


@dataclass(frozen=True, kw_only=True)
class Section:
    """A titled part of a report."""

    title: str
    pieces: tuple[Piece, ...]


def write_report(path: Path, *, title: str, sections: Sequence[Section], subtitle: str = "") -> None:
    """Write the report to `path` (folders are made; an older one is replaced in one move)."""
    write_html(path, report_html(title=title, sections=sections, subtitle=subtitle))


def report_html(*, title: str, sections: Sequence[Section], subtitle: str = "") -> str:
    """The whole page. Sections without pieces are left out."""
    shown = [section for section in sections if section.pieces]
    anchors = _anchors([section.title for section in shown])
    links = "".join(f'<a href="#{a}">{html.escape(s.title)}</a>' for s, a in zip(shown, anchors))
    body = "".join(
        f'<section id="{anchor}"><h2>{html.escape(section.title)}</h2>{_pieces_html(section.pieces)}</section>\n'
        for section, anchor in zip(shown, anchors)
    )
    under = f'<p class="subtitle">{html.escape(subtitle)}</p>' if subtitle else ""
    nav = f"<nav>{links}</nav>" if len(shown) > 1 else ""
    return page(title, asset("report.css"), f"<main><h1>{html.escape(title)}</h1>{under}{nav}\n{body}</main>")


def page(title: str, css: str, body: str) -> str:
    """A self-contained document; the policy forbids it to load anything."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{css}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def asset(name: str) -> str:
    """A text file that ships beside this module."""
    return (_ASSETS / name).read_text(encoding="utf-8")


def write_html(path: Path, text: str) -> None:
    """Replace `path` in one move, so that a reader never sees half a page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _pieces_html(pieces: Sequence[Piece]) -> str:
    return "\n".join(
        f'<div class="wide">{piece.html()}</div>' if isinstance(piece, Table) else piece.html() for piece in pieces
    )


def _anchors(titles: Sequence[str]) -> list[str]:
    anchors: list[str] = []
    for title in titles:
        base = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        taken = sum(1 for anchor in anchors if re.fullmatch(re.escape(base) + r"(-\d+)?", anchor))
        anchors.append(f"{base}-{taken + 1}" if taken else base)
    return anchors


def _figcaption(text: str) -> str:
    return f"<figcaption>{html.escape(text)}</figcaption>" if text else ""


def _media_type(data: bytes) -> str:
    if data.startswith(b"\x89PNG"):
        return "image/png"
    if data.startswith(b"\xff\xd8"):
        return "image/jpeg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    raise ValueError(f"a picture of a report must be PNG, JPEG or WebP; these bytes begin with {data[:8]!r}")


def _smaller(data: bytes) -> bytes:
    from PIL import Image, PngImagePlugin  # only large pictures need it

    sink = io.BytesIO()
    try:
        opened = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError:  # a grid of our own with a wall of captions: only `open` asks for the size
        if not data.startswith(b"\x89PNG"):
            raise
        opened = PngImagePlugin.PngImageFile(io.BytesIO(data))
    with opened as picture:
        picture.thumbnail((_MAX_SIDE, _MAX_SIDE))
        picture.convert("RGB").save(sink, format="JPEG", quality=88)
    return sink.getvalue()
