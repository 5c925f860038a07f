"""Kills, retries, new files, another resolution, new captions, other thresholds in random order: the end state is the
undisturbed one, and at every moment what is committed is consistent."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from producer_world import (
    BurningDataset,
    FakeEncoders,
    Fuse,
    Killed,
    assert_same,
    draw,
    make_plan_for,
    produce_here,
)
from rest_slow import rest_slow

from producers.plan import Plan
from qwenimg_dist.data.facets import Dataset, Part
from qwenimg_dist.schema import LISTING, ROWS, SCAN, caption_key, is_dedup

UNIT_SIZE = 4
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 4)),
        st.tuples(st.just("recaption"), st.integers(0, 11)),
        st.tuples(st.just("resolutions"), st.sampled_from([(64,), (96,), (64, 96)])),
        st.tuples(st.just("min_side"), st.sampled_from([64, 90, 120])),
        st.tuples(st.just("near"), st.sampled_from([None, 0, 6])),
        st.tuples(st.just("produce"), st.one_of(st.none(), st.integers(0, 60))),
    ),
    min_size=3,
    max_size=12,
)


class World:
    """A source folder that grows, and the settings of the moment."""

    def __init__(self, root: Path) -> None:
        self.source = root / "source"
        self.count = 0
        self.edits = 0
        self.resolutions: tuple[int, ...] = (64,)
        self.min_side = 64
        self.near: int | None = 6
        """Distance of near duplicates, None where they are kept."""

    def append(self) -> None:
        """Names sort in the order of appearance, so that any batching of appends lists alike."""
        number = self.count
        file = self.source / f"{number:04d}.png"
        side = [70, 100, 130, 60][number % 4]
        alike = number - 3 if number % 5 == 4 else number  # the same picture at another size
        draw(file, alike, (side, side + 10 * (number % 3)), f"caption {number % 5}")
        if number % 7 == 5:
            shutil.copy(self.source / f"{number - 2:04d}.png", file)
        if number % 7 == 6:
            file.write_bytes(file.read_bytes()[:-200])
        if number % 11 == 3:
            file.with_suffix(".txt").unlink()
        self.count += 1

    def recaption(self, index: int) -> None:
        text = self.source / f"{index % self.count:04d}.txt"
        if text.exists():
            self.edits += 1
            text.write_text(f"edited {self.edits}")

    def plan(self) -> Plan:
        near = ["dedup.near=true", f"dedup.distance={self.near}"] if self.near is not None else []
        return make_plan_for(f"filters.resolution.min_side={self.min_side}", *near, resolutions=self.resolutions)


def check_consistent(dataset: Dataset) -> None:
    """Whatever the newest rows part promises is there, and nothing committed names a tar that is not."""
    for facet in dataset.facets():
        for part in dataset.parts(facet):
            for tar in dataset.tars(part):
                assert dataset.tar(facet, tar.name).stat().st_size == tar.size_bytes
    for unit in dataset.units(ROWS):
        newest = [part for part in dataset.parts(ROWS) if part.unit == unit][-1]
        inputs = dataset.meta(newest)["inputs"]

        def used(facet: str, unit: int = unit, inputs: dict[str, int] = inputs) -> list[dict[str, object]]:
            parts = [Part(facet=facet, unit=unit, part=number) for number in range(inputs[facet])]
            return list(dataset.merge(parts).to_pylist())

        decided = {entry["row"]: entry for entry in dataset.read_unit(ROWS, unit).to_pylist()}
        listed = {entry["row"]: entry for entry in used(LISTING)}
        assert set(decided) == set(listed) == {entry["row"] for entry in used(SCAN)}
        kept = [row for row, entry in decided.items() if entry["status"] == "kept"]
        for facet in inputs:
            if facet.startswith("text-"):
                keys = {entry["key"] for entry in used(facet)}
                assert caption_key("") in keys
                assert {caption_key(text) for row in kept for text in listed[row]["captions"]} <= keys
            if facet.startswith("latents-"):
                resolution = int(facet.split("-")[1])
                there = {entry["row"] for entry in used(facet)}
                wide = make_plan_for(resolutions=(resolution,))
                fitting = {r for r in kept if wide.placements(decided[r]["height"], decided[r]["width"])}
                assert fitting <= there
        assert sum(is_dedup(facet) for facet in inputs) == 1
        near = [entry for facet in inputs if facet.startswith("near-") for entry in used(facet)]
        copies = {entry["row"] for entry in near if entry["near_duplicate_of"] >= 0}
        assert copies == {row for row, entry in decided.items() if entry["reason"] == "near_duplicate"}


def run(dataset: BurningDataset, world: World, fuse: int | None) -> None:
    dataset.fuse = Fuse(fuse)
    try:
        produce_here(world.source, dataset, world.plan(), FakeEncoders(dataset.fuse))
    except Killed:
        dataset.fuse = Fuse()


RELAXED = settings(deadline=None, suppress_health_check=list(HealthCheck))


@settings(RELAXED, max_examples=8)
@given(events=EVENTS)
def test_any_history_ends_as_if_nothing_had_happened(events: list[tuple[str, object]]) -> None:
    live(events)


@pytest.mark.slow
@settings(RELAXED, max_examples=150)
@given(events=EVENTS)
def test_many_histories(events: list[tuple[str, object]]) -> None:
    live(events)


@pytest.mark.parametrize("fuse", rest_slow(range(0, 40, 3), range(0, 40, 9)))
def test_a_kill_at_each_point_then_a_resolution_and_new_captions(fuse: int) -> None:
    grow = [("append", 4), ("append", 3), ("produce", fuse), ("recaption", 1), ("resolutions", (64, 96))]
    live([*grow, ("produce", fuse), ("append", 2), ("min_side", 120), ("produce", fuse), ("min_side", 64)])


def test_a_resolution_left_out_for_a_while_is_not_promised_for_rows_that_came_meanwhile() -> None:
    both = [("resolutions", (64, 96)), ("produce", None), ("resolutions", (64,))]
    live([("append", 1), *both, ("append", 3), ("produce", None), ("recaption", 0), ("produce", None)])
    live([("append", 3), ("min_side", 120), *both, ("min_side", 64), ("produce", None)])


def live(events: Sequence[tuple[str, object]]) -> None:
    """Live through the events, then compare with a life in which only the last state of the source was ever seen."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(os, "fsync", lambda handle: None)  # durability is not what is tested, and it is slow
        world = World(Path(folder))
        world.append()
        dataset = BurningDataset.create(Path(folder) / "disturbed", UNIT_SIZE)
        assert isinstance(dataset, BurningDataset)
        for event, value in events:
            if event == "append":
                for _ in range(int(str(value))):
                    world.append()
            elif event == "recaption":
                world.recaption(int(str(value)))
            elif event == "produce":
                run(dataset, world, value)  # type: ignore[arg-type]
                dataset.clean()
                check_consistent(dataset)
            else:
                setattr(world, event, value)
        world.resolutions = (64, 96)
        run(dataset, world, None)
        check_consistent(dataset)
        again = FakeEncoders()
        assert produce_here(world.source, dataset, world.plan(), again) == []
        assert again.num_pictures == again.num_captions == 0

        calm = Dataset.create(Path(folder) / "undisturbed", UNIT_SIZE)
        produce_here(world.source, calm, world.plan(), FakeEncoders())
        assert_same(dataset, calm, world.plan())
