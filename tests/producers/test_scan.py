"""The scan of rows whose files are damaged, cannot be had, or raise what nobody foresaw."""

from __future__ import annotations

from pathlib import Path

import pytest
from producer_world import SCORERS, FakeEncoders, draw, make_plan_for, produce_here, rows_of

from producers import pictures, scan
from producers.actor import describe_failure
from producers.unit import produce_unit
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.schema import ROWS, SCAN

PLAN = make_plan_for()


def broken(*args: object) -> None:
    raise KeyError("surprise")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for number in range(2):
        draw(tmp_path / "source" / f"{number}.png", number, caption=f"caption {number}")
    return tmp_path / "source"


def test_what_nobody_foresaw_names_row_and_file(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Dataset.create(tmp_path / "data", 4)
    with monkeypatch.context() as patched:
        patched.setattr(scan, "open_header", broken)
        with pytest.raises(KeyError) as caught:
            produce_here(source, dataset, PLAN, FakeEncoders())
    failure = describe_failure(caught.value)
    assert failure.kind == "fatal"
    assert failure.message == "KeyError: 'surprise' at row 0 (0.png)"
    for place in ("load_image", "render"):
        with monkeypatch.context() as patched:
            patched.setattr(pictures, place, broken)
            with pytest.raises(KeyError) as caught:
                produce_here(source, dataset, PLAN, FakeEncoders())
        assert describe_failure(caught.value).message == "KeyError: 'surprise' at row 0 (0.png)", place
        with monkeypatch.context() as patched:
            patched.setattr(pictures, place, broken)
            options = {"plan": PLAN, "root": str(source), "encoders": FakeEncoders(), "scorers": SCORERS}
            with pytest.raises(KeyError) as caught:
                produce_unit(dataset, 0, num_threads=2, **options)
        assert describe_failure(caught.value).message == "KeyError: 'surprise' at row 0 (0.png)", place
    produce_here(source, dataset, PLAN, FakeEncoders())
    assert [entry["status"] for entry in rows_of(dataset, ROWS).values()] == ["kept", "kept"]
    assert len(rows_of(dataset, SCAN)) == 2
