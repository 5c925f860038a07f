"""Pictures that kill their process, found by processes that really die: with several threads, then carefully."""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from producer_world import SCORERS, FakeEncoders, draw, make_plan_for, produce_here, rows_of

from producers.commit import UnitConflictError
from producers.poison import POISON, PoisonError, Trail, Watch, read_trail, trail_file
from producers.unit import produce_unit
from producers.workers import Task, run_task
from qwenimg_dist.commands.data_verify import Tally, problems
from qwenimg_dist.commands.main import main
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.schema import ROWS, SCAN

PLAN = make_plan_for(resolutions=(64, 96))
CONFLICT, TOO_MUCH = 3, 4


class Scanned(Exception):
    pass


class StopAtEncoding(FakeEncoders):
    def latents(self, pixels):  # type: ignore[no-untyped-def]
        raise Scanned


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for number in range(8):
        draw(tmp_path / "source" / f"{number}.png", number, (100, 100 + number), f"caption {number}")
    return tmp_path / "source"


@pytest.fixture
def dataset(source: Path, tmp_path: Path) -> Dataset:
    """Scanned and settled, nothing encoded."""
    dataset = Dataset.create(tmp_path / "data", 8)
    with contextlib.suppress(Scanned):
        produce_here(source, dataset, PLAN, StopAtEncoding())
    assert dataset.parts(PLAN.dedup.facet)
    assert not dataset.parts(ROWS)
    return dataset


@pytest.fixture
def crash_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    marks = tmp_path / "marks"
    marks.mkdir()
    monkeypatch.setenv("QWENIMG_DIST_FAULT_DIR", str(marks))

    def mark(*rows: int, point: str = "decode") -> None:
        for row in rows:
            digest = hashlib.sha256((source / f"{row}.png").read_bytes()).hexdigest()
            (marks / f"{point}@{digest[:16]}").write_text("crash")

    return mark


