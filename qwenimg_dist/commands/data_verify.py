"""`data verify`: is what was committed still there, whole, and consistent?

Reads every part and every tar once, streaming, several parts at a time; memory is that of their tables and of 8 bytes
per row (keys must be unique over the data set). Says now and then how far it is. Changes nothing. What a killed
`produce` left behind (temporaries, tars that no part names) and units that are not finished are listed but are no
damage: the next `produce` deals with both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from rich.console import Console

from qwenimg_dist.commands.data_reading import Reading
from qwenimg_dist.commands.data_tar import Place, check_tar
from qwenimg_dist.commands.data_verify_units import (
    REMAKE,
    REPAIRED,
    RESTORE,
    Problem,
    check_unit,
    part_name,
    repeated_keys,
)
from qwenimg_dist.data.facets import DataError, Dataset, Part
from qwenimg_dist.data.pins import parallel
from qwenimg_dist.in_turn import in_turn
from qwenimg_dist.report.funnel import LATENTS_PREFIX, TEXT_PREFIX
from qwenimg_dist.report.stats import size_of
from qwenimg_dist.report.table import show_bytes
from qwenimg_dist.schema import (
    CAPTIONS_COLUMNS,
    CAPTIONS_PREFIX,
    DEDUP_COLUMNS,
    KEY_PATTERN,
    LATENTS_COLUMNS,
    LISTING,
    LISTING_COLUMNS,
    NEAR_COLUMNS,
    NEAR_PREFIX,
    OPTIONAL_COLUMNS,
    ROWS,
    ROWS_COLUMNS,
    SCAN,
    SCAN_COLUMNS,
    SCHEMA_VERSION,
    TEXT_COLUMNS,
    is_dedup,
)

_THREADS: Final = 8
"""Reading waits for the storage, and hashing lets other threads run."""
_COLUMNS: Final = {LISTING: LISTING_COLUMNS, SCAN: SCAN_COLUMNS, ROWS: ROWS_COLUMNS}


@dataclass
class Tally:
    """What was read, for the closing line."""

    parts: int = 0
    tars: int = 0
    bytes: int = 0
    rows: int = 0


def verify(dataset: Dataset, console: Console) -> int:
    """Print problems and notes; 0 if there is no problem, else 1."""
    tally = Tally()
    found = 0

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    for problem in problems(dataset, tally, say):
        console.print(f"problem: {problem}", style="red", markup=False, highlight=False, soft_wrap=True)
        found += 1
    for note in notes(dataset):
        say(f"note: {note}")
    read = f"{tally.parts:,} parts, {tally.tars:,} tars, {show_bytes(tally.bytes)}, {tally.rows:,} rows"
    verdict = f"{found} problem{'s' if found > 1 else ''}" if found else "sound"
    say(f"{dataset.root}: {verdict} ({read} read)")
    return 1 if found else 0


def problems(dataset: Dataset, tally: Tally, say: Callable[[str], None] | None = None) -> Iterator[Problem]:
    """Every problem there is, as it is found. `say` hears now and then how far it is."""
    broken: set[Part] = set()
    parts = [part for facet in dataset.facets() for part in dataset.parts(facet)]
    reading = Reading(say, sum(parallel(partial(_tar_bytes, dataset), parts)) if say is not None else 0)
    check = partial(_check_part, dataset, reading)
    for part, found in zip(parts, in_turn(check, parts, threads=_THREADS, ahead=2 * _THREADS, tick=reading.tick)):
        tally.parts += 1
        tally.tars += found.tars
        tally.bytes += found.bytes
        broken |= {part} if found.problems else set()
        yield from found.problems
    yield from _check_units(dataset, broken, tally, reading)


def notes(dataset: Dataset) -> Iterator[str]:
    """What is unfinished or left over."""
    try:
        strays = dataset.strays()
    except DataError:
        strays = []  # a part without commit record is reported as a problem
    for stray in strays:
        size_bytes = size_of(stray)
        size = show_bytes(size_bytes) if size_bytes is not None else "gone by now"
        name = stray.relative_to(dataset.root)
        yield f"{name}: left by a killed or working `produce` ({size}); the next one removes it"
    pending = sorted(set(dataset.units(LISTING)) - set(dataset.units(ROWS)))
    if pending:
        yield f"{len(pending)} listed units are not finished (first: {pending[0]}); `produce` goes on with them"
    repaired = [unit for unit, parts in dataset.parts_by_unit(ROWS).items() if _waits(dataset, parts[-1])]
    if repaired:
        yield f"{len(repaired)} units wait for `produce` since `data repair` (first: {min(repaired)})"


def _waits(dataset: Dataset, newest: Part) -> bool:
    try:
        return REPAIRED in dataset.meta(newest)
    except DataError:
        return False  # reported as a problem


def _tar_bytes(dataset: Dataset, part: Part) -> int:
    try:
        return sum(tar.size_bytes for tar in dataset.tars(part))
    except (DataError, TypeError):
        return 0  # reported as a problem


@dataclass(kw_only=True)
class _Checked:
    """A part, and what was read for it."""

    problems: list[Problem] = field(default_factory=list)
    tars: int = 0
    bytes: int = 0


def _check_part(dataset: Dataset, reading: Reading, part: Part) -> _Checked:
    checked = _Checked()
    checked.problems.extend(_problems_of_part(dataset, reading, part, checked))
    return checked


def _problems_of_part(dataset: Dataset, reading: Reading, part: Part, checked: _Checked) -> Iterator[Problem]:
    """The part by itself: readable, of this schema, its columns, its keys, its tars."""
    name = part_name(dataset, part)
    remedy = RESTORE if part.facet == LISTING else REMAKE
    try:
        meta = dataset.meta(part)
        tars = dataset.tars(part)
        table = dataset.read(part)
    except (DataError, TypeError) as error:
        yield Problem(file=name, unit=part.unit, what=f"is damaged: {error}", remedy=remedy, part=part)
        return
    if meta.get("schema_version") != SCHEMA_VERSION:
        what = f"has schema version {meta.get('schema_version')}, this program reads {SCHEMA_VERSION}"
        yield Problem(file=name, unit=part.unit, what=what, remedy="use the program that wrote it")
        return
    wrong = _wrong_columns(part.facet, table.schema)
    if wrong:
        yield Problem(file=name, unit=part.unit, what=wrong, remedy=remedy, part=part)
        return
    by = "row" if "row" in table.column_names else "key"
    for column in {by, "key"} & set(table.column_names):
        for what in _wrong_values(column, table[column].to_pylist()):
            yield Problem(file=name, unit=part.unit, what=what, remedy=remedy, part=part)
    if "tar" in table.column_names:
        indices = _indices(table)
        for stranger in sorted(set(indices) - {tar.name for tar in tars}):
            what = f"has index rows in {stranger}, which its commit record does not name"
            yield Problem(file=name, unit=part.unit, what=what, remedy=remedy, part=part)
        for tar in tars:
            checked.tars += 1
            checked.bytes += tar.size_bytes
            with dataset.held_tar(part.facet, tar) as file:
                for what in check_tar(file, tar, indices.get(tar.name, {})):
                    yield Problem(file=f"{part.facet}/{tar.name}", unit=part.unit, what=what, remedy=remedy, part=part)
            reading.add(tar.size_bytes)


def _check_units(dataset: Dataset, broken: set[Part], tally: Tally, reading: Reading) -> Iterator[Problem]:
    """The facets against each other, unit by unit; units with a broken part are passed over."""
    facets = {facet: dataset.parts_by_unit(facet) for facet in dataset.facets()}
    broken_units = {part.unit for part in broken}
    keys: list[npt.NDArray[np.int64]] = []
    listing = facets.get(LISTING, {})
    units = sorted({unit for by_unit in facets.values() for unit in by_unit})
    for number, unit in enumerate(units):
        reading.tick(f"{number:,} of {len(units):,} units compared with what they say of each other")
        if unit in broken_units:
            continue
        if unit not in listing:
            first = next(by_unit[unit][0] for by_unit in facets.values() if unit in by_unit)
            yield Problem(file=part_name(dataset, first), unit=unit, what="belongs to a unit that has no listing part")
            continue
        tables = dataset.merge(listing[unit])
        tally.rows += tables.num_rows
        keys.append(np.array([hash(key) for key in tables["key"].to_pylist()], dtype=np.int64))
        yield from check_unit(dataset, unit, {facet: p[unit] for facet, p in facets.items() if unit in p})
    if keys:
        hashes = np.sort(np.concatenate(keys))
        repeated = hashes[1:][hashes[1:] == hashes[:-1]]
        if len(repeated):
            yield from repeated_keys(dataset, listing, set(repeated.tolist()))


def _wrong_columns(facet: str, schema: pa.Schema) -> str:
    wanted = _COLUMNS.get(facet)
    if facet.startswith(TEXT_PREFIX):
        wanted = TEXT_COLUMNS
    elif facet.startswith(LATENTS_PREFIX):
        wanted = LATENTS_COLUMNS
    elif facet.startswith(NEAR_PREFIX):
        wanted = NEAR_COLUMNS
    elif facet.startswith(CAPTIONS_PREFIX):
        wanted = CAPTIONS_COLUMNS
    elif is_dedup(facet):
        wanted = DEDUP_COLUMNS
    if wanted is None:
        return ""
    there = {field.name: field.type for field in schema}
    required = [field for field in wanted if field.name in there or field.name not in OPTIONAL_COLUMNS]
    wrong = [f"{f.name} ({f.type}, found {there.get(f.name)})" for f in required if there.get(f.name) != f.type]
    return f"has wrong or missing columns: {', '.join(wrong)}" if wrong else ""


def _wrong_values(column: str, values: Iterable[Any]) -> Iterator[str]:
    seen: set[Any] = set()
    twice: list[Any] = []
    unusable: list[Any] = []
    for value in values:
        if value in seen:
            twice.append(value)
        seen.add(value)
        if value is None or (column == "key" and not KEY_PATTERN.match(value)):
            unusable.append(value)
    if twice:
        yield f"has {len(twice)} {column}s more than once (first: {twice[0]})"
    if unusable:
        yield f"has {len(unusable)} unusable {column}s (first: {unusable[0]!r})"


def _indices(table: pa.Table) -> dict[str, dict[str, Place]]:
    """tar -> key -> place."""
    indices: dict[str, dict[str, Place]] = {}
    for row in table.select(["key", "tar", "offset", "nbytes", "dtype", "shape"]).to_pylist():
        indices.setdefault(row["tar"], {})[row["key"]] = Place(
            offset=row["offset"], nbytes=row["nbytes"], dtype=row["dtype"], shape=tuple(row["shape"])
        )
    return indices
