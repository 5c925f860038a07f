"""A copy is rejected only for a row that is kept: first copies that filters on pixels reject cost nothing, whatever the
order of work, and only what a copy is compared with is opened for it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from producer_world import (
    SCORERS,
    BurningDataset,
    FakeEncoders,
    Fuse,
    Killed,
    draw,
    make_plan_for,
    produce_here,
    rows_of,
)

from producers import pictures
from producers.dedup import ADMITTED, REJECTED, UNKNOWN, DedupRule
from producers.driver import Driver
from producers.filters.base import BoundFilter, Filter, FilterParams, Rejection, number
from producers.load import ImageFault
from producers.near import settle
from producers.near_index import HammingIndex
from producers.plan import Plan
from producers.scan import UNREADABLE
from producers.sources import open_source
from producers.workers import InlineWorkers, Outcome, Task
from qwenimg_dist.compose import load_config
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.schema import ROWS, SCAN

UNIT_SIZE = 4
NUMBERS = (0, 1, 0, 0, 4, 1, 0, 7, 1, 0, 7, 11)
"""Which picture each row shows."""
GREY = frozenset({0, 2, 5, 7})


COLOUR = ("filters.saturation.enabled=true", "filters.saturation.min_colourfulness=3")


def near_plan(*overrides: str) -> Plan:
    return make_plan_for("dedup.near=true", *COLOUR, *overrides)


def picture(file: Path, shows: int, *, quality: int, grey: bool) -> None:
    rng = np.random.default_rng(shows)
    pixels = np.zeros((160, 200, 3))
    for cells, weight in ((4, 90), (9, 60), (32, 70)):
        grid = rng.uniform(0, weight, (cells, cells, 3)).astype(np.uint8)
        pixels += np.asarray(Image.fromarray(grid).resize((200, 160), Image.Resampling.BICUBIC), dtype=np.float64)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    image = image.convert("L").convert("RGB") if grey else image
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, quality=quality)
    file.with_suffix(".txt").write_text(f"a view of {shows} hills")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for row, shows in enumerate(NUMBERS):
        picture(tmp_path / "source" / f"{row:02d}.jpg", shows, quality=97 - 2 * row, grey=row in GREY)
    return tmp_path / "source"


EXPECTED = dict.fromkeys(range(12), "kept")
EXPECTED |= dict.fromkeys((0, 2, 7), "too_pale") | dict.fromkeys((5, 6, 8, 9), "near_duplicate")
"""Row 3 is the first of its kind in colour; row 5 is a copy of row 1, which is kept, whatever it looks like itself."""


def statuses(dataset: Dataset) -> dict[int, str]:
    return {row: entry["reason"] or entry["status"] for row, entry in rows_of(dataset, ROWS).items()}


def test_a_grey_first_copy_does_not_cost_the_ones_in_colour_after_it(source: Path, tmp_path: Path) -> None:
    dataset = Dataset.create(tmp_path / "data", UNIT_SIZE)
    encoders = FakeEncoders()
    produce_here(source, dataset, near_plan(), encoders)
    assert statuses(dataset) == EXPECTED
    assert encoders.num_pictures == 5
    decided = rows_of(dataset, ROWS)
    assert {row: decided[row]["detail"].partition(":")[0] for row in (5, 6, 8, 9)} == {
        5: "looks like row 1",
        6: "looks like row 3",
        8: "looks like row 1",
        9: "looks like row 3",
    }


def test_other_thresholds_settle_anew_without_opening_a_picture(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Dataset.create(tmp_path / "data", UNIT_SIZE)
    opened = count_opened(monkeypatch)
    produce_here(source, dataset, make_plan_for(*COLOUR), FakeEncoders())
    assert len(opened) == 12
    produce_here(source, dataset, near_plan(), FakeEncoders())
    assert statuses(dataset) == EXPECTED
    produce_here(source, dataset, near_plan("filters.saturation.min_colourfulness=0"), FakeEncoders())
    assert {row for row, status in statuses(dataset).items() if status == "kept"} == {0, 1, 4, 7, 11}
    # What was grey has no latents yet; nothing else was opened again.
    assert sorted(opened[12:]) == ["00.jpg", "07.jpg"]
    produce_here(source, dataset, near_plan(), FakeEncoders())
    assert statuses(dataset) == EXPECTED
    assert len(opened) == 14


def test_only_what_a_copy_is_compared_with_is_opened_for_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = count_opened(monkeypatch)
    dataset = Dataset.create(tmp_path / "data", UNIT_SIZE)
    produce_here(source, dataset, near_plan(), FakeEncoders())
    twice = {name for name in opened if opened.count(name) > 1}
    assert twice <= {"00.jpg", "01.jpg", "02.jpg", "03.jpg", "07.jpg"}  # first copies, as far as they were asked for
    assert all(opened.count(name) <= 2 for name in opened)
    assert "06.jpg" not in opened  # a copy of a kept row


def count_opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    opened: list[str] = []
    open_verified = pictures.open_verified

    def counted(root: str, uri: str, sha256: str | None) -> Any:
        opened.append(uri)
        return open_verified(root, uri, sha256)

    monkeypatch.setattr(pictures, "open_verified", counted)
    return opened


@pytest.mark.parametrize("late", [False, True])
def test_a_first_copy_that_cannot_be_opened_for_a_moment_still_counts(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Whether its copy asks for the verdict, or reads the decision of its unit when it comes later."""
    open_verified, failures = pictures.open_verified, ["03.jpg"]

    def failing_once(root: str, uri: str, sha256: str | None) -> Any:
        if uri in failures:
            failures.remove(uri)
            raise ImageFault(UNREADABLE, "Stale file handle")
        return open_verified(root, uri, sha256)

    monkeypatch.setattr(pictures, "open_verified", failing_once)
    dataset = Dataset.create(tmp_path / "data", UNIT_SIZE)
    if late:
        aside = [file for file in source.iterdir() if int(file.stem) > 3]
        for file in aside:
            file.rename(tmp_path / file.name)
        produce_here(source, dataset, near_plan(), FakeEncoders())
        assert statuses(dataset)[3] == "unreadable"
        for file in aside:
            (tmp_path / file.name).rename(file)
    produce_here(source, dataset, near_plan(), FakeEncoders())
    assert not failures
    produce_here(source, dataset, near_plan(), FakeEncoders())
    assert statuses(dataset) == EXPECTED


