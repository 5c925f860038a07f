"""Generations: which units join a run, and when. Recorded before first use, so that a resume or a replay is exact.

Place in the flow: rank 0 calls `advance(step)` before each step; it pins ready units, compiles their catalog and
appends a line to `RUN/generations.jsonl` (fsynced). All ranks `refresh`, which hands the line to the ledger as a
segment. Without `follow`, one generation pins everything that is ready at the start and serves all phases and epochs.
With it, a phase begins with what is ready, and grows by what became ready whenever its batches are used up, by a tenth
at least, so that slow producers give a hundred generations and not one per unit; when the source is complete the epoch
closes, and the next one covers all units again. What comes next is looked for some steps before it is needed, in a
thread (`early.py`), and recorded at the first step that finds it there, so that no step waits for a catalog. Several
data sets have one generation each, all recorded before the first step; `follow` is refused for them.

The order of samples depends on the lines alone, not on the steps they were written at: a run killed and resumed reads
its lines and goes on. A torn last line (the process died while writing it) was never used; it is ignored and
overwritten. Refused: pinned files that are gone or have other content, and lines damaged in any other way.
"""

from __future__ import annotations

import json
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final, Literal

from qwenimg_dist.data.ahead import ProgressWriter, Stretch
from qwenimg_dist.data.catalog import HEAD, Catalog, Ints, RunFacets
from qwenimg_dist.data.catalogs import Catalogs
from qwenimg_dist.data.early import EARLY_STEPS, EarlyLook
from qwenimg_dist.data.facets import DataError, Dataset
from qwenimg_dist.data.generation_checks import catalog_folder, check_line, verify_lines
from qwenimg_dist.data.generation_log import FILE, Generation, append_line, read_lines
from qwenimg_dist.data.generation_maker import GenerationMaker
from qwenimg_dist.data.held_out import HeldOutBucket, held_out_rows, held_out_set
from qwenimg_dist.data.ledger import Ledger
from qwenimg_dist.data.ledger_config import LedgerConfig
from qwenimg_dist.data.order import Segment
from qwenimg_dist.data.other_classes import OtherClass, catalog_of_held_out, find_other_class, other_facets
from qwenimg_dist.data.takedown import read_takedown, recorded, unmatched_note

_VISIBLE_S: Final = 60.0
_TELL_EVERY_S: Final = 1.0


