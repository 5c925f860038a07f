"""Pairs and edits that grow, change their words and are killed anywhere: the end state is the undisturbed one."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from producer_world import BurningDataset, FakeEncoders, Fuse, Killed, assert_same, draw, make_plan_for, produce_here
from rest_slow import rest_slow

from producers.plan import Plan
from qwenimg_dist.commands.data_verify import Tally, problems
from qwenimg_dist.data.facets import Dataset

UNIT_SIZE = 4
Event = tuple[str, Any]
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 3)),
        st.tuples(st.just("reword"), st.integers(0, 9)),
        st.tuples(st.just("resolutions"), st.sampled_from([(64,), (96,), (64, 96)])),
        st.tuples(st.just("mend"), st.just(None)),
        st.tuples(st.just("produce"), st.one_of(st.none(), st.integers(0, 60))),
    ),
    min_size=3,
    max_size=9,
)


class World:
    """A table of rows over a dozen pictures, two of which cannot be used until they are mended."""

    def __init__(self, root: Path, source: str) -> None:
        self.root, self.source = root / "source", source
        self.table = self.root / "table.jsonl"
        self.rows: list[dict[str, Any]] = []
        self.resolutions: tuple[int, ...] = (64,)
        self.edits = 0
        for number in range(12):
            draw(self.root / f"{number}.png", number, (110 + 30 * (number % 3), 100))
        cut = self.root / "4.png"
        cut.write_bytes(cut.read_bytes()[:-200])
        (self.root / "7.png").unlink()

    def append(self) -> None:
        number = len(self.rows)
        one, two, three = (f"{(number * step + step) % 12}.png" for step in (1, 5, 7))
        if self.source == "pairs":
            row = {"prompt": f"prompt {number % 4}", "chosen": one, "rejected": two}
        else:
            row = {"source": [two, three][: 1 + number % 2], "instruction": [f"do {number % 3}"], "target": one}
        self.rows.append(self.rows[number - 5] if number % 6 == 5 else row)
        self.write()

    def reword(self, index: int) -> None:
        """Other instructions for an edit. A pair under another prompt would be another pair, and the old one stays."""
        if self.source == "edits":
            self.edits += 1
            row = self.rows[index % len(self.rows)]
            self.rows[index % len(self.rows)] = {**row, "instruction": [f"edited {self.edits}", "do 1"]}
            self.write()

    def mend(self) -> None:
        """The missing picture turns up; the torn one stays torn."""
        draw(self.root / "7.png", 7, (140, 100))

    def write(self) -> None:
        self.table.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def plan(self) -> Plan:
        return make_plan_for(resolutions=self.resolutions)

    def produce(self, dataset: Dataset, encoders: FakeEncoders) -> list[Any]:
        return list(produce_here(self.table, dataset, self.plan(), encoders, f"source={self.source}"))


def live(source: str, events: Sequence[Event]) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(os, "fsync", lambda handle: None)  # durability is not what is tested, and it is slow
        world = World(Path(folder), source)
        world.append()
        dataset = BurningDataset.create(Path(folder) / "disturbed", UNIT_SIZE)
        assert isinstance(dataset, BurningDataset)
        for event, value in events:
            if event == "append":
                for _ in range(value):
                    world.append()
            elif event == "reword":
                world.reword(value)
            elif event == "mend":
                world.mend()
            elif event == "resolutions":
                world.resolutions = value
            else:
                dataset.fuse = Fuse(value)
                try:
                    world.produce(dataset, FakeEncoders(dataset.fuse))
                except Killed:
                    dataset.fuse = Fuse()
                dataset.clean()
                assert not list(problems(dataset, Tally()))
        world.mend()
        world.resolutions = (64, 96)
        dataset.fuse = Fuse()
        world.produce(dataset, FakeEncoders())
        again = FakeEncoders()
        assert world.produce(dataset, again) == []
        assert again.num_pictures == again.num_captions == 0
        calm = Dataset.create(Path(folder) / "undisturbed", UNIT_SIZE)
        world.produce(calm, FakeEncoders())
        assert_same(dataset, calm, world.plan())
        assert not list(problems(dataset, Tally()))


@pytest.mark.parametrize("fuse", range(9, 15))
def test_a_file_that_turns_up_between_a_scan_and_its_decision_is_read_at_once(fuse: int) -> None:
    live("edits", [("append", 6), ("produce", fuse)])


RELAXED = settings(deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("source", ["pairs", "edits"])
@pytest.mark.parametrize("fuse", rest_slow(range(0, 36, 4), range(0, 36, 12)))
def test_a_kill_at_each_point_then_a_resolution_and_other_words(source: str, fuse: int) -> None:
    grow = [("append", 5), ("produce", fuse), ("reword", 1), ("mend", None), ("resolutions", (64, 96))]
    live(source, [*grow, ("produce", fuse), ("append", 3), ("reword", 6), ("produce", fuse)])


@pytest.mark.parametrize("source", ["pairs", "edits"])
@settings(RELAXED, max_examples=4)
@given(events=EVENTS)
def test_any_history_ends_as_if_nothing_had_happened(source: str, events: list[Event]) -> None:
    live(source, events)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["pairs", "edits"])
@settings(RELAXED, max_examples=60)
@given(events=EVENTS)
def test_many_histories(source: str, events: list[Event]) -> None:
    live(source, events)
