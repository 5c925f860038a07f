"""A report is one file, escapes every text, and embeds every picture."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwenimg_dist.report.page import (
    Code,
    Figure,
    KeyFigure,
    KeyFigures,
    Paragraph,
    Picture,
    Pictures,
    Section,
    report_html,
    write_report,
)
from qwenimg_dist.report.table import Table, show, show_bytes, show_share

NASTY = '<script>alert("x")</script> & co'


class Balanced(HTMLParser):
    """Fails on an element that is closed out of order."""

    VOID = frozenset({"img", "meta", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def png(width: int = 8, height: int = 8) -> bytes:
    sink = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(sink, format="PNG")
    return sink.getvalue()


def every_piece() -> tuple[Section, ...]:
    return (
        Section(
            title=NASTY,
            pieces=(
                Paragraph(text=NASTY),
                KeyFigures(figures=(KeyFigure(label=NASTY, value=NASTY, note=NASTY),)),
                Table(title=NASTY, columns=(NASTY, "n"), rows=((NASTY, 1),)),
                Figure(svg="<svg xmlns='http://www.w3.org/2000/svg'/>", caption=NASTY),
                Pictures(pictures=(Picture(data=png(), caption=NASTY), Picture(data=png())), columns=2),
                Code(text=NASTY),
                Code(text=NASTY, summary=NASTY),
            ),
        ),
        Section(title="More", pieces=(Paragraph(text="x"),)),
        Section(title="Nothing", pieces=()),
    )


def test_one_file_without_references_or_markup_from_texts(tmp_path: Path) -> None:
    write_report(tmp_path / "deep/report.html", title=NASTY, subtitle=NASTY, sections=every_piece())
    page = (tmp_path / "deep/report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert parser.seen.count("img") == 3
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["report.html"]


def test_sections_without_pieces_are_left_out_and_links_meet_their_anchors() -> None:
    page = report_html(title="x", sections=[*every_piece(), Section(title="More", pieces=(Paragraph(text="y"),))])
    assert "Nothing" not in page
    anchors = re.findall(r'<section id="([^"]+)"', page)
    assert re.findall(r'href="#([^"]+)"', page) == anchors
    assert len(set(anchors)) == 3


def test_large_pictures_are_scaled_down_small_ones_kept(tmp_path: Path) -> None:
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    small.write_bytes(png())
    large.write_bytes(png(3000, 300))
    assert Picture.read(small).data == png()
    with Image.open(io.BytesIO(Picture.read(large).data)) as read:
        assert (read.format, read.size) == ("JPEG", (2400, 240))


def test_a_grid_larger_than_pillow_opens_by_itself_is_scaled_down_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = tmp_path / "large.png"
    large.write_bytes(png(3000, 300))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400_000)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(large)
    data = Picture.read(large).data
    assert Image.MAX_IMAGE_PIXELS == 400_000
    monkeypatch.undo()
    with Image.open(io.BytesIO(data)) as read:
        assert (read.format, read.size) == ("JPEG", (2400, 240))


def test_other_bytes_are_no_picture() -> None:
    with pytest.raises(ValueError, match="must be PNG, JPEG or WebP"):
        Picture(data=b"GIF89a").html()


def test_table_as_text_aligns_numbers_right() -> None:
    table = Table(title="T", columns=("name", "rows", "share"), rows=(("a", 5, "1.0 %"), ("bc", 12345, "-")))
    assert table.text().splitlines() == [
        "T",
        "  name    rows  share",
        "  a          5  1.0 %",
        "  bc    12,345      -",
    ]
    assert table.html().count('class="n"') == 6
    with pytest.raises(ValueError, match="a row of 1"):
        Table(title="T", columns=("a", "b"), rows=(("x",),))


def test_numbers_are_shown_shortly() -> None:
    assert [show(v) for v in (None, 1234567, 0.123456, 12345.6, "x")] == ["", "1,234,567", "0.1235", "12,346", "x"]
    assert [show_bytes(n) for n in (0, 999, 1500, 2.5e9, 3e15)] == ["0 B", "999 B", "1.5 kB", "2.5 GB", "3000.0 TB"]
    assert show_share(1, 0) == "-"