def in_a_process(work: Callable[[], object]) -> int:
    """Exit code of a forked process; negative for the signal that killed it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            faulthandler.disable()  # its report is of no interest
            work()
            code = 0
        except UnitConflictError:
            code = CONFLICT
        except PoisonError:
            code = TOO_MUCH
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def until_done(dataset: Dataset, source: Path, task: Task, limit: int = 8) -> list[int]:
    """Tries as the pool makes them; their exit codes."""
    codes: list[int] = []
    while not codes or codes[-1] < 0:
        assert len(codes) < 20

        def work(task: Task = task) -> None:
            run_task(
                task,
                dataset,
                PLAN,
                root=str(source),
                encoders=FakeEncoders,
                scorers=SCORERS,
                num_threads=4,
                max_poison_rows=limit,
            )

        codes.append(in_a_process(work))
        task = replace(task, careful=True, why="it crashed")
    return codes


def test_two_culprits_in_one_unit_cost_two_deaths_each_and_the_rest_is_kept(
    source: Path, dataset: Dataset, crash_on: Callable[..., None]
) -> None:
    crash_on(2, 5)
    assert until_done(dataset, source, Task(kind="encode", unit=0)) == [-signal.SIGSEGV] * 5 + [0]
    decided = rows_of(dataset, ROWS)
    assert {row: entry["reason"] for row, entry in decided.items()} == {
        row: POISON if row in (2, 5) else "" for row in range(8)
    }
    detail = "2 producers ended while it alone was open, the last so: it crashed"
    assert decided[2]["detail"] == decided[5]["detail"] == detail
    scanned = rows_of(dataset, SCAN)
    assert (scanned[2]["fault"], scanned[2]["width"]) == (POISON, 100)
    assert not (dataset.root / ".suspects").exists()
    assert not list(problems(dataset, Tally()))
    assert produce_here(source, dataset, PLAN, FakeEncoders()) == []  # for every later run, too


def test_a_verdict_can_be_lifted(
    source: Path, dataset: Dataset, crash_on: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crash_on(2, 5)
    until_done(dataset, source, Task(kind="encode", unit=0))
    for mark in (tmp_path / "marks").iterdir():
        mark.unlink()  # whatever it was, it is mended
    assert main(["data", "repair", "--lift-poison", f"data.path={dataset.root}"]) == 0
    assert "unit 0: row 2, 5: no poison any more" in capsys.readouterr().out
    assert list(problems(dataset, Tally())) == []
    encoders = FakeEncoders()
    produce_here(source, dataset, PLAN, encoders)
    assert {entry["status"] for entry in rows_of(dataset, ROWS).values()} == {"kept"}
    assert encoders.num_pictures == 4  # the two, at two classes
    assert list(problems(dataset, Tally())) == []
    assert main(["data", "repair", "--lift-poison", f"data.path={dataset.root}"]) == 0
    assert "there is no poison" in capsys.readouterr().out
    assert produce_here(source, dataset, PLAN, FakeEncoders()) == []


def test_a_scan_that_crashes_goes_on_without_the_file(
    source: Path, tmp_path: Path, crash_on: Callable[..., None]
) -> None:
    dataset = Dataset.create(tmp_path / "fresh", 8)
    crash_on(7, point="scan")

    class Cut(Exception):
        pass

    def cut(*args: object, **kwargs: object) -> None:
        raise Cut

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Cut):
        patch.setattr("producers.workers.scan_unit", cut)
        produce_here(source, dataset, PLAN, FakeEncoders())
    assert until_done(dataset, source, Task(kind="scan", unit=0)) == [-signal.SIGSEGV] * 3 + [0]
    assert {row for row, entry in rows_of(dataset, SCAN).items() if entry["fault"] == POISON} == {7}
    produce_here(source, dataset, PLAN, FakeEncoders())
    assert {row for row, entry in rows_of(dataset, ROWS).items() if entry["status"] == "kept"} == set(range(7))


def test_a_culprit_that_a_verdict_is_asked_of_is_found_and_not_admitted(
    source: Path, dataset: Dataset, crash_on: Callable[..., None]
) -> None:
    crash_on(2, 5)
    asked = Task(kind="verdict", unit=0, rows=(1, 2, 3))
    assert until_done(dataset, source, asked) == [-signal.SIGSEGV] * 3 + [0]
    assert {row for row, entry in rows_of(dataset, SCAN).items() if entry["fault"] == POISON} == {2}
    dataset.refresh()
    told = run_task(asked, dataset, PLAN, root=str(source), encoders=FakeEncoders, scorers=SCORERS)
    assert told.verdicts == {1: True, 2: False, 3: True}
    assert until_done(dataset, source, Task(kind="encode", unit=0)) == [-signal.SIGSEGV] * 3 + [0]
    assert {row for row, entry in rows_of(dataset, ROWS).items() if entry["reason"] == POISON} == {2, 5}


def test_where_everything_crashes_nothing_is_recorded(
    source: Path, dataset: Dataset, crash_on: Callable[..., None]
) -> None:
    crash_on(*range(8))
    assert until_done(dataset, source, Task(kind="encode", unit=0), limit=2)[-1] == TOO_MUCH
    assert all(entry["fault"] is None for entry in rows_of(dataset, SCAN).values())
    assert read_trail(trail_file(dataset.root, "encode", 0)) is None


def test_one_kill_from_outside_condemns_nobody(tmp_path: Path) -> None:
    def opened(*rows: int, why: str = "") -> None:
        with Watch(tmp_path, "encode", 0, why=why, limit=8) as watch:
            for row in rows:
                watch.opening(row)
            os.kill(os.getpid(), signal.SIGKILL)

    file = trail_file(tmp_path, "encode", 0)
    assert in_a_process(lambda: opened(0, 1, 2)) == -signal.SIGKILL
    assert read_trail(file) == Trail(opening=2)
    # The next one does not know that a process died alone: the run was ended, or the machine went.
    assert in_a_process(lambda: opened(0, 1, 2)) == -signal.SIGKILL
    assert read_trail(file) == Trail(opening=2)
    assert in_a_process(lambda: opened(0, 1, why="it crashed")) == -signal.SIGKILL
    assert read_trail(file) == Trail(opening=1, deaths={2: 1})
    watch = Watch(tmp_path, "encode", 0, why="it crashed", limit=8)
    assert watch.poison == {}
    with contextlib.suppress(MemoryError), watch:
        watch.opening(2)
        raise MemoryError  # the process lives, but it counts
    assert set(Watch(tmp_path, "encode", 0, why="no memory", limit=8).poison) == {2}
    file.write_text("torn")
    assert Watch(tmp_path, "encode", 0, why="", limit=8).poison == {}


def test_two_processes_that_finish_the_same_unit_leave_it_once(source: Path, dataset: Dataset, tmp_path: Path) -> None:
    class Together(FakeEncoders):
        """Neither commits before both have begun."""

        def latents(self, pixels):  # type: ignore[no-untyped-def]
            (tmp_path / f"here-{os.getpid()}").touch()
            for _ in range(2000):
                if len(list(tmp_path.glob("here-*"))) == 2:
                    break
                time.sleep(0.01)
            return super().latents(pixels)

    def work() -> None:
        produce_unit(dataset, 0, plan=PLAN, root=str(source), encoders=Together(), scorers=SCORERS)

    first = os.fork()
    if first == 0:
        os._exit(in_a_process(work))
    second = in_a_process(work)
    assert len(list(tmp_path.glob("here-*"))) == 2
    codes = {second, os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])}
    assert codes == {0, CONFLICT}
    produce_here(source, dataset, PLAN, FakeEncoders())  # the loser's unit is tried again, and is whole
    assert [len(dataset.unit_parts(facet, 0)) for facet in (ROWS, *PLAN.facets)] == [1] * 4
    assert {entry["status"] for entry in rows_of(dataset, ROWS).values()} == {"kept"}
    assert not dataset.strays()
    assert not list(problems(dataset, Tally()))