class _Shuffled(InlineWorkers):
    """Three tasks at a time, which end in random order."""

    rng: np.random.Generator
    num_workers = 3

    def num_idle(self) -> int:
        return 3 - len(self._queue)

    def wait(self, timeout_s: float) -> list[Outcome]:
        self._queue.rotate(int(self.rng.integers(0, 3)))
        return list(super().wait(timeout_s))

    def submit(self, task: Task) -> None:
        self._queue.append(task)


def test_the_kept_set_is_the_same_for_every_order_of_work(source: Path, tmp_path: Path) -> None:
    plan = near_plan()
    assert plan.near is not None
    calm = Dataset.create(tmp_path / "calm", UNIT_SIZE)
    produce_here(source, calm, plan, FakeEncoders())
    opened = open_source(load_config([f"source.path={source}"]).source)
    for seed in range(5):
        dataset = Dataset.create(tmp_path / f"shuffled {seed}", UNIT_SIZE)
        workers = _Shuffled(dataset, plan, opened.root, FakeEncoders(), SCORERS)
        workers.rng = np.random.default_rng(seed)

        def make_workers(these: _Shuffled = workers) -> _Shuffled:
            return these

        driver = Driver(dataset=dataset, plan=plan, root=opened.root, make_workers=make_workers)
        change = driver.list_source(opened.find())
        assert driver.produce(driver.pending(), change.num_rows)
        for facet in (SCAN, plan.dedup.facet, plan.near.facet, ROWS):
            assert rows_of(dataset, facet) == rows_of(calm, facet), (seed, facet)


