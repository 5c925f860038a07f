"""Who does a unit's work: the protocol between the driver and its workers, and the workers of this very process.

Place in the flow: `driver.py` hands out tasks and waits for outcomes. `pool.py` has the workers that are Ray actors;
`InlineWorkers` runs tasks where it stands, for tests and as the bare loop that the pool is measured against.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from producers.decide import Assessment
from producers.filters.base import Scorers
from producers.fit_captions import judge_unit
from producers.plan import Plan
from producers.poison import Watch
from producers.scan import scan_unit
from producers.sieve import sieve_unit
from producers.unit import UnitReport, assess_unit, produce_unit
from producers.verdicts import judge_rows, rows_to_judge
from producers.visible import parts_of_workers, wait_for_parts
from producers.write import Encoders
from qwenimg_dist.data.facets import Dataset


class ProduceError(RuntimeError):
    """Producing cannot go on; the message names the unit, what went wrong and what to do."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One unit's scan (and the verdict on its captions), the verdict of the filters on some of its pictures
    (`verdicts.py`), or its encoding."""

    kind: Literal["scan", "verdict", "encode"]
    unit: int
    rows: tuple[int, ...] = ()
    """For a verdict."""
    again: tuple[int, ...] = ()
    """Rows to scan once more, though they were scanned."""
    min_age_s: float = 0.0
    """For a scan: local files touched more recently may still be written."""
    parts: Mapping[str, int] = field(default_factory=dict)
    """Facet -> how many parts of the unit there are (`visible.py`)."""
    careful: bool = False
    """Open one picture at a time and leave a trail, since an earlier try took its process with it."""
    why: str = ""
    """How the earlier try ended."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A task that is done."""

    task: Task
    report: UnitReport | None = None
    """Of an encoded unit."""
    verdicts: Mapping[int, bool] = field(default_factory=dict)
    """Row -> whether the filters on pixels admit it."""
    parts: Mapping[str, int] = field(default_factory=dict)
    """As of the task, of what workers commit."""


class Workers(Protocol):
    """Runs tasks, several at a time. Retries are its business: an outcome means done."""

    @property
    def num_workers(self) -> int:
        """How many tasks run at a time."""
        ...

    def num_idle(self) -> int:
        """How many more tasks could be started now."""
        ...

    def submit(self, task: Task) -> None:
        """Start a task; only while `num_idle() > 0`."""
        ...

    def wait(self, timeout_s: float) -> Sequence[Outcome]:
        """Tasks that ended, none if none did in time. Raises `ProduceError` when one cannot be done."""
        ...


def run_task(
    task: Task,
    dataset: Dataset,
    plan: Plan,
    *,
    root: str,
    encoders: Callable[[], Encoders],
    scorers: Scorers,
    num_threads: int = 1,
    max_poison_rows: int = 0,
) -> Outcome:
    """Do it here. `encoders` is called only by the encode task, so that others load no model that encodes.

    Raises `PoisonError` if a careful task finds more than `max_poison_rows` pictures that kill.
    """
    wait_for_parts(dataset, task.unit, task.parts)
    outcome = _run(task, dataset, plan, root, encoders, scorers, num_threads, max_poison_rows)
    return replace(outcome, parts=parts_of_workers(dataset, task.unit, plan))


def _run(
    task: Task,
    dataset: Dataset,
    plan: Plan,
    root: str,
    encoders: Callable[[], Encoders],
    scorers: Scorers,
    num_threads: int,
    max_poison_rows: int,
) -> Outcome:
    watch = None
    if task.careful:
        watch = Watch(dataset.root, task.kind, task.unit, why=task.why, limit=max_poison_rows)
    if task.kind == "scan":
        scan_unit(
            dataset,
            task.unit,
            root=root,
            again=task.again,
            config_hash=plan.config_hash,
            watch=watch,
            num_threads=num_threads,
            min_age_s=task.min_age_s,
        )
        judge_unit(dataset, task.unit, plan=plan, scorers=scorers)
        return Outcome(task=task)
    if watch is not None:
        known = _assess(task, dataset, plan, scorers)
        sieve_unit(dataset, task.unit, known, plan=plan, root=root, scorers=scorers, watch=watch)
        num_threads = 1
    if task.kind == "verdict":
        known = _assess(task, dataset, plan, scorers)
        verdicts = judge_rows(known, plan=plan, root=root, scorers=scorers, num_threads=num_threads)
        return Outcome(task=task, verdicts=verdicts)
    report = produce_unit(
        dataset, task.unit, plan=plan, root=root, encoders=encoders(), scorers=scorers, num_threads=num_threads
    )
    return Outcome(task=task, report=report)


def _assess(task: Task, dataset: Dataset, plan: Plan, scorers: Scorers) -> list[Assessment]:
    """The rows that the task is about."""
    if task.kind == "verdict":
        return rows_to_judge(dataset, task.unit, task.rows, plan, scorers)
    return assess_unit(dataset, task.unit, plan, scorers)


@dataclass
class InlineWorkers:
    """One worker, here. Errors pass through."""

    dataset: Dataset
    plan: Plan
    root: str
    encoders: Encoders
    scorers: Scorers
    _queue: deque[Task] = field(default_factory=deque)
    num_workers: int = 1

    def num_idle(self) -> int:
        return 1 - len(self._queue)

    def submit(self, task: Task) -> None:
        self._queue.append(task)

    def wait(self, timeout_s: float) -> Sequence[Outcome]:
        task = self._queue.popleft()
        return [
            run_task(
                task, self.dataset, self.plan, root=self.root, encoders=lambda: self.encoders, scorers=self.scorers
            )
        ]
