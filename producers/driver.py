"""The driver: from a look at the source to every unit ready, in one round that may be repeated at any time.

    look at the source -> listing -> per unit: scan, captions (workers, ahead) -> dedup, near (here, in order; workers
    tell the verdicts on first copies that are wanted for it) -> encode (workers)

Place in the flow: `commands/produce.py` calls `Driver.round` once, or again and again with `follow=true`. The driver
computes nothing heavy and imports no torch; it decides what is missing, in which order, and settles duplicates, which
must happen in source order and so in one place. Only the holder of the data set's lock may drive.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from producers import fence
from producers.dedup import DigestIndex, load_index, settle_unit
from producers.enhance import enhance_rows
from producers.hold import Hold
from producers.listing import ListingChange, sync_listing
from producers.near import load_near_index, settle_near
from producers.near_index import HammingIndex
from producers.plan import Plan
from producers.scan import MISSING_FILE
from producers.sources.base import Found, can_be_read, is_being_written
from producers.state import PassingFault, is_done, passing_faults, read_record
from producers.unit import UnitReport
from producers.verdicts import Verdicts
from producers.visible import parts_of_driver, wait_for_parts
from producers.workers import Outcome, Task, Workers
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.schema import LISTING, SCAN, SOURCE_COMPLETE

_POLL_S: Final = 0.5
_TRY_AGAIN_S: Final = 60.0


class Observer:
    """Hears what happens; the command's progress display derives from it. Does nothing by itself."""

    def begin(self, num_units: int) -> None:
        """A round starts with this many units to bring up to date."""

    def unit_done(self, report: UnitReport) -> None:
        """A unit is ready."""

    def tick(self) -> None:
        """Called at least every half second while waiting."""


@dataclass(frozen=True, kw_only=True)
class Pending:
    """A unit that is not what the plan wants."""

    unit: int
    scan_again: tuple[int, ...] = ()

    def scan(self, min_age_s: float) -> Task:
        """The unit's first task."""
        return Task(kind="scan", unit=self.unit, again=self.scan_again, min_age_s=min_age_s)


@dataclass(frozen=True, kw_only=True)
class _Tries:
    """Of a row: when the next one is due (monotonic seconds), and how long after the one before."""

    next_s: float
    wait_s: float

    @classmethod
    def after(cls, before: _Tries | None) -> _Tries:
        """Each try gives its unit a further part: with `follow`, a week of them is about eight."""
        wait_s = _TRY_AGAIN_S if before is None else 4 * before.wait_s
        return cls(next_s=time.monotonic() + wait_s, wait_s=wait_s)


