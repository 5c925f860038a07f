"""The funnel counts what the parts say, each stage a subset of the one before."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from qwenimg_dist.data.facets import Dataset, Part
from qwenimg_dist.report.funnel import facet_labels, funnel
from qwenimg_dist.schema import LISTING, LISTING_COLUMNS, ROWS
from tests.helpers.picture_dataset import TEXT, make_picture_dataset


def test_counts_every_stage(tmp_path: Path) -> None:
    made = make_picture_dataset(tmp_path, rows=40, resolutions=(64, 96), source=False)
    result = funnel(made.dataset)
    assert (result.units, result.listed, result.decided) == (3, 40, 40)
    assert (result.readable, result.captioned, result.unique, result.admitted) == (36, 36, 32, 32)
    assert result.too_small == {"64": 0, "96": 0}
    assert result.encoded == {made.latents[64]: 32, made.latents[96]: 32}
    assert result.reasons == {("fault", "unreadable"): 4, ("rejected", "duplicate"): 4}
    # Distinct captions over units, and the empty prompt once.
    keys = {k for p in made.dataset.parts(TEXT) for k in made.dataset.read(p)["key"].to_pylist()}
    assert result.captions == {TEXT: len(keys)}


def test_later_part_supersedes_and_is_not_counted_twice(tmp_path: Path) -> None:
    made = make_picture_dataset(tmp_path, rows=20, source=False)
    rows = made.dataset.read(Part(facet=ROWS, unit=0, part=0))
    changed = rows.slice(0, 1).set_column(2, "status", pa.array(["rejected"]))
    changed = changed.set_column(3, "reason", pa.array(["too_small"]))
    made.dataset.commit(Part(facet=ROWS, unit=0, part=1), changed, config_hash="test")
    made.dataset.commit(Part(facet=ROWS, unit=0, part=2), rows.slice(0, 0), config_hash="test")
    result = funnel(made.dataset)
    assert (result.listed, result.decided, result.admitted) == (20, 20, 15)
    assert result.reasons["rejected", "too_small"] == 1
    # The row still has latents, but encoded rows are admitted rows.
    assert set(result.encoded.values()) == {15}


def test_rows_too_small_for_a_class_are_told(tmp_path: Path) -> None:
    made = make_picture_dataset(tmp_path, rows=20, resolutions=(64, 112), source=False)
    result = funnel(made.dataset)
    assert result.encoded[made.latents[112]] == result.admitted - result.too_small["112"] < result.admitted
    assert result.tables()[-1].title == "Admitted, but too small for a class"


def test_undecided_rows_show_as_such(tmp_path: Path) -> None:
    dataset = Dataset.create(tmp_path, 4)
    rows = [{"row": i, "key": f"k{i}", "uri": f"{i}.png", "captions": ["x"]} for i in range(3)]
    table = pa.Table.from_pylist(rows, schema=LISTING_COLUMNS)
    dataset.commit(Part(facet=LISTING, unit=0, part=0), table, config_hash="test")
    result = funnel(dataset)
    assert (result.listed, result.decided, result.admitted, result.encoded) == (3, 0, 0, {})
    text = result.tables()[0].text()
    assert "decided so far     0" in text
    assert "100.0 %" in text


def test_empty_data_set(tmp_path: Path) -> None:
    result = funnel(Dataset.create(tmp_path, 4))
    assert result.listed == 0
    assert len(result.tables()) == 1


def test_two_encoders_of_one_resolution_stay_apart() -> None:
    labels = facet_labels(["latents-64-aa", "latents-128-aa", "latents-64-bb"])
    assert labels == {"latents-64-aa": "64 px (aa)", "latents-64-bb": "64 px (bb)", "latents-128-aa": "128 px"}
