"""A score lives exactly as long as what made it: another model or version, also across rows that were not looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from producer_world import SCORERS, FakeEncoders, draw, make_plan_for, produce_here, rows_of

from producers.driver import Driver
from producers.filters.base import BoundFilter, Facts, Filter, FilterParams, Resources, Scorer, Scorers, Value
from producers.plan import Plan
from producers.sources import base as sources
from producers.sources import open_source
from producers.workers import InlineWorkers
from qwenimg_dist.compose import load_config
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.schema import ROWS


class _Params(FilterParams):
    model: str


def rated(model: str, plan: Plan, asked: list[str], version: int = 1) -> Plan:
    """The plan with a filter whose score is its model's name's length; it notes who was asked.

    Workers keep loaded models, so each test names its own.
    """

    def load(params: _Params, resources: Resources) -> Scorer:
        def score(facts: Sequence[Facts]) -> list[dict[str, Value]]:
            asked.extend(params.model for _ in facts)
            return [{"rating": float(len(params.model))} for _ in facts]

        return score

    one: Filter[Any] = Filter(
        params=_Params,
        stage=5,
        looks_at="pixels",
        scores=("rating",),
        load=load,
        scored_by=("model",),
        version=version,
        admit=lambda values, params: None,
    )
    bound = BoundFilter(name="rating", filter=one, params=_Params(model=model))
    return replace(plan, filters=(*plan.filters, bound))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    draw(tmp_path / "source" / "a.png", 0, (100, 100), "a small picture of it")
    draw(tmp_path / "source" / "b.png", 1, (200, 200), "a large picture of it")
    return tmp_path / "source"


def test_a_stale_score_does_not_come_back_by_way_of_a_row_that_was_rejected_meanwhile(
    source: Path, tmp_path: Path
) -> None:
    dataset = Dataset.create(tmp_path / "data", 4)
    asked: list[str] = []
    loose, tight = make_plan_for(), make_plan_for("filters.resolution.min_side=150")
    for model, plan in (("A", loose), ("A", tight), ("BBB", tight), ("BBB", loose)):
        produce_here(source, dataset, rated(model, plan, asked), FakeEncoders())
    assert asked == ["A", "A", "BBB", "BBB"]
    assert {row: entry["score_rating"] for row, entry in rows_of(dataset, ROWS).items()} == {0: 3.0, 1: 3.0}


def test_a_raised_version_scores_again_and_then_rests(source: Path, tmp_path: Path) -> None:
    dataset = Dataset.create(tmp_path / "data", 4)
    asked: list[str] = []
    for version in (1, 1, 2, 2):
        produce_here(source, dataset, rated("CC", make_plan_for(), asked, version), FakeEncoders())
    assert len(asked) == 4


def test_a_batch_that_does_not_fit_into_gpu_memory_is_halved() -> None:
    sizes: list[int] = []

    def load(params: _Params, resources: Resources) -> Scorer:
        def score(facts: Sequence[Facts]) -> list[dict[str, Value]]:
            sizes.append(len(facts))
            if len(facts) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return [{"rating": float(one.num_bytes)} for one in facts]

        return score

    bound = rated("A", make_plan_for(), []).filters[-1]
    bound = replace(bound, filter=replace(bound.filter, load=load))
    facts = [Facts(num_bytes=number, width=1, height=1) for number in range(5)]
    scored = Scorers(Resources(pipeline_dir=Path("none"), device="cpu")).score(bound, facts)
    assert [one["rating"] for one in scored] == [0, 1, 2, 3, 4]
    assert sizes == [5, 2, 3, 1, 2]


def test_what_can_be_opened_and_still_fails_is_tried_once_per_command(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, plan, encoders = Dataset.create(tmp_path / "data", 4), make_plan_for(), FakeEncoders()
    read = sources.read_bytes

    def failing(root: str, uri: str) -> bytes:
        if uri == "a.png":
            raise OSError(5, "Input/output error")
        return read(root, uri)

    monkeypatch.setattr("producers.scan.read_bytes", failing)
    opened = open_source(load_config([f"source.path={source}"]).source)
    workers = InlineWorkers(dataset, plan, opened.root, encoders, SCORERS)
    driver = Driver(dataset=dataset, plan=plan, root=opened.root, make_workers=lambda: workers)
    num_rows = driver.list_source(opened.find()).num_rows
    for _ in range(2):  # the first look, and one more try
        pending = driver.pending()
        assert [one.unit for one in pending] == [0]
        driver.produce(pending, num_rows)
    for _ in range(3):
        assert driver.pending() == []
    assert rows_of(dataset, ROWS)[0]["reason"] == "unreadable"
    # The next command tries again.
    assert Driver(dataset=dataset, plan=plan, root=opened.root, make_workers=lambda: workers).pending() != []
