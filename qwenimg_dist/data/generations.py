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
import shutil
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

from qwenimg_dist.data.ahead import Stretch, part_bytes, write_progress
from qwenimg_dist.data.catalog import HEAD, Catalog, Ints, RunFacets
from qwenimg_dist.data.catalog_build import build_catalog
from qwenimg_dist.data.catalog_output import PARTS
from qwenimg_dist.data.catalogs import CatalogFolder, Catalogs
from qwenimg_dist.data.early import EARLY_STEPS, EarlyLook
from qwenimg_dist.data.facets import DataError, Dataset
from qwenimg_dist.data.generation_log import FILE, Generation, append_line, read_lines
from qwenimg_dist.data.held_out import HeldOutBucket, held_out_rows, held_out_set, held_out_threshold
from qwenimg_dist.data.ledger import Ledger
from qwenimg_dist.data.ledger_config import LedgerConfig
from qwenimg_dist.data.order import Segment
from qwenimg_dist.data.other_classes import OtherClass, catalog_of_held_out, find_other_class, other_facets
from qwenimg_dist.data.phases import phase_at
from qwenimg_dist.data.pins import UnitPins, check_pins, pin_from_json, pin_unit, ready_units, why_not_ready
from qwenimg_dist.data.takedown import FOLDER as TAKEDOWN
from qwenimg_dist.data.takedown import Takedown, keep_copy, read_takedown, recorded, unmatched_note
from qwenimg_dist.schema import SOURCE_COMPLETE

