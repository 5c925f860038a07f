"""`produce follow=true`: what the source does not give now is waited for, damage of the data set ends the command."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from producer_world import SCORERS, FakeEncoders, draw, make_plan_for, rows_of

from producers import listing
from producers.driver import Driver
from producers.progress import ProduceProgress
from producers.sources.base import Found
from producers.sources.folder import Folder
from producers.workers import InlineWorkers, Outcome, Task
from qwenimg_dist.commands import produce_rounds
from qwenimg_dist.config import FolderSource
from qwenimg_dist.data.facets import DataError, Dataset
from qwenimg_dist.schema import LISTING, ROWS, SOURCE_COMPLETE


class Told(ProduceProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def begin(self, num_units: int) -> None: ...

    def unit_done(self, report: Any) -> None: ...

    def say(self, text: str) -> None:
        self.lines.append(text)


class Script:
    """A source that does at each look what stands in the script, and stops the command with the last."""

    def __init__(self, root: Path, stop: threading.Event, *looks: Callable[[Found], Found]) -> None:
        self.real = Folder(FolderSource(kind="folder", path=str(root)))
        self.root, self._stop, self._looks = str(root), stop, list(looks)

    def find(self, *, min_age_s: float = 0.0) -> Found:
        look = self._looks.pop(0) if self._looks else (lambda found: found)
        if not self._looks:
            self._stop.set()
        return look(self.real.find())


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.setattr(produce_rounds, "_FOLLOW_POLL_S", 0.0)
    for number in range(2):
        draw(tmp_path / "source" / f"{number}.png", number, caption=f"caption {number}")
    dataset, plan, root = Dataset.create(tmp_path / "data", 4), make_plan_for(), tmp_path / "source"
    workers = InlineWorkers(dataset, plan, str(root), FakeEncoders(), SCORERS)
    driver = Driver(dataset=dataset, plan=plan, root=str(root), make_workers=lambda: workers)
    return SimpleNamespace(dataset=dataset, driver=driver, workers=workers, root=root, stop=threading.Event())


def follow(world: SimpleNamespace, *looks: Callable[[Found], Found]) -> list[str]:
    source, told = Script(world.root, world.stop, *looks), Told()
    produce_rounds.rounds(world.driver, source, source.real.find(), told, world.stop, True, lambda num: None)
    return told.lines


def not_now(found: Found) -> Found:
    raise ValueError("list.jsonl: half of it is there")


def breaks_off(found: Found) -> Found:
    def rows() -> Iterator[Any]:
        yield next(iter(found.rows))
        raise ValueError("list.jsonl was changed while it was read")

    return replace(found, rows=rows())


def test_what_the_source_does_not_give_now_is_waited_for_and_said_once(world: SimpleNamespace) -> None:
    def grown(found: Found) -> Found:
        draw(world.root / "2.png", 2, caption="a third")
        return Folder(FolderSource(kind="folder", path=str(world.root))).find()

    lines = follow(world, not_now, not_now, breaks_off, not_now, grown)
    assert [line for line in lines if line.startswith("looking again")] == [
        "looking again: list.jsonl: half of it is there",
        "looking again: list.jsonl was changed while it was read",
        "looking again: list.jsonl: half of it is there",
    ]
    assert len(rows_of(world.dataset, ROWS)) == 3


def test_what_a_look_listed_before_it_broke_off_is_made_ready(
    world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_BATCH_ROWS", 4)
    listed: list[tuple[int, ...]] = []

    def grown_and_broken(found: Found) -> Found:
        for number in range(2, 14):
            draw(world.root / f"{number:02d}.png", number, caption=f"caption {number}")

        def rows() -> Iterator[Any]:
            yield from islice(Folder(FolderSource(kind="folder", path=str(world.root))).find().rows, 13)
            raise ValueError("list.jsonl was changed while it was read")

        return replace(found, rows=rows())

    def sound(found: Found) -> Found:
        listed.append(tuple(world.dataset.units(LISTING)))
        return found

    follow(world, grown_and_broken, not_now, sound)
    assert listed == [(0, 1, 2)]  # of the look that broke off
    assert world.dataset.units(LISTING) == world.dataset.units(ROWS) == [0, 1, 2, 3]
    assert len(rows_of(world.dataset, ROWS)) == 14
    assert (world.dataset.root / SOURCE_COMPLETE).exists()


def test_a_file_that_is_still_written_is_read_at_a_later_look(world: SimpleNamespace) -> None:
    """Half a picture would be a lasting fault, whether it was listed so, or was missing when it was listed."""
    world.driver.min_age_s = 60.0
    old = time.time() - 300
    whole = [file.read_bytes() for file in (world.root / "0.png", world.root / "1.png")]
    for file in (world.root / "0.png", world.root / "1.png"):
        os.utime(file, (old, old))
    (world.root / "0.png").write_bytes(whole[0][: len(whole[0]) // 2])
    (world.root / "1.png").unlink()
    lines = [f'{{"file_name": "{number}.png", "text": "words"}}\n' for number in range(2)]
    (world.root / "metadata.jsonl").write_text("".join(lines))
    seen: list[dict[int, str]] = []

    def told(found: Found) -> Found:
        seen.append({row: entry["reason"] for row, entry in rows_of(world.dataset, ROWS).items()})
        return found

    def appears(found: Found) -> Found:
        (world.root / "1.png").write_bytes(whole[1][: len(whole[1]) // 2])
        return told(found)

    def complete(found: Found) -> Found:
        for number in range(2):
            (world.root / f"{number}.png").write_bytes(whole[number])
            os.utime(world.root / f"{number}.png", (old, old))
        return told(found)

    follow(world, appears, told, complete, told)
    assert seen == [{0: "unreadable", 1: "missing_file"}] * 3 + [{0: "", 1: ""}]


def test_damage_of_the_data_set_ends_the_command(world: SimpleNamespace) -> None:
    def damaged(found: Found) -> Found:
        part = world.dataset.parts(LISTING)[0]
        file = world.dataset.parquet(part)
        file.write_bytes(file.read_bytes()[:-50])
        world.dataset.refresh()
        return found

    with pytest.raises(DataError, match="listing"):
        follow(world, not_now, damaged)


def test_outcomes_of_another_round_are_not_counted(world: SimpleNamespace) -> None:
    """A round that broke off leaves tasks with the workers, whose ends the next one hears."""
    begun: list[Task] = []
    wait = world.workers.wait

    def late(timeout_s: float) -> list[Outcome]:
        if not begun:
            begun.append(Task(kind="encode", unit=0))
            return [Outcome(task=begun[0])] * 3
        return wait(timeout_s)

    world.workers.wait = late
    follow(world)
    assert len(rows_of(world.dataset, ROWS)) == 2
    assert (world.dataset.root / SOURCE_COMPLETE).exists()
