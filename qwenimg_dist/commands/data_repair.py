"""`data repair`: takes damaged parts out of the way, so that the next `produce` makes exactly these units again.

It reads everything as `data verify` does. Nothing is deleted: damaged parquets and their tars, temporaries and tars
that no part names go to `_aside/NNNN/`, beside the list of what was wrong. Sound parts stay, under the lowest free
numbers. Before a unit's files are moved, a further `rows` part says that the unit has to be done again: decisions and
scores stay, the record of what the unit holds no longer counts the facets concerned. So the invariants of a data set
hold: a part exists if and only if its parquet does, none is rewritten, and a unit is ready only with all that its
newest record names. Killed halfway, run it again.

A run that trained on such a unit has pinned the parts as they were, by their sha256. It refuses to resume, since the
batches that it recorded cannot be read as they were; with the files restored from a backup it goes on. Refuses to work
beside a `produce`, and to touch a unit whose listing is damaged: rows cannot be numbered again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from producers import fence
from qwenimg_dist.commands.data_verify import Tally, problems
from qwenimg_dist.commands.data_verify_units import REPAIRED, Problem
from qwenimg_dist.data.facets import DataError, Dataset, Part
from qwenimg_dist.files import fsync_dir
from qwenimg_dist.schema import LISTING, ROWS, ROWS_COLUMNS, SOURCE_COMPLETE

ASIDE: Final = "_aside"
_WORKERS_GONE_S: Final = 10.0
_Parts = dict[str, dict[int, list[Part]]]
"""Facet -> unit -> its parts, also those after a gap."""
_STAMPED: Final = ("schema_version", "config_hash", "tars")
"""Written into each commit record by `Dataset.commit` itself."""


@dataclass
class _Damage:
    """What is wrong with one unit."""

    parts: set[Part] = field(default_factory=set)
    facets: set[str] = field(default_factory=set)
    """Of damaged parts, and those that lack something."""
    hopeless: bool = False


def repair(dataset: Dataset, console: Console) -> int:
    """Move damage aside and say what to do next; 0 unless something is beyond repair, then 1."""

    def say(line: str, style: str | None = None) -> None:
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)

    with dataset.lock(), fence.alone(dataset.root, timeout_s=_WORKERS_GONE_S):
        found = list(problems(dataset, Tally(), say))
        parts = {facet: dataset.parts_by_unit(facet) for facet in dataset.facets()}
        damages = _by_unit(found, parts)
        broken = {part for damage in damages.values() for part in damage.parts}
        strays = [] if any(damage.hopeless for damage in damages.values()) else dataset.strays(broken)
        mended = {unit: damage for unit, damage in sorted(damages.items()) if not damage.hopeless}
        beyond = [problem for problem in found if problem.unit is None or problem.unit not in mended]
        if mended or strays:
            aside = _Aside(dataset)
            aside.note(found)
            if mended:  # whoever follows the data set must not take it for finished
                (dataset.root / SOURCE_COMPLETE).unlink(missing_ok=True)
            for unit, damage in mended.items():
                for line in _mend(dataset, unit, damage, parts, aside):
                    say(f"unit {unit}: {line}")
            for stray in strays:
                aside.take(stray)
                say(f"{stray.relative_to(dataset.root)}: named by no part, moved to {aside.name}")
        for problem in beyond:
            say(f"beyond repair: {problem}", "red")
    for line in _advice(dataset, mended, bool(mended or strays), beyond):
        say(line)
    return 1 if beyond else 0


def _by_unit(found: Sequence[Problem], parts: _Parts) -> dict[int, _Damage]:
    """What is wrong with each unit that something is wrong with. Gaps are looked for here too: of a unit with a damaged
    part `verify` does not get to say that one is missing."""
    damages: dict[int, _Damage] = {}
    for problem in found:
        if problem.unit is None:
            continue
        damage = damages.setdefault(problem.unit, _Damage())
        if problem.part is not None:
            damage.parts.add(problem.part)
        facet = problem.part.facet if problem.part is not None else problem.facet
        if facet is None or facet == LISTING:
            damage.hopeless = True
        else:
            damage.facets.add(facet)
    for unit, damage in damages.items():
        for facet, by_unit in parts.items():
            if [part.part for part in by_unit.get(unit, [])] != list(range(len(by_unit.get(unit, [])))):
                damage.facets.add(facet)
                damage.hopeless = damage.hopeless or facet == LISTING
    return damages


class _Aside:
    """The folder that takes what is moved: `_aside/0001`, the next one 0002."""

    def __init__(self, dataset: Dataset) -> None:
        self._root = dataset.root
        parent = dataset.root / ASIDE
        parent.mkdir(exist_ok=True)
        number = 1 + max((int(folder.name) for folder in parent.iterdir() if folder.name.isdigit()), default=0)
        self.folder = parent / f"{number:04d}"
        self.name = f"{ASIDE}/{self.folder.name}"
        self.folder.mkdir()

    def note(self, found: Sequence[Problem]) -> None:
        """Write down what was wrong."""
        (self.folder / "problems.txt").write_text("".join(f"{problem}\n" for problem in found), encoding="utf-8")

    def take(self, file: Path) -> bool:
        """Move a file here, under its name in the data set. False if it was gone already."""
        there = self.folder / file.relative_to(self._root)
        there.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            return False
        os.rename(file, there)
        fsync_dir(there.parent)
        fsync_dir(file.parent)
        return True


def _mend(dataset: Dataset, unit: int, damage: _Damage, parts: _Parts, aside: _Aside) -> Iterator[str]:
    """Take one unit's damage away, `rows` first: what is left of them says that the unit is to be done again."""

    def clear(facet: str) -> Iterator[str]:
        return _clear(dataset, facet, parts.get(facet, {}).get(unit, []), damage.parts, aside)

    if ROWS in damage.facets:
        yield from clear(ROWS)
    if dataset.unit_parts(ROWS, unit):
        _withdraw(dataset, unit, damage.facets, aside)
    for facet in sorted(damage.facets - {ROWS}):
        yield from clear(facet)