INDEX: Final = "index"
_VISIBLE_S: Final = 60.0
_TELL_EVERY_S: Final = 1.0
_GROWTH: Final = 10
"""A generation that continues an epoch adds at least 1 / this of the epoch's units so far."""


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

        `max_ahead_bytes` is what producers are held back by: half of it is enough for a generation, whatever share of
        the epoch that is, since waiting for more could be in vain. Where the ledger ends within `early_steps`, the
        next generation is looked for in a thread; 0: when it is needed.
        """
        if follow and config.mix is not None:
            raise ValueError("a run on several data sets cannot follow their producers: shares are settled once")
        self.run = run
        self.datasets = dict(sorted(dataset.items())) if isinstance(dataset, Mapping) else {"": dataset}
        self.facets = facets
        self.config = config
        self.follow = follow
        self._max_ahead_bytes = max_ahead_bytes
        self._early_steps = early_steps
        self._early = EarlyLook()
        self._unit_bytes: dict[tuple[int, int], int] = {}
        self._told = -float("inf")
        self._told_awaited = self._awaited = 0
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
        heads = [json.loads((self._folder(line).folder / HEAD).read_text()) for line in made]
        if any("taken_down" not in head for head in heads):
            return None  # catalogs from before it was written down
        return unmatched_note(recorded(self.run, newest), (at for head in heads for at in head["taken_down"]))

    def verify(self, *, tars: bool = True) -> None:
        """Rank 0, once at start: every pinned file is as it was; catalogs that are gone are compiled again. Without
        `tars`, shards are left to the reader, which tells what it cannot read.

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
            dataset = self.datasets[line.dataset]
            if not self._intact(folder, line):
                build_catalog(
                    dataset, self._pins_of(line), self._facets(line), folder, recorded(self.run, line.takedown)
                )
            if Catalog.open(folder, dataset.root).digest != line.digest:
                raise DataError(
                    f"{self.run / FILE} pinned units {line.first_unit}..{line.units - 1} with digest "
                    f"{line.digest[:12]}, their files in {dataset.root} give another: files of the data set were "
                    "replaced; restore them, or start a new run directory"
                )
            pins = [pin_from_json(entry) for entry in json.loads((folder / PARTS).read_text())]
            listed = json.loads((folder / "catalog.json").read_text())["tars"] if tars else []
            check_pins(dataset, pins, [(facet, name, size) for facet, name, size in listed])

    def advance(self, step: int) -> Literal["ready", "wait"]:
        """Rank 0: make sure that `ledger.batch(step)` can be given, recording further generations if needed.

        "wait" means that producers have nothing new yet: ask again later. Raises `DataError` if waiting is of no use.
        """
        if self._ledger is None:
            self.refresh()
        self._record(self._early.take(wait=False))
        while self._ledger is None or not self._ledger.available(step):
            lines = self._early.take(wait=True) or self._next(step)
            if not lines:
                self._tell(step, awaited=self._awaited)
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

    def _record(self, lines: Sequence[Generation]) -> None:
        for line in lines:
            append_line(self.run / FILE, line)
        if lines:
            self.refresh()
            self._told = -float("inf")

    def _look_early(self, ledger: Ledger, step: int) -> None:
        """Begin to make the generation that the first of the next steps without a batch needs."""
        if self.settled or self._early.is_busy:
            return
        end = min(step + 1 + self._early_steps, self.config.phases[-1].last_step)
        lacking = next((ahead for ahead in range(step + 1, end) if not ledger.available(ahead)), None)
        if lacking is not None:
            self._early.begin(partial(self._next, lacking))

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
        write_progress(self.run, step, stretches, awaited=awaited, done=done)

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
        self._catalog_of.append(self._catalogs.add(self._folder(line)) if line.index is not None else None)
        self.lines.append(line)
        if self._ledger is not None:
            self._ledger.append(self._segment(line, self._catalog_of[-1]))
        elif len(self.lines) == len(self.datasets):
            self._ledger = self._new_ledger(self._catalogs, self.lines)
            for one, catalog in zip(self.lines, self._catalog_of, strict=True):
                self._ledger.append(self._segment(one, catalog))

    def _facets(self, line: Generation) -> RunFacets:
        return self.facets.of(line.dataset)

    def _folder(self, line: Generation) -> CatalogFolder:
        assert line.index is not None
        return CatalogFolder(
            folder=self.run / INDEX / line.index,
            num_rows=line.num_rows,
            num_texts=line.num_texts,
            dataset=line.dataset,
        )

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
        joining = [(line, catalogs.add(self._folder(line))) for line in firsts]
        ledger = self._new_ledger(catalogs, firsts)
        if self.follow:
            for phase in self.config.phases:
                ledger.append(Segment(catalog=0, phase=phase.index, epoch=0, last=True))
            return
        for line, catalog in joining:
            ledger.append(self._segment(line, catalog))
        ledger.check()

    def _next(self, step: int) -> list[Generation]:
        """The generations that a step needs; none if there is nothing new to make them of."""
        if self.settled:
            self.ledger.batch(step)  # raises, saying what is missing
        for dataset in self.datasets.values():
            dataset.refresh(insist=False)
        if self.follow or (self.lines and self.lines[0].phase is not None):
            line = self._next_of_phase(step, phase_at(self.config.phases, step).index)
            return [] if line is None else [line]
        made: list[Generation] = []
        for name in sorted(self.datasets.keys() - {line.dataset for line in self.lines}):
            made.append(self._whole(step, name, number=self.count + len(made)))
        return made

    def _whole(self, step: int, name: str, *, number: int) -> Generation:
        """All that is ready of a data set, for every phase and epoch."""
        units = ready_units(self.datasets[name], self.facets.of(name))
        if not units:
            problem = why_not_ready(self.datasets[name], self.facets.of(name))
            raise DataError(f"data.mix.{name}: {problem}" if name else problem)
        return self._make(number, step, phase=None, epoch=0, first_unit=0, units=units, last=True, name=name)

    def _next_of_phase(self, step: int, phase: int) -> Generation | None:
        (dataset,) = self.datasets.values()
        # The mark is read before the units: it is written after them and taken away before new ones.
        listed = source_complete(dataset)
        mine = [line for line in self.lines if line.phase == phase]
        closed = not mine or mine[-1].last
        first_unit = 0 if closed else mine[-1].units
        epoch = 0 if not mine else mine[-1].epoch + closed
        units = ready_units(dataset, self.facets, first=first_unit)
        end = first_unit + len(units)
        complete = not self.follow or (listed is not None and end >= listed)
        if listed is not None and end == 0:
            raise DataError(why_not_ready(dataset, self.facets))
        if closed and mine and complete and self._empty_epoch(step, mine):
            self.ledger.batch(step)  # raises, saying what is missing
        growth = max(1, -(-first_unit // _GROWTH))
        self._awaited = first_unit + growth
        if not complete and len(units) < growth and not self._fills_the_room(units):
            return None
        if not units and (closed or not mine):
            return None
        return self._make(
            self.count, step, phase=phase, epoch=epoch, first_unit=first_unit, units=units, last=complete, name=""
        )

    def _fills_the_room(self, units: Sequence[UnitPins]) -> bool:
        """Whether producers may be held back by these units, so that no more of them may come."""
        if self._max_ahead_bytes is None or not units:
            return False
        (dataset,) = self.datasets.values()
        total = 0
        for unit in units:
            key = (unit.unit, unit.rows_parts)
            if key not in self._unit_bytes:
                parts = [part for part in unit.parts() if part.facet in self.facets.names]
                self._unit_bytes[key] = part_bytes(dataset, parts)
            total += self._unit_bytes[key]
        return 2 * total >= self._max_ahead_bytes

    def _empty_epoch(self, step: int, mine: Sequence[Generation]) -> bool:
        """All epochs so far together gave the step's stream no batch: more epochs will not help."""
        resolution = self.ledger.resolution_at(step)
        return bool(mine) and self.ledger.batches_so_far(mine[-1].phase or 0, resolution) == 0

    def _make(
        self,
        number: int,
        step: int,
        *,
        phase: int | None,
        epoch: int,
        first_unit: int,
        units: Sequence[UnitPins],
        last: bool,
        name: str,
    ) -> Generation:
        takedown = read_takedown(self.config.takedown)
        keep_copy(self.run, takedown)
        rows_parts = {str(unit.unit): unit.rows_parts for unit in units if unit.rows_parts != 1}
        end = first_unit + len(units)
        index, digest, folder = self._catalog_for(
            f"gen-{number:04d}", name, first_unit, end, rows_parts, units, takedown
        )
        return Generation(
            generation=number,
            phase=phase,
            first_step=step,
            epoch=epoch,
            first_unit=first_unit,
            units=end,
            last=last,
            rows_parts=rows_parts,
            facets=_facets_json(self.facets.of(name)),
            index=index,
            num_rows=folder.num_rows if folder else 0,
            num_texts=folder.num_texts if folder else 0,
            digest=digest,
            held_out_below=self._held_out_below(folder, name),
            takedown=takedown.digest,
            dataset=name,
        )

    def _catalog_for(
        self,
        index: str,
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
        wanted = (name, first_unit, end, rows_parts, takedown.digest)
        for line in self.lines:
            if (line.dataset, line.first_unit, line.units, line.rows_parts, line.takedown) == wanted and line.index:
                return line.index, line.digest, self._folder(line)
        dataset = self.datasets[name]
        built = build_catalog(dataset, units, self.facets.of(name), self.run / INDEX / index, takedown)
        return index, Catalog.open(built.folder, dataset.root).digest, built

    def _held_out_below(self, folder: CatalogFolder | None, name: str) -> int:
        for line in self.lines:
            if line.dataset == name:
                return line.held_out_below
        assert folder is not None
        key_hash = Catalog.open(folder.folder, self.datasets[name].root).key_hash
        return held_out_threshold(key_hash, self.config.held_out, self.config.max_held_out)

    def _check_line(self, line: Generation) -> None:
        if line.dataset not in self.datasets:
            there = ", ".join(sorted({other.dataset for other in read_lines(self.run / FILE)[0]} - {""}))
            here = ", ".join(name for name in self.datasets if name)
            raise DataError(
                f"{self.run / FILE}: this run trains on {there or 'one data set'}, the config names "
                f"{here or 'one data set'}: give the same data.mix, or a new run.path"
            )
        wanted = _facets_json(self._facets(line))
        if line.facets != wanted:
            raise DataError(
                f"{self.run / FILE}: this run reads {', '.join(line.facets.values())}, the config asks for "
                f"{', '.join(wanted.values())}: give the same model and encode settings, or a new run.path"
            )

    def _intact(self, folder: Path, line: Generation) -> bool:
        """Whether a catalog folder can be opened and is the one that was recorded."""
        try:
            catalog = Catalog.open(folder, self.datasets[line.dataset].root)
        except DataError:
            return False
        return (folder / PARTS).is_file() and catalog.digest == line.digest

    def _pins_of(self, line: Generation) -> list[UnitPins]:
        dataset, pinned = self.datasets[line.dataset], []
        for unit in range(line.first_unit, line.units):
            pins = pin_unit(dataset, unit, line.rows_parts.get(str(unit), 1), self._facets(line))
            if pins is None:
                raise DataError(
                    f"{dataset.root}: unit {unit} is no longer as generation {line.generation} pinned it: restore "
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
