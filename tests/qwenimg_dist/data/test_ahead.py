"""What a run that follows tells of itself: how much of which units is not trained on, and whether it waits."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
from fake_dataset import FakeProducer, make_rows

from qwenimg_dist.data import generations as generations_module
from qwenimg_dist.data.ahead import (
    FILE,
    ProgressWriter,
    RunProgress,
    Stretch,
    bytes_ahead,
    part_bytes,
    read_progress,
    untrained,
)
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.data.generations import Generations
from qwenimg_dist.data.ledger_config import LedgerConfig
from qwenimg_dist.data.phases import PlannedPhase
from qwenimg_dist.schema import ROWS


def phase(index: int, first: int, last: int, weights: dict[int, float], batch: int) -> PlannedPhase:
    return PlannedPhase(
        index=index,
        first_step=first,
        last_step=last,
        weights=weights,
        global_batch=batch,
        micro_batch_tokens=100,
        lr_scale=1.0,
        where=None,
    )


def config(*phases: PlannedPhase) -> LedgerConfig:
    return LedgerConfig(phases=phases, seed=3, caption_dropout=0.0, where=None, held_out=0.0, max_held_out=0)


def unit_bytes(producer: FakeProducer) -> dict[int, int]:
    dataset, names = producer.dataset, producer.facets.names
    return {
        unit: part_bytes(dataset, [part for facet in names for part in dataset.unit_parts(facet, unit)])
        for unit in dataset.units(ROWS)
    }


def add_units(producer: FakeProducer, units: int) -> None:
    first = producer.num_units
    producer.add(make_rows(4 * units, start=len(producer.rows)))
    producer.produce(range(first, producer.num_units))


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generations_module, "_TELL_EVERY_S", 0.0)


def open_run(run: Path, producer: FakeProducer, ledger: LedgerConfig, bound: int | None = None) -> Generations:
    dataset = Dataset.open(producer.dataset.root)
    return Generations(run, dataset, producer.facets, ledger, follow=True, max_ahead_bytes=bound)


def told_by(run: Generations) -> RunProgress:
    run.progress.flush()
    told = read_progress(run.run)
    assert told is not None
    return told


def test_units_that_several_generations_cover_are_untrained_as_far_as_none_came_to_them() -> None:
    used = [
        Stretch(first=0, end=2, share=1.0),
        Stretch(first=2, end=6, share=0.5),
        Stretch(first=0, end=8, share=0.25),
    ]
    assert untrained(used) == (8, (Stretch(first=2, end=6, share=0.375), Stretch(first=6, end=8, share=0.75)))
    assert untrained([]) == (0, ())


def test_bytes_fall_with_each_batch_and_a_run_that_has_used_all_up_waits(tmp_path: Path) -> None:
    producer = FakeProducer(tmp_path / "data", unit_size=4)
    run = open_run(tmp_path / "run", producer, config(phase(0, 0, 100, {32: 1.0}, 2)))
    assert run.advance(0) == "wait"
    told = told_by(run)
    assert told.awaited == 1
    assert told.num_units == 0
    add_units(producer, 2)
    sizes = unit_bytes(producer)
    assert bytes_ahead(told, sizes) == sum(sizes.values())
    left = []
    for step in range(4):
        assert run.advance(step) == "ready"
        told = told_by(run)
        assert (told.step, told.awaited, told.done) == (step, 0, False)
        left.append(bytes_ahead(told, sizes) / sum(sizes.values()))
    assert left == pytest.approx([1.0, 0.75, 0.5, 0.25])
    add_units(producer, 1)
    sizes = unit_bytes(producer)
    assert bytes_ahead(told, sizes) == pytest.approx(0.25 * (sizes[0] + sizes[1]) + sizes[2])
    assert run.advance(4) == "ready"  # the next generation: what was before it is trained on
    told = told_by(run)
    assert bytes_ahead(told, sizes) == sizes[2]
    assert run.advance(6) == "wait"
    told = told_by(run)
    assert (told.awaited, bytes_ahead(told, sizes)) == (4, 0)
    # A start from an earlier checkpoint has it to train on again.
    again = open_run(tmp_path / "run", producer, run.config)
    again.verify()
    again.advance(2)
    told = told_by(again)
    assert bytes_ahead(told, sizes) == pytest.approx(0.5 * (sizes[0] + sizes[1]) + sizes[2])


def test_two_resolutions_two_phases_and_the_end(tmp_path: Path) -> None:
    producer = FakeProducer(tmp_path / "data", unit_size=4, resolutions=(32, 64))
    phases = phase(0, 0, 4, {32: 1.0, 64: 1.0}, 2), phase(1, 4, 8, {64: 1.0}, 2)
    run = open_run(tmp_path / "run", producer, config(*phases))
    add_units(producer, 2)  # four batches at each resolution
    sizes = unit_bytes(producer)
    total = sum(sizes.values())
    shares = []
    for step in range(8):
        assert run.advance(step) == "ready"
        told = told_by(run)
        assert told.done == (step == 7)
        shares.append(bytes_ahead(told, sizes) / total)
    # The first phase leaves half of its generation; the second one goes through all of its own.
    assert shares == pytest.approx([1, 7 / 8, 6 / 8, 5 / 8, 1 / 2, 3 / 8, 1 / 4, 1 / 8])


def test_units_that_fill_the_room_are_a_generation_before_they_are_a_tenth_more(tmp_path: Path) -> None:
    producer = FakeProducer(tmp_path / "data", unit_size=4)
    add_units(producer, 20)
    one = unit_bytes(producer)[0]
    ledger = config(phase(0, 0, 1000, {32: 1.0}, 4))
    free = open_run(tmp_path / "free", producer, ledger)
    held = open_run(tmp_path / "held", producer, ledger, 2 * one)
    assert free.advance(0) == held.advance(0) == "ready"
    add_units(producer, 1)
    assert free.advance(20) == "wait"  # 20 units want 2 more
    told = told_by(free)
    assert told.awaited == 22
    assert held.advance(20) == "ready"
    assert [line.units for line in held.lines] == [20, 21]


def test_a_run_that_does_not_follow_tells_nothing(tmp_path: Path) -> None:
    producer = FakeProducer(tmp_path / "data", unit_size=4)
    add_units(producer, 2)
    ledger = config(phase(0, 0, 100, {32: 1.0}, 2))
    run = Generations(tmp_path / "run", Dataset.open(producer.dataset.root), producer.facets, ledger, follow=False)
    run.advance(0)
    run.advance(1)
    assert not (tmp_path / "run" / FILE).exists()


def test_a_slow_disk_holds_no_step_up_and_the_newest_is_written_at_the_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk_is_free = threading.Event()
    written = []

    def replace(temporary: Path, file: Path) -> None:
        assert disk_is_free.wait(60)
        written.append(json.loads(temporary.read_text())["step"])
        os.rename(temporary, file)

    monkeypatch.setattr("qwenimg_dist.data.ahead.os.replace", replace)
    progress = ProgressWriter(tmp_path)
    for step in range(50):
        progress.tell(step, [], awaited=0, done=step == 49)
    assert read_progress(tmp_path) is None
    disk_is_free.set()
    progress.close()
    told = read_progress(tmp_path)
    assert told is not None
    assert (told.step, told.done) == (49, True)
    assert len(written) <= 2


def test_a_progress_that_could_not_be_written_for_another_reason_than_the_disk_is_said(tmp_path: Path) -> None:
    progress = ProgressWriter(tmp_path)
    progress.tell(0, [Stretch(first=0, end=-1, share=0.5)], awaited=0, done=False)
    with pytest.raises(ValueError, match="negative"):
        progress.flush()
    with pytest.raises(ValueError, match="negative"):
        progress.tell(1, [], awaited=0, done=False)


def test_a_damaged_file_is_no_progress(tmp_path: Path) -> None:
    assert read_progress(tmp_path) is None
    (tmp_path / FILE).write_text(json.dumps({"step": 3}))
    assert read_progress(tmp_path) is None