def test_the_kept_set_is_the_same_wherever_it_was_killed(source: Path, tmp_path: Path) -> None:
    plan = near_plan()
    assert plan.near is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        for fuse in range(2, 40, 6):
            dataset = BurningDataset.create(tmp_path / f"killed {fuse}", UNIT_SIZE)
            assert isinstance(dataset, BurningDataset)
            dataset.fuse = Fuse(fuse)
            with pytest.raises(Killed):
                produce_here(source, dataset, plan, FakeEncoders(dataset.fuse))
            dataset.fuse = Fuse()
            dataset.clean()
            produce_here(source, dataset, plan, FakeEncoders())
            assert statuses(dataset) == EXPECTED, fuse


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**32),
    distance=st.sampled_from([0, 1, 3, 6]),
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=5),
    share=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
)
def test_settling_is_the_rule_and_asks_for_nothing_else(
    seed: int, distance: int, sizes: list[int], share: float
) -> None:
    """The rule, word for word: a row is a near duplicate if an admitted row before it that is none is within reach."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, 3, dtype=np.uint64)[rng.integers(0, 3, sum(sizes))]
    for _ in range(distance + 1):
        hashes ^= np.uint64(1) << rng.integers(0, 64, len(hashes), dtype=np.uint64)
    rows, admitted = np.arange(len(hashes)) * 3, rng.random(len(hashes)) >= share
    known: dict[int, int] = {}
    index, found = HammingIndex(distance), {}

    def ask(these: Any) -> Any:
        return np.array([known.get(int(row), UNKNOWN) for row in these], dtype=np.int8)

    for end in np.cumsum(sizes):
        unit = slice(len(found), end)
        near, _, wanted = settle(hashes[unit], rows[unit], index, ask)
        while wanted:
            assert not wanted & known.keys()
            known |= {row: ADMITTED if admitted[row // 3] else REJECTED for row in wanted}
            near, _, wanted = settle(hashes[unit], rows[unit], index, ask)
        index.add(hashes[unit][near == -1], rows[unit][near == -1])
        found |= dict(zip(rows[unit].tolist(), near.tolist(), strict=True))
    expected, kept = {}, []
    compared: set[int] = set()
    for row, one in zip(rows.tolist(), hashes, strict=True):
        bits = {other: int(np.bitwise_count(one ^ hashes[other // 3])) for other in kept}
        compared |= {other for other, differ in bits.items() if differ <= distance}
        within = [(differ, other) for other, differ in bits.items() if differ <= distance and admitted[other // 3]]
        expected[row] = min(within)[1] if within else -1
        if not within:
            kept.append(row)
    assert found == expected
    assert known.keys() == compared


class _Params(FilterParams):
    pass


def alike() -> BoundFilter:
    """A filter that compares pixels and captions: the captions must say "view"."""

    def load(params: _Params, resources: Any) -> Callable[[Any], list[dict[str, float | str]]]:
        return lambda facts: [{"alike": float(any("view" in one for one in each.captions))} for each in facts]

    one: Filter[Any] = Filter(
        params=_Params,
        stage=3,
        looks_at="pixels",
        scores=("alike",),
        load=load,
        reads_captions=True,
        admit=lambda values, params: None if number(values, "alike") else Rejection(reason="unlike", detail="no view"),
    )
    return BoundFilter(name="alike-of-tests", filter=one, params=_Params())


def test_an_exact_copy_with_a_better_caption_is_kept(tmp_path: Path) -> None:
    source = tmp_path / "source"
    said = ["some words", "some letters", "a view", "another view", "a view", "some hills"]
    for row, words in enumerate(said):
        draw(source / f"{row}.png", 1 if row == 5 else 0, caption=words)
    shutil.copy(source / "0.png", source / "6.png")
    (source / "6.txt").write_text("a further view")
    plain = make_plan_for()
    filters = (*plain.filters, alike())
    pixels = tuple(one for one in filters if one.filter.looks_at == "pixels")
    plan = replace(plain, filters=filters, dedup=DedupRule(filters=plain.dedup.filters, pixels=pixels))
    assert plan.dedup.facet != plain.dedup.facet
    assert load_config(["filters.similarity.enabled=true", "filters.similarity.path=x"]).filters["similarity"]
    for size in (2, 4, 100):
        dataset = Dataset.create(tmp_path / f"of {size}", size)
        produce_here(source, dataset, plan, FakeEncoders())
        assert list(statuses(dataset).values()) == [
            *("unlike", "unlike", "kept", "duplicate", "duplicate", "unlike", "duplicate")
        ]
        (source / "7.png").write_bytes((source / "0.png").read_bytes())
        (source / "7.txt").write_text("a late view")
        produce_here(source, dataset, plan, FakeEncoders())  # from what is committed alone
        assert statuses(dataset)[7] == "duplicate"
        assert json.loads(json.dumps(rows_of(dataset, plan.dedup.facet)[7]))["duplicate_of"] == 2
        (source / "7.png").unlink()
        (source / "7.txt").unlink()


def test_rows_appended_in_the_same_round_do_not_hinder_a_verdict_on_their_unit(tmp_path: Path) -> None:
    """A late row of the first unit looks like one of the last, to which this very look has appended another."""
    source, dataset = tmp_path / "source", Dataset.create(tmp_path / "data", UNIT_SIZE)
    for row, shows in enumerate((0, 1, 4, 7, 0, 11)):
        picture(source / f"{row:02d}.jpg", shows, quality=95, grey=False)
    with Image.open(source / "04.jpg") as image:
        image.resize((100, 80)).save(source / "04.jpg", quality=95)  # too small for the class: its verdict is not known
    (source / "00.txt").unlink()
    plan = make_plan_for("dedup.near=true", *COLOUR, resolutions=(128,))
    produce_here(source, dataset, plan, FakeEncoders())
    assert statuses(dataset) == {0: "no_caption", 1: "kept", 2: "kept", 3: "kept", 4: "too_small", 5: "kept"}
    (source / "00.txt").write_text("a view of some hills")
    picture(source / "06.jpg", 13, quality=95, grey=False)
    produce_here(source, dataset, plan, FakeEncoders())
    assert statuses(dataset) == {0: "near_duplicate", 4: "too_small"} | dict.fromkeys((1, 2, 3, 5, 6), "kept")