@dataclass
class Driver:
    """Drives rounds over one data set. `workers` is made only when there is work."""

    dataset: Dataset
    plan: Plan
    root: str
    make_workers: Callable[[], Workers]
    observer: Observer = field(default_factory=Observer)
    before_writing: Callable[[], None] = lambda: None
    """Called before a round writes anything: the last moment to refuse."""
    stopping: Callable[[], bool] = lambda: False
    """Asked between tasks; once true, started tasks are finished and no other is begun."""
    hold: Hold | None = None
    """Asked before each unit is encoded; None never holds back."""
    retry_missing: bool = False
    """Ask again for remote pictures that were not there, not only for those that could not be reached."""
    min_age_s: float = 0.0
    """Local files touched more recently may still be written: they are read at a later look."""
    _workers: Workers | None = None
    _index: DigestIndex | None = None
    _near: HammingIndex | None = None
    _known: Verdicts | None = None
    _tried: dict[tuple[int, int], _Tries] = field(default_factory=dict)
    """(unit, row) of faults that were tried again by this driver."""
    _watched: set[int] = field(default_factory=set)
    """Units with rows whose file may turn up."""
    _parts: dict[int, Mapping[str, int]] = field(default_factory=dict)
    """Unit -> what its last outcome told."""

    def list_source(self, found: Found) -> ListingChange:
        """Commit what is new in the source."""
        rows = enhance_rows(found.rows, self.plan.enhance)
        return sync_listing(self.dataset, rows, config_hash=self.plan.config_hash, before_commit=self._unmark_complete)

    def pending(self, units: Sequence[int] | None = None) -> list[Pending]:
        """Units with something missing, ascending: of all, or of `units` and those watched for files to turn up.

        Reads one commit record per unit.
        """
        todo = self.dataset.units(LISTING) if units is None else sorted({*units, *self._watched})
        found = []
        for unit in todo:
            again, retry = self._recovered(unit)
            if again or retry or not is_done(self.dataset, unit, self.plan):
                found.append(Pending(unit=unit, scan_again=again))
        return found

    def produce(self, pending: Sequence[Pending], num_rows: int) -> bool:
        """Bring these units up to date; True when the whole data set is, False when stopped before."""
        if pending:
            self._unmark_complete()
            self.observer.begin(len(pending))
            if not self._run(pending):
                return False
        self._mark_complete(num_rows)
        return True

    def _run(self, pending: Sequence[Pending]) -> bool:
        if self._workers is None:
            self._workers = self.make_workers()
        workers = self._workers
        if not self._rescan(pending, workers):
            return False
        schedule = _Schedule(pending, scan_ahead=workers.num_workers + 2, min_age_s=self.min_age_s)
        begun: Counter[tuple[str, int]] = Counter()
        while not schedule.finished:
            while not self.stopping() and workers.num_idle() > 0:
                task = schedule.next_task(self._has_room)
                if task is None:
                    break
                workers.submit(self._with_parts(task))
                begun[task.kind, task.unit] += 1
            if self.stopping() and schedule.in_flight == 0:
                return False
            if schedule.in_flight == 0 and workers.num_idle() > 0:  # held back
                time.sleep(_POLL_S)
                self.observer.tick()
                continue
            for outcome in workers.wait(_POLL_S):
                self._see(outcome)
                self._verdicts.learn(outcome.verdicts)
                if not begun[outcome.task.kind, outcome.task.unit]:
                    continue  # of a round that broke off
                begun[outcome.task.kind, outcome.task.unit] -= 1
                schedule.done(outcome.task)
                self._settle_ready(schedule)
                if outcome.report is not None:
                    self._watched.add(outcome.report.unit)  # the next look decides whether it needs to stay
                    if self.hold is not None:
                        self.hold.unit_done(outcome.report.unit)
                    self.observer.unit_done(outcome.report)
            self.observer.tick()
        return True

    def _with_parts(self, task: Task) -> Task:
        told = parts_of_driver(self.dataset, task.unit, self.plan)
        return replace(task, parts={**self._parts.get(task.unit, {}), **told})

    def _see(self, outcome: Outcome) -> None:
        """It may have been done on another machine."""
        wait_for_parts(self.dataset, outcome.task.unit, outcome.parts)
        self._parts[outcome.task.unit] = outcome.parts

    def _has_room(self, unit: int, num_encoding: int) -> bool:
        return self.hold is None or self.hold.room(unit, num_encoding)

    def _rescan(self, pending: Sequence[Pending], workers: Workers) -> bool:
        """Scan what was settled before, but whose scan was lost (`data repair`): nothing can be settled without the
        sha256 of all that is kept. False if stopped."""
        todo = deque(one for one in pending if self._lacks_scan(one.unit))
        in_flight = 0
        while todo or in_flight:
            while todo and not self.stopping() and workers.num_idle() > 0:
                one = todo.popleft()
                workers.submit(self._with_parts(one.scan(self.min_age_s)))
                in_flight += 1
            if self.stopping() and in_flight == 0:
                return False
            for outcome in workers.wait(_POLL_S):
                self._see(outcome)
                in_flight -= 1
            self.observer.tick()
        return True

    def _lacks_scan(self, unit: int) -> bool:
        settled = bool(self.dataset.unit_parts(self.plan.dedup.facet, unit))
        return settled and SCAN not in read_record(self.dataset, unit).get("inputs", {})

    def _settle_ready(self, schedule: _Schedule) -> None:
        """Settle the units whose turn it is, up to the first that wants verdicts."""
        while (unit := schedule.to_settle) is not None:
            wanted = self._settle(unit)
            if wanted:
                schedule.ask(self._verdicts.tasks(wanted))
            else:
                schedule.settled()

    def _settle(self, unit: int) -> frozenset[int]:
        """Which of the unit's rows are copies of rows before them. Units come in ascending order.

        Returns the rows whose verdicts are wanted first: then it is to be called again."""
        rule, ask, config_hash = self.plan.near, self._verdicts.of, self.plan.config_hash
        wanted = settle_unit(self.dataset, unit, self.plan.dedup, self._digests(), ask, config_hash=config_hash)
        if wanted or rule is None:
            return wanted
        if self._near is None:
            self._near = load_near_index(self.dataset, rule)
        return settle_near(self.dataset, unit, rule, self._near, ask if rule.pixels else None, config_hash=config_hash)

    @property
    def _verdicts(self) -> Verdicts:
        if self._known is None:
            self._known = Verdicts(self.dataset, self.plan)
        return self._known

    def _digests(self) -> DigestIndex:
        if self._index is None:
            self._index = load_index(self.dataset, self.plan.dedup)
        return self._index

    def _recovered(self, unit: int) -> tuple[tuple[int, ...], bool]:
        """Rows to scan again because their file turned up, and whether a file that failed later did."""
        again, retry = [], False
        faults = passing_faults(self.dataset, unit)
        (self._watched.add if faults else self._watched.discard)(unit)
        for fault in faults:
            place = (unit, fault.row)
            if not self._may_be_read(fault):
                self._tried.pop(place, None)
                continue
            tries = self._tried.get(place)
            if tries is not None and not fault.listed_anew and time.monotonic() < tries.next_s:
                continue  # it can be opened and still fails: not at every look with `follow`
            self._tried[place] = _Tries.after(tries)
            if fault.by_scan:
                again.append(fault.row)
            retry = True
        return tuple(again), retry

    def _may_be_read(self, fault: PassingFault) -> bool:
        """Whether another try is worth it. What a server said is not there is believed until the row names another
        place: dead links are many in tables of URLs, and a try of each costs its unit a further part."""
        there = [can_be_read(self.root, uri) for uri in fault.uris]
        if False in there or any(is_being_written(self.root, uri, self.min_age_s) for uri in fault.uris):
            return False
        return None not in there or fault.reason != MISSING_FILE or fault.listed_anew or self.retry_missing

    def _mark_complete(self, num_rows: int) -> None:
        content: Mapping[str, Any] = {"units": len(self.dataset.units(LISTING)), "rows": num_rows}
        if not (self.dataset.root / SOURCE_COMPLETE).exists():
            self.dataset.put_json(SOURCE_COMPLETE, content)

    def _unmark_complete(self) -> None:
        """Before anything is written."""
        self.before_writing()
        fence.mark(self.dataset.root)
        self.dataset.drop(SOURCE_COMPLETE)