def _clear(dataset: Dataset, facet: str, there: Sequence[Part], damaged: set[Part], aside: _Aside) -> Iterator[str]:
    """Move a facet's damaged parts of one unit aside and close the gaps between the sound ones."""
    sound = [part for part in there if part not in damaged]
    used = {tar.name for part in sound for tar in dataset.tars(part)}
    for part in (part for part in there if part in damaged):
        tars = {file.name for file in (dataset.root / facet).glob(f"{part.stem}-*.tar")} | _named(dataset, part)
        # The parquet last: killed before it, the damage can still be found, and the rest be moved.
        gone = [name for name in sorted(tars - used) if aside.take(dataset.tar(facet, name))]
        aside.take(dataset.parquet(part))
        with_tars = f" and {len(gone)} tar{'s' if len(gone) != 1 else ''}" if gone else ""
        yield f"{facet}/{part.stem}.parquet{with_tars} moved to {aside.name}"
    for number, part in enumerate(sound):
        if part.part != number:
            lower = Part(facet=facet, unit=part.unit, part=number)
            os.rename(dataset.parquet(part), dataset.parquet(lower))
            fsync_dir(dataset.root / facet)
            yield f"{facet}/{part.stem}.parquet is sound and now {lower.stem}.parquet"
    if not damaged & set(there):
        yield f"what {facet} lacks will be added"


def _named(dataset: Dataset, part: Part) -> set[str]:
    try:
        return {tar.name for tar in dataset.tars(part)}
    except (DataError, TypeError):
        return set()


def _withdraw(dataset: Dataset, unit: int, facets: set[str], aside: _Aside) -> None:
    """Commit an empty rows part whose record says that the unit waits for `produce`.

    Without the listing among its inputs no run takes the unit for ready. Facets that are whole stay recorded, so that
    they are not made again.
    """
    newest = dataset.unit_parts(ROWS, unit)[-1]
    meta = dataset.meta(newest)
    inputs = {
        facet: count
        for facet, count in meta.get("inputs", {}).items()
        if facet != LISTING and facet not in facets and len(dataset.unit_parts(facet, unit)) >= count
    }
    extra: dict[str, Any] = {name: value for name, value in meta.items() if name not in _STAMPED}
    extra |= {"inputs": inputs, "plan": "", REPAIRED: aside.name}
    part, table = dataset.next_part(ROWS, unit), ROWS_COLUMNS.empty_table()
    if not dataset.commit(part, table, config_hash=meta["config_hash"], extra=extra):
        raise DataError(f"{dataset.parquet(part)} appeared meanwhile: is a `produce` at work? Run this again after it")


def _advice(dataset: Dataset, mended: dict[int, _Damage], moved: bool, beyond: Sequence[Problem]) -> Iterator[str]:
    if not moved and not beyond:
        yield f"{dataset.root}: sound, nothing to repair"
    if mended:
        facets = sorted({facet for damage in mended.values() for facet in damage.facets if "-" in facet})
        config = f"the config that made {', '.join(facets)}" if facets else "the same config as before"
        yield (
            f"{len(mended)} unit{'s' if len(mended) > 1 else ''} will be made again by `qwenimg-dist produce` with "
            f"{config}: run it before the next training, which takes units only up to the first that is not ready"
        )
        yield (
            "a training that has used these units pinned their files as they were, and refuses to resume on others: to "
            "finish it, put the files back from a backup instead; otherwise give it a new run.path"
        )
    if moved:
        yield f"what was moved lies in {dataset.root / ASIDE}: remove it when you need it no longer"
    if beyond:
        yield f"{len(beyond)} problems are beyond repair and were left as they are"
