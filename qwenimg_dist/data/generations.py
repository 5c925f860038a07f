"""Generations: which units join a run, and when. Recorded before first use, so that a resume or a replay is exact.

Place in the flow: rank 0 calls `advance(step)` before each step; it pins ready units, compiles their catalog and
appends a line to `RUN/generations.jsonl` (fsynced). All ranks `refresh`, which hands the line to the ledger as a
segment. Without `follow`, one generation pins everything that is ready at the start and serves all phases and epochs.
With it, a phase begins with what is ready, and grows by what became ready whenever its batches are used up, by a tenth
at least, so that slow producers give a hundred generations and not one per unit; when the source is complete the epoch
closes, and the next one covers all units again.

The order of samples depends on the lines alone, not on the steps they were written at: a run killed and resumed reads
its lines and goes on. A torn last line (the process died while writing it) was never used; it is ignored and
overwritten. Refused: pinned files that are gone or have other content, and lines damaged in any other way.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from qwenimg_dist.data.catalog import Catalog, CatalogFolder, Catalogs, RunFacets
from qwenimg_dist.data.catalog_build import PARTS, build_catalog
from qwenimg_dist.data.facets import DataError, Dataset
from qwenimg_dist.data.generation_log import FILE, Generation, append_line, read_lines
from qwenimg_dist.data.held_out import HeldOutBucket, held_out_set, held_out_threshold
from qwenimg_dist.data.ledger import Ledger
from qwenimg_dist.data.order import Segment, Selection
from qwenimg_dist.data.phases import PlannedPhase, phase_at
from qwenimg_dist.data.pins import UnitPins, check_pins, pin_from_json, pin_unit, ready_units, why_not_ready
from qwenimg_dist.data.takedown import FOLDER as TAKEDOWN
from qwenimg_dist.data.takedown import Takedown, keep_copy, read_takedown, recorded
from qwenimg_dist.data.where import compile_where
from qwenimg_dist.schema import SOURCE_COMPLETE

INDEX: Final = "index"
_VISIBLE_S: Final = 60.0
_GROWTH: Final = 10
"""A generation that continues an epoch adds at least 1 / this of the epoch's units so far."""


@dataclass(frozen=True, kw_only=True)
class LedgerConfig:
    """What the order depends on besides the data."""

    phases: tuple[PlannedPhase, ...]
    seed: int
    caption_dropout: float
    where: str | None
    held_out: float
    max_held_out: int
    weights: Mapping[str, float] = field(default_factory=dict)
    """`where` expression -> how often its rows come per epoch; none: every row once."""
    caption_weights: Mapping[str, float] | None = None
    takedown: str | None = None
    """The list's file; read anew for each generation, see `takedown.py`."""


