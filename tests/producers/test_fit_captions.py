"""A copy with useless captions costs no copy after it: what filters say of captions is known before duplicates are
settled."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from producer_world import FakeEncoders, draw, make_plan_for, produce_here, rows_of

from producers.plan import Plan
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.report.funnel import funnel
from qwenimg_dist.schema import DEDUP, LISTING, ROWS, is_dedup

USELESS = "https://example.org/picture.jpg"


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset.create(tmp_path / "data", 4)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Rows 0, 1, 3 and 6 have the same bytes, row 5 looks like them; rows 0 and 1 say nothing of the picture."""
    root = tmp_path / "source"
    for row in range(8):
        draw(root / f"{row}.png", row, (120, 120), f"a caption of picture {row}")
    for row in (1, 3, 6):
        shutil.copy(root / "0.png", root / f"{row}.png")
    draw(root / "5.png", 0, (100, 100))
    (root / "0.txt").write_text(USELESS)
    (root / "1.txt").write_text("")
    return root


def statuses(dataset: Dataset) -> dict[int, str]:
    return {row: entry["reason"] or entry["status"] for row, entry in rows_of(dataset, ROWS).items()}


def near_plan(*overrides: str) -> Plan:
    return make_plan_for("dedup.near=true", *overrides)


def test_a_copy_with_useless_captions_costs_no_copy_after_it(source: Path, dataset: Dataset) -> None:
    encoders = FakeEncoders()
    produce_here(source, dataset, near_plan(), encoders)
    expected = dict.fromkeys(range(8), "kept") | {0: "caption_url", 1: "no_caption", 5: "near_duplicate"}
    assert statuses(dataset) == expected | {6: "duplicate"}
    assert rows_of(dataset, ROWS)[6]["detail"] == "same bytes as row 3"
    assert rows_of(dataset, ROWS)[5]["detail"].startswith("looks like row 3: ")
    assert encoders.num_pictures == 4
    counted = funnel(dataset)
    assert (counted.captioned, counted.unique, counted.distinct, counted.admitted) == (7, 5, 4, 4)


def test_other_caption_thresholds_settle_anew_and_open_no_picture(source: Path, dataset: Dataset) -> None:
    strict, lax = near_plan(), near_plan("filters.caption_validity.reject=[empty]")
    produce_here(source, dataset, strict, FakeEncoders())
    before = {file: file.read_bytes() for file in dataset.root.glob("*/*.parquet")}
    encoders = FakeEncoders()
    produce_here(source, dataset, lax, encoders)
    assert statuses(dataset)[0] == "kept"
    assert [statuses(dataset)[row] for row in (3, 5, 6)] == ["duplicate", "near_duplicate", "duplicate"]
    assert encoders.num_pictures == 1  # row 0 alone is new
    again = FakeEncoders()
    produce_here(source, dataset, strict, again)
    assert statuses(dataset)[0] == "caption_url"
    assert [statuses(dataset)[row] for row in (3, 5, 6)] == ["kept", "near_duplicate", "duplicate"]
    assert again.num_pictures == again.num_captions == 0
    assert all(file.read_bytes() == content for file, content in before.items())
    assert funnel(dataset).unique == 5
    assert sum(is_dedup(facet) for facet in dataset.facets()) == 2


def test_without_caption_filters_all_rows_with_a_caption_take_part(source: Path, dataset: Dataset) -> None:
    off = [f"filters.{name}.enabled=false" for name in ("caption_validity", "caption_length", "category")]
    plan = make_plan_for(*off)
    produce_here(source, dataset, plan, FakeEncoders())
    assert plan.dedup.facet == DEDUP
    assert not any(facet.startswith("captions-") for facet in dataset.facets())
    assert [row for row, status in statuses(dataset).items() if status == "duplicate"] == [3, 6]


def test_captions_are_judged_once_and_again_when_they_change(source: Path, dataset: Dataset) -> None:
    plan = make_plan_for()
    facet = plan.dedup.captions_facet
    assert facet is not None
    produce_here(source, dataset, plan, FakeEncoders())
    wide = make_plan_for(resolutions=(64, 96))
    produce_here(source, dataset, wide, FakeEncoders())
    assert len(dataset.unit_parts(facet, 0)) == 1
    (source / "0.txt").write_text("a caption that came later")
    produce_here(source, dataset, wide, FakeEncoders())
    part = dataset.unit_parts(facet, 0)[1]
    assert dataset.read(part).to_pylist() == [{"row": 0, "fit": True}]
    assert dataset.meta(part)["inputs"] == {LISTING: 2}
    # What was settled stays: the row that takes part later is the copy of the one that was kept meanwhile.
    assert rows_of(dataset, ROWS)[0]["detail"] == "same bytes as row 3"
    assert statuses(dataset)[3] == "kept"
