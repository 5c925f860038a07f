"""The contact sheet shows what the parts say, samples fairly, says what it leaves out, and is one safe file."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from qwenimg_dist.commands.data_inspect_choice import Choice, allot, choose
from qwenimg_dist.commands.main import main
from qwenimg_dist.config import InspectConfig
from qwenimg_dist.data.facets import Part
from qwenimg_dist.data.origin import Origin, remember_origin
from qwenimg_dist.data.row_columns import load_row_columns
from qwenimg_dist.data.where import WhereError
from qwenimg_dist.schema import LISTING, LISTING_COLUMNS
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
    return page, content(page)


def content(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    told: dict[str, Any] = json.loads(found[1])
    return told


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
    assert 'class="notice"' not in page.partition("<noscript>")[0]
    assert '<div id="notices"></div>' in page


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
    scripts = (
        page.replace("image.src = row.thumb", "")
        .replace("image.src = row.decoded[1]", "")
        .replace("image.src = url", "")
    )
    assert not re.search(r"""(src|href)\s*=\s*["']?(?!data:|#)[a-z/]""", scripts)
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
    assert "No thumbnails" in capsys.readouterr().out
    assert "source.path not given" in out.read_text()


def test_the_source_that_produce_read_is_found_again(made: PictureDataset, tmp_path: Path) -> None:
    copy = made.copy(tmp_path)
    remember_origin(copy.dataset, Origin(kind="folder", root=str(made.source)))
    out = tmp_path / "sheet.html"
    assert main(["data", "inspect", f"data.path={copy.dataset.root}", f"inspect.out={out}"]) == 0
    assert all(row["thumb"] for row in content(out.read_text())["rows"] if row["status"] != "fault")


def test_a_source_that_is_gone_is_refused(
    made: PictureDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    assert main(["data", "inspect", f"data.path={made.dataset.root}", f"source.path={gone}"]) == 2
    assert f"{gone} is not a folder" in capsys.readouterr().err


def test_a_wrong_source_is_named_with_the_first_file_that_is_missing(
    made: PictureDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong").mkdir()
    sheet(made, tmp_path / "sheet.html", f"source.path={tmp_path / 'wrong'}")
    said = capsys.readouterr().out
    assert f"36 without a thumbnail: file not found; the first: pictures/00000.jpg in {tmp_path / 'wrong'}" in said
    assert "4 without a thumbnail: file not found (known: unreadable)" in said


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


def choose_from(made: PictureDataset, **settings: Any) -> Choice:
    return choose(load_row_columns(made.dataset), InspectConfig(**settings))


def test_the_sample_is_spread_over_the_rows(made: PictureDataset) -> None:
    choice = choose_from(made, max_rows=8)
    assert len(set(choice.rows.tolist())) == 8
    assert choice.rows[0] == 0
    assert choice.rows[-1] == 39
    assert {made.status[row] for row in choice.rows.tolist()} == {"kept", "rejected", "fault"}


def test_where_selects_what_training_would_select_among_the_kept(made: PictureDataset) -> None:
    choice = choose_from(made, where="aspect > 1.5")
    scored = [row for row in range(40) if row % 3 == 1 and row % 10 != 9]
    assert choice.rows.tolist() == scored
    kept = sum(made.status[row] == "kept" for row in scored)
    assert choice.said == (
        f"Only aspect > 1.5: {len(scored)} of 40 decided rows, {kept} of them kept. Training takes kept rows only.",
    )
    with pytest.raises(WhereError, match="did you mean 'aspect'"):
        choose_from(made, where="aspekt > 1")


def test_the_best_share_is_of_kept_rows_as_in_training(made: PictureDataset) -> None:
    choice = choose_from(made, where="status == 'kept' and top(0.25, row)")
    kept = [row for row in range(40) if made.status[row] == "kept"]
    assert choice.rows.tolist() == kept[-8:]


def test_one_reason(made: PictureDataset) -> None:
    assert choose_from(made, reason="duplicate").rows.tolist() == [7, 17, 27, 37]
    with pytest.raises(ValueError, match=r"inspect.reason=blurred: no row has it; there is: duplicate, unreadable"):
        choose_from(made, reason="blurred")


def test_pages_go_through_all_rows_once(made: PictureDataset) -> None:
    pages = [choose_from(made, page=page, max_rows=9, where="row >= 3") for page in range(1, 6)]
    assert [row for page in pages for row in page.rows.tolist()] == list(range(3, 40))
    assert "Page 5 of 5" in " ".join(pages[4].said)
    with pytest.raises(ValueError, match="there are 5 pages of 9 rows"):
        choose_from(made, page=6, max_rows=9, where="row >= 3")


def test_duplicates_stand_beside_their_original_though_it_is_not_sampled(made: PictureDataset, tmp_path: Path) -> None:
    near = pa.table({"row": [5, 8], "near_duplicate_of": [2, 2], "distance": [3, 4]})
    copy = made.copy(tmp_path)
    copy.dataset.commit(Part(facet="near-6-0a1b", unit=0, part=0), near, config_hash="test")
    _, data = sheet(copy, tmp_path / "sheet.html", "inspect.reason=duplicate", "inspect.clusters=9")
    assert [row["row"] for row in data["rows"]] == [7, 17, 27, 37]
    assert [row["row"] for row in data["clusterRows"]] == [6, 16, 26, 36]
    assert all(row["thumb"] for row in data["clusterRows"])
    assert [one["rows"] for one in data["clusters"]] == [[6, 7], [16, 17], [26, 27], [36, 37]]
    _, data = sheet(copy, tmp_path / "sheet.html", "inspect.where='row == 5'", "inspect.max_rows=1")
    # The cluster is shown whole: what its other rows are is why one looks.
    assert data["clusters"] == [{"kind": "near, up to 6", "rows": [2, 5, 8], "distances": [0, 3, 4], "size": 3}]


def test_further_pictures_of_pairs_stand_beside_their_own(made: PictureDataset, tmp_path: Path) -> None:
    copy = made.copy(tmp_path)
    listing = copy.dataset.read(Part(facet=LISTING, unit=0, part=0)).slice(0, 2).to_pylist()
    pairs = [{**entry, "kind": "preference", "others": ["pictures/00001.jpg"]} for entry in listing]
    pairs[1]["others"] = ["pictures/nowhere.jpg"]
    table = pa.Table.from_pylist(pairs, schema=LISTING_COLUMNS)
    copy.dataset.commit(Part(facet=LISTING, unit=0, part=1), table, config_hash="test")
    _, data = sheet(copy, tmp_path / "sheet.html", "inspect.where='row < 2'")
    first, second = data["rows"]
    (other,) = first["others"]
    assert (other["role"], other["uri"]) == ("rejected", "pictures/00001.jpg")
    assert other["thumb"] == second["thumb"] != first["thumb"]
    assert second["others"][0]["no_thumb"] == "file not found"