class Generations:
    """The generations of one run. Made on every rank; `verify` and `advance` are for rank 0 alone."""

    def __init__(self, run: Path, dataset: Dataset, facets: RunFacets, config: LedgerConfig, *, follow: bool) -> None:
        self.run = run
        self.dataset = dataset
        self.facets = facets
        self.config = config
        self.follow = follow
        self.lines: list[Generation] = []
        self._where = compile_where(config.where) if config.where else None
        self._weights = tuple((compile_where(text), weight) for text, weight in sorted(config.weights.items()))
        self._catalogs = Catalogs(dataset.root)
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
        return bool(self.lines) and self.lines[0].phase is None

    @property
    def not_yet_taken_down(self) -> str | None:
        """What to tell the user of rows that were taken down since; None where the newest generation knows them all."""
        current = read_takedown(self.config.takedown)
        if not self.lines or self.lines[-1].takedown == current.digest:
            return None
        when = (
            "this run has one generation for good, so rows taken down since stay in it: export it and start a new run "
            "to lose them"
            if self.settled
            else "rows taken down since are left out from the next generation on"
        )
        return f"data.takedown={self.config.takedown} is not the list of generation {self.count - 1}: {when}"

    def verify(self) -> None:
        """Rank 0, once at start: every pinned file is as it was; catalogs that are gone are compiled again.

        Raises `DataError` naming the file, or if the run had a takedown list that the config no longer gives.
        """
        for leftover in (self.run / INDEX).glob(".tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        seen = set()
        for line in read_lines(self.run / FILE)[0]:
            self._check_line(line)
            if line.takedown and self.config.takedown is None:
                raise DataError(
                    f"{self.run / FILE}: generation {line.generation} left rows out by a takedown list, the config "
                    f"names none: set data.takedown again (then it was {self.run / TAKEDOWN}/{line.takedown}.json)"
                )
            if line.index is None or line.index in seen:
                continue
            seen.add(line.index)
            folder = self.run / INDEX / line.index
            if not self._intact(folder, line):
                build_catalog(self.dataset, self._pins_of(line), self.facets, folder, recorded(self.run, line.takedown))
            if Catalog.open(folder, self.dataset.root).digest != line.digest:
                raise DataError(
                    f"{self.run / FILE} pinned units {line.first_unit}..{line.units - 1} with digest "
                    f"{line.digest[:12]}, their files in {self.dataset.root} give another: files of the data set were "
                    "replaced; restore them, or start a new run directory"
                )
            pins = [pin_from_json(entry) for entry in json.loads((folder / PARTS).read_text())]
            tars = json.loads((folder / "catalog.json").read_text())["tars"]
            check_pins(self.dataset, pins, [(facet, name, size) for facet, name, size in tars])

    def advance(self, step: int) -> Literal["ready", "wait"]:
        """Rank 0: make sure that `ledger.batch(step)` can be given, recording further generations if needed.

        "wait" means that producers have nothing new yet: ask again later. Raises `DataError` if waiting is of no use.
        """
        if self._ledger is None:
            self.refresh()
        while self._ledger is None or not self._ledger.available(step):
            line = self._next(step)
            if line is None:
                return "wait"
            if not self.lines:
                self._try(line)
            append_line(self.run / FILE, line)
            self.refresh()
        return "ready"

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
            self._check_line(line)
            self._join(line)

    def held_out(self, resolution: int, limit: int) -> list[HeldOutBucket]:
        """The validation samples of a resolution, fixed for the run."""
        if not self.lines or self.lines[0].index is None:
            return []
        return held_out_set(
            self._catalogs[0],
            below=self.lines[0].held_out_below,
            where=self._where,
            resolution=resolution,
            limit=limit,
        )

    def _join(self, line: Generation) -> None:
        catalog = None
        if line.index is not None:
            folder = CatalogFolder(
                folder=self.run / INDEX / line.index, num_rows=line.num_rows, num_texts=line.num_texts
            )
            catalog = self._catalogs.add(folder)
        if self._ledger is None:
            self._ledger = self._new_ledger(self._catalogs, line.held_out_below)
        self._ledger.append(Segment(catalog=catalog, phase=line.phase, epoch=line.epoch, last=line.last))
        self.lines.append(line)

    def _new_ledger(self, catalogs: Catalogs, held_out_below: int) -> Ledger:
        return Ledger(
            phases=self.config.phases,
            seed=self.config.seed,
            caption_dropout=self.config.caption_dropout,
            catalogs=catalogs,
            selection=Selection(
                where=self._where,
                held_out_below=held_out_below,
                weights=self._weights,
                caption_weights=self.config.caption_weights,
            ),
        )

    def _try(self, line: Generation) -> None:
        """Refuse, before anything is recorded, a `where` that names no column, and a phase without a single row
        (which would otherwise be noticed hours later, when the phase begins)."""
        assert line.index is not None
        catalogs = Catalogs(self.dataset.root)
        folder = self.run / INDEX / line.index
        catalogs.add(CatalogFolder(folder=folder, num_rows=line.num_rows, num_texts=line.num_texts))
        ledger = self._new_ledger(catalogs, line.held_out_below)
        if line.phase is None:
            ledger.append(Segment(catalog=0, phase=None, epoch=0, last=True))
            ledger.check()
            return
        for phase in self.config.phases:
            ledger.append(Segment(catalog=0, phase=phase.index, epoch=0, last=True))

    def _next(self, step: int) -> Generation | None:
        """The generation that a step needs; None if there is nothing new to make it of."""
        if self.settled:
            self.ledger.batch(step)  # raises, saying what is missing
        if not self.lines and not self.follow:
            units = ready_units(self.dataset, self.facets)
            if not units:
                raise DataError(why_not_ready(self.dataset, self.facets))
            return self._make(step, phase=None, epoch=0, first_unit=0, units=units, last=True)
        return self._next_of_phase(step, phase_at(self.config.phases, step).index)

    def _next_of_phase(self, step: int, phase: int) -> Generation | None:
        # The mark is read before the units: it is written after them and taken away before new ones.
        listed = source_complete(self.dataset)
        mine = [line for line in self.lines if line.phase == phase]
        closed = not mine or mine[-1].last
        first_unit = 0 if closed else mine[-1].units
        epoch = 0 if not mine else mine[-1].epoch + closed
        units = ready_units(self.dataset, self.facets, first=first_unit)
        end = first_unit + len(units)
        complete = not self.follow or (listed is not None and end >= listed)
        if listed is not None and end == 0:
            raise DataError(why_not_ready(self.dataset, self.facets))
        if closed and mine and complete and self._empty_epoch(step, mine):
            self.ledger.batch(step)  # raises, saying what is missing
        if not complete and len(units) < max(1, -(-first_unit // _GROWTH)):
            return None
        if not units and (closed or not mine):
            return None
        return self._make(step, phase=phase, epoch=epoch, first_unit=first_unit, units=units, last=complete)

    def _empty_epoch(self, step: int, mine: Sequence[Generation]) -> bool:
        """All epochs so far together gave the step's stream no batch: more epochs will not help."""
        resolution = self.ledger.resolution_at(step)
        return bool(mine) and self.ledger.batches_so_far(mine[-1].phase or 0, resolution) == 0

    def _make(
        self, step: int, *, phase: int | None, epoch: int, first_unit: int, units: Sequence[UnitPins], last: bool
    ) -> Generation:
        number = len(self.lines)
        takedown = read_takedown(self.config.takedown)
        keep_copy(self.run, takedown)
        rows_parts = {str(unit.unit): unit.rows_parts for unit in units if unit.rows_parts != 1}
        end = first_unit + len(units)
        index, digest, folder = self._catalog_for(f"gen-{number:04d}", first_unit, end, rows_parts, units, takedown)
        return Generation(
            generation=number,
            phase=phase,
            first_step=step,
            epoch=epoch,
            first_unit=first_unit,
            units=end,
            last=last,
            rows_parts=rows_parts,
            facets=_facets_json(self.facets),
            index=index,
            num_rows=folder.num_rows if folder else 0,
            num_texts=folder.num_texts if folder else 0,
            digest=digest,
            held_out_below=self._held_out_below(folder),
            takedown=takedown.digest,
        )

    def _catalog_for(
        self,
        name: str,
        first_unit: int,
        end: int,
        rows_parts: dict[str, int],
        units: Sequence[UnitPins],
        takedown: Takedown,
    ) -> tuple[str | None, str, CatalogFolder | None]:
        """An earlier catalog of the same pins and takedown list, or a new one."""
        if first_unit == end:
            return None, "", None
        wanted = (first_unit, end, rows_parts, takedown.digest)
        for line in self.lines:
            if (line.first_unit, line.units, line.rows_parts, line.takedown) == wanted and line.index:
                folder = self.run / INDEX / line.index
                return (
                    line.index,
                    line.digest,
                    CatalogFolder(folder=folder, num_rows=line.num_rows, num_texts=line.num_texts),
                )
        built = build_catalog(self.dataset, units, self.facets, self.run / INDEX / name, takedown)
        return name, Catalog.open(built.folder, self.dataset.root).digest, built

    def _held_out_below(self, folder: CatalogFolder | None) -> int:
        if self.lines:
            return self.lines[0].held_out_below
        assert folder is not None
        key_hash = Catalog.open(folder.folder, self.dataset.root).key_hash
        return held_out_threshold(key_hash, self.config.held_out, self.config.max_held_out)

    def _check_line(self, line: Generation) -> None:
        wanted = _facets_json(self.facets)
        if line.facets != wanted:
            raise DataError(
                f"{self.run / FILE}: this run reads {', '.join(line.facets.values())}, the config asks for "
                f"{', '.join(wanted.values())}: give the same model and encode settings, or a new run.path"
            )

    def _intact(self, folder: Path, line: Generation) -> bool:
        """Whether a catalog folder can be opened and is the one that was recorded."""
        try:
            catalog = Catalog.open(folder, self.dataset.root)
        except DataError:
            return False
        return (folder / PARTS).is_file() and catalog.digest == line.digest

    def _pins_of(self, line: Generation) -> list[UnitPins]:
        pinned = []
        for unit in range(line.first_unit, line.units):
            pins = pin_unit(self.dataset, unit, line.rows_parts.get(str(unit), 1), self.facets)
            if pins is None:
                raise DataError(
                    f"{self.dataset.root}: unit {unit} is no longer as generation {line.generation} pinned it: restore "
                    "the data set, or start a new run directory"
                )
            pinned.append(pins)
        return pinned


def source_complete(dataset: Dataset) -> int | None:
    """Number of units of the finished source; None while producers may add more."""
    file = dataset.root / SOURCE_COMPLETE
    try:
        return int(json.loads(file.read_text())["units"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is damaged ({error}): run `qwenimg-dist produce` again") from error


def _facets_json(facets: RunFacets) -> dict[str, Any]:
    return {"text": facets.text, **{str(r): facets.latents[r] for r in sorted(facets.latents)}}
