"""The contact sheet shows what the parts say, samples fairly, says what it leaves out, and is one safe file."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qwenimg_dist.commands.data_inspect import allot, choose
from qwenimg_dist.commands.main import main
from tests.helpers.picture_dataset import PictureDataset, caption_of, make_picture_dataset

KEPT, SMALL, BROKEN = ("kept", ""), ("rejected", "too_small"), ("fault", "truncated")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> PictureDataset:
    return make_picture_dataset(tmp_path_factory.mktemp("inspect"), rows=40)


def sheet(made: PictureDataset, out: Path, *extra: str) -> tuple[str, dict[str, Any]]:
    """The page, and the rows that its script gets."""
    args = [f"data.path={made.dataset.root}", f"source.path={made.source}", f"inspect.out={out}", *extra]
    assert main(["data", "inspect", *args]) == 0
    page = out.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return page, json.loads(found[1])


def test_every_row_with_its_facts(made: PictureDataset, tmp_path: Path) -> None:
    page, data = sheet(made, tmp_path / "sheet.html", "inspect.thumbnail=64")
    rows = data["rows"]
    assert [row["row"] for row in rows] == list(range(40))
    assert {row["row"]: row["status"] for row in rows} == made.status
    assert data["classes"] == ["64 px", "96 px"]
    assert data["scores"] == ["aspect"]
    one = rows[1]
    assert one["captions"] == [caption_of(1)]
    assert one["scores"]["aspect"] == pytest.approx(1.6)
    assert one["places"]["96 px"] == {"bucket": [80, 112], "crop": [0, 8], "resized": [80, 128]}
    assert rows[7]["detail"] == "same picture as row 6"
    assert "left-out" not in page.partition("</style>")[2]


def test_thumbnails_are_the_pictures(made: PictureDataset, tmp_path: Path) -> None:
    _, data = sheet(made, tmp_path / "sheet.html", "inspect.thumbnail=64")
    one = data["rows"][1]
    head, _, body = one["thumb"].partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(body))) as thumb:
        assert thumb.size == (64, 40)
        red, green, blue = thumb.convert("RGB").getpixel((30, 20))
    assert green > red + 60
    assert green > blue + 60
    broken = data["rows"][9]
    assert broken["thumb"] == ""
    assert broken["no_thumb"].startswith("no picture")


def test_the_page_is_self_contained_and_reads_no_text_as_html(made: PictureDataset, tmp_path: Path) -> None:
    page, _ = sheet(made, tmp_path / "sheet.html")
    assert "<b>ground" not in page
    assert not re.search(r"""(src|href)\s*=\s*["']?(?!data:|#)[a-z/]""", page.replace("image.src = row.thumb", ""))
    assert "default-src 'none'" in page
    assert "innerHTML" not in page


def test_a_sample_is_said_to_be_one(made: PictureDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, data = sheet(made, tmp_path / "sheet.html", "inspect.max_rows=10")
    said = "10 of 40 rows (5 of 32 kept, 2 of 4 rejected duplicate, 3 of 4 fault unreadable)"
    assert len(data["rows"]) == 10
    assert said in page
    assert said in capsys.readouterr().out


def test_without_source_there_are_placeholders(
    made: PictureDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sheet.html"
    assert main(["data", "inspect", f"data.path={made.dataset.root}", f"inspect.out={out}"]) == 0
    assert "40 without a thumbnail (source.path=... would show them)" in capsys.readouterr().out
    assert "source.path not given" in out.read_text()


def test_a_source_that_is_gone_is_refused(
    made: PictureDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    assert main(["data", "inspect", f"data.path={made.dataset.root}", f"source.path={gone}"]) == 2
    assert f"{gone} is not a folder" in capsys.readouterr().err


def test_a_lost_file_leaves_a_placeholder(tmp_path: Path) -> None:
    made = make_picture_dataset(tmp_path, rows=4)
    (made.source / "pictures/00002.jpg").unlink()
    _, data = sheet(made, tmp_path / "sheet.html")
    assert [bool(row["thumb"]) for row in data["rows"]] == [True, True, False, True]
    assert data["rows"][2]["no_thumb"] == "file not found"


def test_nothing_decided_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_picture_dataset(tmp_path, rows=4, source=False)
    for file in (made.dataset.root / "rows").glob("*.parquet"):
        file.unlink()
    assert main(["data", "inspect", f"data.path={made.dataset.root}"]) == 2
    assert "no decided row" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("there", "places", "expected"),
    [
        ({KEPT: 5, SMALL: 3}, 100, {KEPT: 5, SMALL: 3}),
        ({KEPT: 1000, SMALL: 500, BROKEN: 500}, 100, {KEPT: 50, SMALL: 25, BROKEN: 25}),
        ({KEPT: 1000, SMALL: 500, BROKEN: 2}, 100, {KEPT: 50, SMALL: 48, BROKEN: 2}),
        ({KEPT: 1000, SMALL: 4}, 100, {KEPT: 96, SMALL: 4}),
        ({KEPT: 10, SMALL: 500}, 100, {KEPT: 10, SMALL: 90}),
        ({KEPT: 1000}, 100, {KEPT: 100}),
        ({SMALL: 1000}, 100, {SMALL: 100}),
        ({}, 100, {}),
    ],
)
def test_places_are_shared(
    there: dict[tuple[str, str], int], places: int, expected: dict[tuple[str, str], int]
) -> None:
    assert allot(there, places) == expected


def test_the_sample_is_spread_over_the_rows(made: PictureDataset) -> None:
    choice = choose(made.dataset, 8)
    assert len(set(choice.rows.tolist())) == 8
    assert choice.rows[0] == 0
    assert choice.rows[-1] == 39
    assert {made.status[row] for row in choice.rows.tolist()} == {"kept", "rejected", "fault"}
