"""Makes the generation that a step needs: which units it pins, their catalog, the line that will record it.

Place in the flow: `generations.py` asks here on rank 0, some steps before the step (in a thread) or when it is reached,
and records what comes back. Nothing of a generation counts before it is recorded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from qwenimg_dist.data.ahead import part_bytes
from qwenimg_dist.data.catalog import Catalog, RunFacets
from qwenimg_dist.data.catalog_build import build_catalog
from qwenimg_dist.data.catalogs import CatalogFolder
from qwenimg_dist.data.facets import DataError, Dataset
from qwenimg_dist.data.generation_checks import INDEX, catalog_folder, facets_json
from qwenimg_dist.data.generation_log import Generation
from qwenimg_dist.data.held_out import held_out_threshold
from qwenimg_dist.data.ledger import Ledger
from qwenimg_dist.data.ledger_config import LedgerConfig
from qwenimg_dist.data.phases import phase_at
from qwenimg_dist.data.pins import UnitPins, ready_units, why_not_ready
from qwenimg_dist.data.takedown import Takedown, keep_copy, read_takedown
from qwenimg_dist.schema import SOURCE_COMPLETE

_GROWTH: Final = 10
"""A generation that continues an epoch adds at least 1 / this of the epoch's units so far."""


class GenerationMaker:
    """See the module's docstring; one call of `next` at a time."""

    def __init__(
        self,
        run: Path,
        datasets: Mapping[str, Dataset],
        facets: RunFacets,
        config: LedgerConfig,
        *,
        follow: bool,
        max_ahead_bytes: int | None,
    ) -> None:
        """`max_ahead_bytes` is what producers are held back by: half of it is enough for a generation, whatever share
        of the epoch that is, since waiting for more could be in vain."""
        self._run, self._datasets, self._facets, self._config = run, datasets, facets, config
        self._follow, self._max_ahead_bytes = follow, max_ahead_bytes
        self._unit_bytes: dict[tuple[int, int], int] = {}
        self.awaited = 0
        """The units that the epoch must have for its next generation, as of the last call."""

    def next(self, step: int, lines: Sequence[Generation], ledger: Ledger | None) -> list[Generation]:
        """The generations that a step needs beside the recorded `lines`; none if there is nothing new to make them of.

        Raises `DataError` if waiting is of no use.
        """
        if ledger is not None and lines[0].phase is None:
            ledger.batch(step)  # raises, saying what is missing
        for dataset in self._datasets.values():
            dataset.refresh(insist=False)
        if self._follow or (lines and lines[0].phase is not None):
            line = self._next_of_phase(step, phase_at(self._config.phases, step).index, lines, ledger)
            return [] if line is None else [line]
        made: list[Generation] = []
        for name in sorted(self._datasets.keys() - {line.dataset for line in lines}):
            made.append(self._whole(step, name, number=len(lines) + len(made)))
        return made

    def _whole(self, step: int, name: str, *, number: int) -> Generation:
        """All that is ready of a data set, for every phase and epoch."""
        units = ready_units(self._datasets[name], self._facets.of(name))
        if not units:
            problem = why_not_ready(self._datasets[name], self._facets.of(name))
            raise DataError(f"data.mix.{name}: {problem}" if name else problem)
        return self._make(number, step, (), phase=None, epoch=0, first_unit=0, units=units, last=True, name=name)

    def _next_of_phase(
        self, step: int, phase: int, lines: Sequence[Generation], ledger: Ledger | None
    ) -> Generation | None:
        (dataset,) = self._datasets.values()
        # The mark is read before the units: it is written after them and taken away before new ones.
        listed = source_complete(dataset)
        mine = [line for line in lines if line.phase == phase]
        closed = not mine or mine[-1].last
        first_unit = 0 if closed else mine[-1].units
        epoch = 0 if not mine else mine[-1].epoch + closed
        units = ready_units(dataset, self._facets, first=first_unit)
        end = first_unit + len(units)
        complete = not self._follow or (listed is not None and end >= listed)
        if listed is not None and end == 0:
            raise DataError(why_not_ready(dataset, self._facets))
        if closed and mine and complete and ledger is not None and _is_empty(ledger, step, mine):
            ledger.batch(step)  # raises, saying what is missing
        growth = max(1, -(-first_unit // _GROWTH))
        self.awaited = first_unit + growth
        if not complete and len(units) < growth and not self._fills_the_room(units):
            return None
        if not units and (closed or not mine):
            return None
        return self._make(
            len(lines),
            step,
            lines,
            phase=phase,
            epoch=epoch,
            first_unit=first_unit,
            units=units,
            last=complete,
            name="",
        )

    def _fills_the_room(self, units: Sequence[UnitPins]) -> bool:
        """Whether producers may be held back by these units, so that no more of them may come."""
        if self._max_ahead_bytes is None or not units:
            return False
        (dataset,) = self._datasets.values()
        total = 0
        for unit in units:
            key = (unit.unit, unit.rows_parts)
            if key not in self._unit_bytes:
                parts = [part for part in unit.parts() if part.facet in self._facets.names]
                self._unit_bytes[key] = part_bytes(dataset, parts)
            total += self._unit_bytes[key]
        return 2 * total >= self._max_ahead_bytes

    def _make(
        self,
        number: int,
        step: int,
        lines: Sequence[Generation],
        *,
        phase: int | None,
        epoch: int,
        first_unit: int,
        units: Sequence[UnitPins],
        last: bool,
        name: str,
    ) -> Generation:
        takedown = read_takedown(self._config.takedown)
        keep_copy(self._run, takedown)
        rows_parts = {str(unit.unit): unit.rows_parts for unit in units if unit.rows_parts != 1}
        end = first_unit + len(units)
        index, digest, folder = self._catalog_for(
            f"gen-{number:04d}", lines, name, first_unit, end, rows_parts, units, takedown
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
            facets=facets_json(self._facets.of(name)),
            index=index,
            num_rows=folder.num_rows if folder else 0,
            num_texts=folder.num_texts if folder else 0,
            digest=digest,
            held_out_below=self._held_out_below(lines, folder, name),
            takedown=takedown.digest,
            dataset=name,
        )

    def _catalog_for(
        self,
        index: str,
        lines: Sequence[Generation],
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
        for line in lines:
            if (line.dataset, line.first_unit, line.units, line.rows_parts, line.takedown) == wanted and line.index:
                return line.index, line.digest, catalog_folder(self._run, line)
        dataset = self._datasets[name]
        built = build_catalog(dataset, units, self._facets.of(name), self._run / INDEX / index, takedown)
        return index, Catalog.open(built.folder, dataset.root).digest, built

    def _held_out_below(self, lines: Sequence[Generation], folder: CatalogFolder | None, name: str) -> int:
        for line in lines:
            if line.dataset == name:
                return line.held_out_below
        assert folder is not None
        key_hash = Catalog.open(folder.folder, self._datasets[name].root).key_hash
        return held_out_threshold(key_hash, self._config.held_out, self._config.max_held_out)


def _is_empty(ledger: Ledger, step: int, mine: Sequence[Generation]) -> bool:
    """All epochs so far together gave the step's stream no batch: more epochs will not help."""
    resolution = ledger.resolution_at(step)
    return ledger.batches_so_far(mine[-1].phase or 0, resolution) == 0


def source_complete(dataset: Dataset) -> int | None:
    """Number of units of the finished source; None while producers may add more."""
    file = dataset.root / SOURCE_COMPLETE
    try:
        return int(json.loads(file.read_text())["units"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is damaged ({error}): run `qwenimg-dist produce` again") from error