class _Schedule:
    """Order of tasks: scans run a few units ahead of encoding; a unit is encoded once all before it are settled. What
    must be known to settle one comes first: all others wait for it."""

    def __init__(self, pending: Sequence[Pending], *, scan_ahead: int, min_age_s: float) -> None:
        self._to_scan = deque(pending)
        self._to_settle = deque(one.unit for one in pending)
        self._to_encode: deque[int] = deque()
        self._scanned: set[int] = set()
        self._questions: deque[Task] = deque()
        self._unanswered = 0
        self._scan_ahead = scan_ahead
        self._min_age_s = min_age_s
        self._open = len(pending)
        """Units not yet encoded."""
        self._encoding = 0
        self.in_flight = 0

    @property
    def finished(self) -> bool:
        return self._open == 0

    def next_task(self, has_room: Callable[[int, int], bool]) -> Task | None:
        """The task to start now; None if everything that could start waits for one in flight, or for room."""
        ahead = self._open - len(self._to_scan)
        if self._questions:
            task = self._questions.popleft()
        elif self._to_scan and (ahead < self._scan_ahead or not self._to_encode):
            task = self._to_scan.popleft().scan(self._min_age_s)
        elif self._to_encode and has_room(self._to_encode[0], self._encoding):
            task = Task(kind="encode", unit=self._to_encode.popleft())
            self._encoding += 1
        else:
            return None
        self.in_flight += 1
        return task

    def done(self, task: Task) -> None:
        """Note that a task ended."""
        self.in_flight -= 1
        if task.kind == "encode":
            self._open -= 1
            self._encoding -= 1
        elif task.kind == "verdict":
            self._unanswered -= 1
        else:
            self._scanned.add(task.unit)

    @property
    def to_settle(self) -> int | None:
        """The unit to settle now, if there is one."""
        if self._unanswered or not self._to_settle or self._to_settle[0] not in self._scanned:
            return None
        return self._to_settle[0]

    def settled(self) -> None:
        """`to_settle` is settled, and may be encoded."""
        self._to_encode.append(self._to_settle.popleft())

    def ask(self, rows_of: Mapping[int, tuple[int, ...]]) -> None:
        """Unit -> rows whose verdicts are wanted before `to_settle` can be settled."""
        self._questions.extend(Task(kind="verdict", unit=unit, rows=rows) for unit, rows in rows_of.items())
        self._unanswered += len(rows_of)