class Generations:
    """The generations of one run. Made on every rank; `verify` and `advance` are for rank 0 alone."""

    def __init__(
        self,
        run: Path,
        dataset: Dataset | Mapping[str, Dataset],
        facets: RunFacets,
        config: LedgerConfig,
        *,
        follow: bool,
        max_ahead_bytes: int | None = None,
        early_steps: int = EARLY_STEPS,
    ) -> None:
        """`dataset` are several by name if the config has a `mix`, which a run that follows may not have.

        `max_ahead_bytes` is what producers are held back by. Where the ledger ends within `early_steps`, the next
        generation is looked for in a thread; 0: when it is needed.
        """
        if follow and config.mix is not None:
            raise ValueError("a run on several data sets cannot follow their producers: shares are settled once")
        self.run = run
        self.datasets = dict(sorted(dataset.items())) if isinstance(dataset, Mapping) else {"": dataset}
        self.facets = facets
        self.config = config
        self.follow = follow
        self._maker = GenerationMaker(
            run, self.datasets, facets, config, follow=follow, max_ahead_bytes=max_ahead_bytes
        )
        self._early_steps = early_steps
        self._early = EarlyLook()
        self.progress = ProgressWriter(run)
        self._told = -float("inf")
        self._told_awaited = 0
        self.lines: list[Generation] = []
        self._catalogs = Catalogs({name: one.root for name, one in self.datasets.items()})
        self._catalog_of: list[int | None] = []  # beside `lines`
        self._ledger: Ledger | None = None

    @property
    def ledger(self) -> Ledger:
        """The ledger of all generations known so far. Raises `DataError` before the first."""
        if self._ledger is None:
            raise DataError(f"{self.run / FILE} has no generation yet: rank 0 must call advance() first")
        return self._ledger

    @property
    def count(self) -> int:
        """Generations known here; rank 0 broadcasts it, the others `refresh(count)`."""
        return len(self.lines)

    @property
    def settled(self) -> bool:
        """No further generation will ever be needed, so `advance` need not be asked again."""
        return len(self.lines) >= len(self.datasets) and self.lines[0].phase is None

    @property
    def not_yet_taken_down(self) -> str | None:
        """What to tell the user of rows that were taken down since; None where the newest generation knows them all."""
        current = read_takedown(self.config.takedown)
        newest = self.lines[-len(self.datasets) :]
        if all(line.takedown == current.digest for line in newest):
            return None
        when = (
            "this run has one generation for good, so rows taken down since stay in it: export it and start a new run "
            "to lose them"
            if self.settled
            else "rows taken down since are left out from the next generation on"
        )
        return f"data.takedown={self.config.takedown} is not the list of generation {self.count - 1}: {when}"

    @property
    def takedown_matches_nothing(self) -> str | None:
        """What to tell the user of entries of the newest list that name no row of any catalog made by it."""
        newest = self.lines[-1].takedown if self.lines else ""
        made = [line for line in self.lines if line.takedown == newest and line.index]
        if not newest or not made:
            return None
        heads = [json.loads((catalog_folder(self.run, line).folder / HEAD).read_text()) for line in made]
        if any("taken_down" not in head for head in heads):
            return None  # catalogs from before it was written down
        return unmatched_note(recorded(self.run, newest), (at for head in heads for at in head["taken_down"]))

    def verify(self, *, tars: bool = True) -> None:
        """Rank 0, once at start: see `verify_lines`."""
        verify_lines(self.run, self.datasets, self.facets, takedown=self.config.takedown, tars=tars)

    def advance(self, step: int) -> Literal["ready", "wait"]:
        """Rank 0: make sure that `ledger.batch(step)` can be given, recording further generations if needed.

        "wait" means that producers have nothing new yet: ask again later. Raises `DataError` if waiting is of no use.
        """
        if self._ledger is None:
            self.refresh()
        self._record(self._found_early(wait=False))
        while self._ledger is None or not self._ledger.available(step):
            lines = self._found_early(wait=True) or self._maker.next(step, self.lines, self._ledger)
            if not lines:
                self._tell(step, awaited=self._maker.awaited)
                return "wait"
            if self._ledger is None:
                self._try([*self.lines, *lines])
            self._record(lines)
        self._look_early(self._ledger, step)
        self._tell(step, awaited=0)
        return "ready"

    def close(self) -> None:
        """Rank 0: end what `advance` began."""
        self._early.close()
        self.progress.close()

    def _record(self, lines: Sequence[Generation]) -> None:
        for line in lines:
            append_line(self.run / FILE, line)
        if lines:
            self.refresh()
            self._told = -float("inf")

    def _found_early(self, *, wait: bool) -> list[Generation]:
        """What was looked for ahead of need; nothing where rows were taken down since: it is made anew without them."""
        found = self._early.take(wait=wait)
        if found and read_takedown(self.config.takedown).digest != found[0].takedown:
            return []
        return found

    def _look_early(self, ledger: Ledger, step: int) -> None:
        """Begin to make the generation that the first of the next steps without a batch needs."""
        if self.settled or self._early.is_busy:
            return
        end = min(step + 1 + self._early_steps, self.config.phases[-1].last_step)
        lacking = next((ahead for ahead in range(step + 1, end) if not ledger.available(ahead)), None)
        if lacking is not None:
            self._early.begin(partial(self._maker.next, lacking, self.lines, ledger))

    def _tell(self, step: int, *, awaited: int) -> None:
        """Now and then, let producers know how far training is, see `ahead.py`."""
        if self.settled or not (self.follow or self.count):
            return
        if awaited == self._told_awaited and time.monotonic() - self._told < _TELL_EVERY_S:
            return
        self._told, self._told_awaited = time.monotonic(), awaited
        mine = [(line.phase, line) for line in self.lines if line.phase is not None]
        used = {phase: iter(self.ledger.used(phase, step)) for phase in {phase for phase, _ in mine}}
        stretches = [Stretch(first=line.first_unit, end=line.units, share=next(used[phase])) for phase, line in mine]
        done = step + 1 >= self.config.phases[-1].last_step
        self.progress.tell(step, stretches, awaited=awaited, done=done)

    def refresh(self, count: int | None = None) -> None:
        """Read lines that were appended since. With `count`, wait until that many are visible (shared file systems
        may lag). Raises `DataError` if they do not appear within a minute."""
        if count is not None and count <= len(self.lines):
            return
        deadline = time.monotonic() + _VISIBLE_S
        lines, _ = read_lines(self.run / FILE)
        while count is not None and len(lines) < count:
            if time.monotonic() > deadline:
                raise DataError(f"{self.run / FILE} shows {len(lines)} generations, rank 0 wrote {count}: not shared?")
            time.sleep(0.1)
            lines, _ = read_lines(self.run / FILE)
        for line in lines[len(self.lines) :]:
            check_line(self.run, self.datasets, self.facets, line)
            self._join(line)

    def held_out(self, resolution: int, limit: int) -> list[HeldOutBucket]:
        """The validation samples of a resolution, fixed for the run; several data sets give as many each."""
        found: list[HeldOutBucket] = []
        for line, catalog in self.firsts():
            found += held_out_set(
                self._catalogs,
                catalog,
                below=line.held_out_below,
                where=self.config.selection(line.dataset, 0).where,
                resolution=resolution,
                limit=-(-limit // len(self.datasets)),
                first_slot=sum(len(group.rows) for group in found),
            )
        return found

    @property
    def catalogs(self) -> Catalogs:
        """What `held_out`'s positions count in."""
        return self._catalogs

    def other_facets(self) -> dict[int, dict[str, str]]:
        """Resolution class -> data set -> facet, of the latents that it has beside those of the run."""
        found: dict[int, dict[str, str]] = {}
        for name, dataset in self.datasets.items():
            for resolution, facet in other_facets(dataset, self.facets.of(name)).items():
                found.setdefault(resolution, {})[name] = facet
        return found

    def find_other_class(self, facets: Mapping[str, str], only: Container[str] | None = None) -> dict[str, OtherClass]:
        """Rank 0: where the held-out rows (of them those with the keys `only`) have their latents in such facets, by
        data set."""
        return {
            line.dataset: find_other_class(
                self.datasets[line.dataset],
                facets.get(line.dataset),
                self._catalogs[catalog],
                self._held_out_rows(line, catalog),
                keys=self._catalogs.keys(self._held_out_rows(line, catalog) + self._catalogs.row_base(catalog)),
                only=only,
            )
            for line, catalog in self.firsts()
        }

    def held_out_elsewhere(
        self, others: Mapping[int, Mapping[str, OtherClass]], limit: int
    ) -> tuple[Catalogs, dict[int, list[HeldOutBucket]]]:
        """As `held_out`, at classes that the run does not train; positions count in the catalogs given beside."""
        small: dict[str, Catalog] = {}
        for line, catalog in self.firsts():
            small[line.dataset] = catalog_of_held_out(
                self._catalogs[catalog],
                self.datasets[line.dataset],
                self._held_out_rows(line, catalog),
                {resolution: by_dataset[line.dataset] for resolution, by_dataset in others.items()},
            )
        catalogs = Catalogs.of(small)
        groups: dict[int, list[HeldOutBucket]] = {resolution: [] for resolution in others}
        for resolution, found in groups.items():
            for index in range(len(catalogs)):
                # Every row of them is held out and selected.
                found += held_out_set(
                    catalogs,
                    index,
                    below=None,
                    where=None,
                    resolution=resolution,
                    limit=-(-limit // len(self.datasets)),
                    first_slot=sum(len(group.rows) for group in found),
                )
        return catalogs, groups

    def firsts(self) -> Iterator[tuple[Generation, int]]:
        """The first generation of each data set, and its catalog; those without a row are left out."""
        for line, catalog in zip(self.lines[: len(self.datasets)], self._catalog_of, strict=False):
            if catalog is not None:
                yield line, catalog

    def _held_out_rows(self, line: Generation, catalog: int) -> Ints:
        where = self.config.selection(line.dataset, 0).where
        return held_out_rows(self._catalogs[catalog], below=line.held_out_below, where=where)

    def _join(self, line: Generation) -> None:
        self._catalog_of.append(self._catalogs.add(catalog_folder(self.run, line)) if line.index is not None else None)
        self.lines.append(line)
        if self._ledger is not None:
            self._ledger.append(self._segment(line, self._catalog_of[-1]))
        elif len(self.lines) == len(self.datasets):
            self._ledger = self._new_ledger(self._catalogs, self.lines)
            for one, catalog in zip(self.lines, self._catalog_of, strict=True):
                self._ledger.append(self._segment(one, catalog))

    def _segment(self, line: Generation, catalog: int | None) -> Segment:
        return Segment(catalog=catalog, phase=line.phase, epoch=line.epoch, last=line.last, dataset=line.dataset)

    def _new_ledger(self, catalogs: Catalogs, firsts: Sequence[Generation]) -> Ledger:
        """A ledger that the first generation of each data set may join."""
        return Ledger(
            phases=self.config.phases,
            seed=self.config.seed,
            caption_dropout=self.config.caption_dropout,
            catalogs=catalogs,
            selection={line.dataset: self.config.selection(line.dataset, line.held_out_below) for line in firsts},
            mix=self.config.mix,
        )

    def _try(self, firsts: Sequence[Generation]) -> None:
        """Refuse, before anything is recorded, a `where` that names no column, and a phase without a single row
        (which would otherwise be noticed hours later, when the phase begins)."""
        catalogs = Catalogs({name: dataset.root for name, dataset in self.datasets.items()})
        joining = [(line, catalogs.add(catalog_folder(self.run, line))) for line in firsts]
        ledger = self._new_ledger(catalogs, firsts)
        if self.follow:
            for phase in self.config.phases:
                ledger.append(Segment(catalog=0, phase=phase.index, epoch=0, last=True))
            return
        for line, catalog in joining:
            ledger.append(self._segment(line, catalog))
        ledger.check()
