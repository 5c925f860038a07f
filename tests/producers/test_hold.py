"""Producers are held back by bytes ahead of training: never beyond the bound for a run that stands still, never so
that it waits in vain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from producer_world import SCORERS, FakeEncoders, Recorder, draw, load_config_once, make_plan_for

from producers import driver as driver_module
from producers import hold as hold_module
from producers.driver import Driver
from producers.hold import Hold
from producers.plan import Plan
from producers.sources import open_source
from producers.workers import InlineWorkers
from qwenimg_dist.data import generations as generations_module
from qwenimg_dist.data.ahead import part_bytes, read_progress
from qwenimg_dist.data.catalog import RunFacets
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.data.generations import Generations
from qwenimg_dist.data.ledger_config import LedgerConfig
from qwenimg_dist.data.phases import PlannedPhase
from qwenimg_dist.schema import ROWS

UNITS = 10
UNIT_SIZE = 2


def advance(consumer: Generations, step: int) -> str:
    """As training does; what it tells producers is there when they look."""
    answer = consumer.advance(step)
    consumer.progress.flush()
    return answer


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_module, "_POLL_S", 0.001)
    monkeypatch.setattr(hold_module, "_LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(generations_module, "_TELL_EVERY_S", 0.0)


class World:
    """A folder of pictures of one size, its data set, and a run beside them."""

    def __init__(self, root: Path) -> None:
        for number in range(UNITS * UNIT_SIZE):
            draw(root / "source" / f"{number:03d}.png", number, (80, 80), f"caption {number}")
        self.plan: Plan = make_plan_for()
        self.dataset = Dataset.create(root / "data", UNIT_SIZE)
        self.run = root / "run"
        self.source = open_source(load_config_once(()).source.model_copy(update={"path": str(root / "source")}))
        self.recorder = Recorder()
        self.said: list[str] = []

    def consumer(self, batch: int = 2, steps: int = 1000, *, follow: bool = True) -> Generations:
        phase = PlannedPhase(
            index=0,
            first_step=0,
            last_step=steps,
            weights={64: 1.0},
            global_batch=batch,
            micro_batch_tokens=100,
            lr_scale=1.0,
            where=None,
        )
        ledger = LedgerConfig(phases=(phase,), seed=0, caption_dropout=0.0, where=None, held_out=0.0, max_held_out=0)
        facets = RunFacets(text=self.plan.text_facet, latents=dict(self.plan.latents_facets))
        return Generations(self.run, Dataset.open(self.dataset.root), facets, ledger, follow=follow)

    def drive(self, bound: int, each: Callable[[], bool]) -> bool:
        """Produce; `each` is called again and again, and ends it by True."""
        hold = Hold(self.dataset, self.plan.facets, self.run, bound, say=self.said.append)
        workers = InlineWorkers(self.dataset, self.plan, self.source.root, FakeEncoders(), SCORERS)
        driver = Driver(
            dataset=self.dataset,
            plan=self.plan,
            root=self.source.root,
            make_workers=lambda: workers,
            observer=self.recorder,
            stopping=each,
            hold=hold,
        )
        change = driver.list_source(self.source.find())
        return driver.produce(driver.pending(), change.num_rows)

    @property
    def sizes(self) -> list[int]:
        facets = self.plan.facets
        return [
            part_bytes(self.dataset, [part for facet in facets for part in self.dataset.unit_parts(facet, unit)])
            for unit in self.dataset.units(ROWS)
        ]


def after(polls: int) -> Callable[[], bool]:
    left = iter(range(polls))
    return lambda: next(left, None) is None


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def size_of_a_unit(tmp_path: Path) -> int:
    other = World(tmp_path / "other")
    other.drive(1, after(100))
    return max(other.sizes)


def test_a_run_that_has_not_begun_is_produced_for_up_to_the_bound_also_by_a_second_command(
    world: World, tmp_path: Path
) -> None:
    bound = int(3.4 * size_of_a_unit(tmp_path))
    assert not world.drive(bound, after(300))
    assert len(world.sizes) == 3
    assert sum(world.sizes) <= bound
    assert len(world.said) == 1
    assert f"cluster.max_ahead_bytes={bound}" in world.said[0]
    assert not world.drive(bound, after(300))  # knows what is there
    assert len(world.sizes) == 3


def test_a_stalled_run_holds_them_and_one_that_trains_is_followed_to_the_end(world: World, tmp_path: Path) -> None:
    bound = int(3.4 * size_of_a_unit(tmp_path))
    consumer, step, most = world.consumer(), 0, 0.0
    stalled = after(200)

    def train() -> bool:
        nonlocal step, most
        trained = step * 2 * sum(world.sizes) / max(1, 2 * len(world.sizes))
        most = max(most, sum(world.sizes) - trained)
        if len(world.sizes) == 5 and not stalled():
            return False
        if advance(consumer, step) == "ready":
            step += 1
        return False

    assert world.drive(bound, train)
    assert len(world.sizes) == UNITS
    assert most <= 1.1 * bound
    while step < 2 * UNITS + 3:  # epochs after everything is there hold nobody, and need no further unit
        assert advance(consumer, step) == "ready"
        step += 1


def test_a_run_that_needs_more_than_the_bound_is_not_left_waiting(world: World, tmp_path: Path) -> None:
    consumer, polls, step = world.consumer(batch=7), iter(range(100_000)), 0

    def train() -> bool:
        nonlocal step
        if advance(consumer, step) == "ready":
            step += 1
        return next(polls, None) is None

    assert world.drive(size_of_a_unit(tmp_path) // 2, train)
    assert step > 1


def test_a_run_that_waits_gets_no_more_than_it_waits_for(world: World, tmp_path: Path) -> None:
    """It may take its time to notice."""
    consumer, size = world.consumer(), size_of_a_unit(tmp_path)
    polls = after(300)

    def wait() -> bool:
        if not world.sizes:
            advance(consumer, 0)
        return polls()

    assert not world.drive(int(0.4 * size), wait)
    assert len(world.sizes) == 1


def test_a_run_that_died_while_it_waited_is_not_produced_for_without_end(world: World, tmp_path: Path) -> None:
    consumer = world.consumer()
    assert world.dataset.units(ROWS) == []
    assert advance(consumer, 0) == "wait"
    told = read_progress(world.run)
    assert told is not None
    assert told.awaited == 1
    size = size_of_a_unit(tmp_path)
    assert not world.drive(int(2.4 * size), after(200))
    assert len(world.sizes) == 2


def test_a_run_at_its_last_step_or_without_follow_holds_nobody(world: World, tmp_path: Path) -> None:
    size = size_of_a_unit(tmp_path)
    assert not world.drive(int(1.4 * size), after(100))
    consumer = world.consumer(steps=1)
    assert advance(consumer, 0) == "ready"
    assert world.drive(int(1.4 * size), after(10_000))

    other = World(tmp_path / "settled")
    assert not other.drive(int(1.4 * size), after(100))
    settled = other.consumer(follow=False)
    assert advance(settled, 0) == "ready"
    assert other.drive(int(1.4 * size), after(10_000))
