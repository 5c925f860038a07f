"""The takedown list: rows that nothing selects any more, though their bytes stay where they are.

Place in the flow: `data.takedown` names a text file, one uri, sample key or sha256 of a file per line (`#` begins a
comment). A generation reads it when it is recorded, keeps a copy in `RUN/takedown/`, and its catalog is compiled
without these rows: neither trained on nor validated on. A row taken down later is left out from the next generation on:
with `follow` that is the next growth or epoch; a run without `follow` has one generation for good, so it must be
started anew (from its checkpoint's export) to lose the row. A resume repeats its recorded generations exactly, by the
copies. A picture in a tar is named by its uri with or without the byte range, and stays named when its tar is written
anew and it is listed at another place. Refuses a list that is not UTF-8 text, and a run whose earlier generations had
a list that the config no longer gives.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qwenimg_dist.data.catalog import Ints
from qwenimg_dist.data.facets import DataError, Dataset, Part
from qwenimg_dist.data.part_tables import newest, to_array
from qwenimg_dist.data.pins import UnitPins, parallel
from qwenimg_dist.files import write_json
from qwenimg_dist.patience import patiently
from qwenimg_dist.schema import LISTING, SCAN

FOLDER: Final = "takedown"
_RANGE: Final = r"^(tar:.*)@\d+\+\d+$"
"""Of a picture in a tar: where it lies is not its name."""
_SHOWN: Final = 3


@dataclass(frozen=True, kw_only=True)
class Takedown:
    """What is taken down; entries are sorted."""

    entries: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """16 hex digits of the entries; empty where nothing is taken down."""
        if not self.entries:
            return ""
        return hashlib.sha256("\n".join(self.entries).encode("utf-8", "surrogatepass")).hexdigest()[:16]


NOTHING: Final = Takedown()


def read_takedown(file: str | Path | None) -> Takedown:
    """The list, none for None. Raises `DataError` naming a file that cannot be read."""
    if file is None:
        return NOTHING
    try:
        lines = patiently(lambda: Path(file).read_text(encoding="utf-8-sig"), f"data.takedown={file}").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"data.takedown={file} cannot be read ({error}): it is a UTF-8 text file, one uri, key or sha256 per line"
        ) from error
    entries = {line.strip() for line in lines}
    return Takedown(entries=tuple(sorted(entry for entry in entries if entry and not entry.startswith("#"))))


def keep_copy(run: Path, takedown: Takedown) -> None:
    """Write the list to `RUN/takedown/`, before a generation that follows it is recorded."""
    if takedown.digest:
        write_json(_copy(run, takedown.digest), list(takedown.entries))


def recorded(run: Path, digest: str) -> Takedown:
    """The list that a generation followed. Raises `DataError` if its copy is gone or another one."""
    if not digest:
        return NOTHING
    file = _copy(run, digest)
    try:
        text = patiently(lambda: file.read_text(encoding="utf-8"), str(file))
        takedown = Takedown(entries=tuple(json.loads(text)))
    except (OSError, ValueError, TypeError):
        takedown = NOTHING
    if takedown.digest != digest:
        raise DataError(f"{file} is gone or damaged, a recorded generation followed it: restore it, or start a new run")
    return takedown


@dataclass(frozen=True, kw_only=True)
class TakenDown:
    """What a list does to some units."""

    rows: Ints
    """Listing numbers, ascending."""
    matched: tuple[int, ...]
    """Positions of the entries that name a row, ascending."""


def rows_taken_down(dataset: Dataset, units: Sequence[UnitPins], takedown: Takedown) -> TakenDown:
    """The rows that an entry names by any of their pictures. Reads unit by unit.

    Who names one file of a picture means the picture: rows with the same bytes under another uri go too.
    """
    nothing = np.zeros(0, dtype=np.int64)
    if not takedown.entries:
        return TakenDown(rows=nothing, matched=())

    def rows_of(names: Sequence[str]) -> tuple[Ints, Ints]:
        # Several entries may name one picture.
        bare = _without_range(pa.array(names, pa.string())).dictionary_encode()
        entries = bare.dictionary
        found = [pair for of_unit in parallel(lambda unit: _of_unit(dataset, unit, entries), units) for pair in of_unit]
        rows, matched = ([nothing, *(pair[side] for pair in found)] for side in (0, 1))
        given = np.flatnonzero(np.isin(to_array(bare.indices, np.int64), np.concatenate(matched)))
        return np.unique(np.concatenate(rows)), given

    named, matched = rows_of(takedown.entries)
    contents = {
        sha256 for of_unit in parallel(lambda unit: _contents(dataset, unit, named), units) for sha256 in of_unit
    }
    return TakenDown(rows=np.union1d(named, rows_of(sorted(contents))[0]), matched=tuple(matched.tolist()))


def unmatched_note(takedown: Takedown, matched: Iterable[int]) -> str | None:
    """What to tell of the entries at all other positions; None where there are none."""
    known = set(matched)
    strange = [entry for position, entry in enumerate(takedown.entries) if position not in known]
    if not strange:
        return None
    first = ", ".join(entry[:100] for entry in strange[:_SHOWN]) + (", ..." if len(strange) > _SHOWN else "")
    return (
        f"{len(strange)} of {len(takedown.entries)} entries of data.takedown name no row of the data so far ({first}): "
        "an entry is a uri exactly as it is listed (see `data inspect`; of a picture in a tar also without its "
        "@OFFSET+SIZE), a sample key, or a sha256"
    )


def _of_unit(dataset: Dataset, unit: UnitPins, entries: pa.Array) -> list[tuple[Ints, Ints]]:
    """Pairs of (rows, the entry that each has), column by column."""
    found = []
    for facet, columns in ((LISTING, ("uri", "key", "others")), (SCAN, ("sha256", "others"))):
        parts = [Part(facet=facet, unit=unit.unit, part=part) for part in range(unit.inputs.get(facet, 0))]
        if not parts:
            continue
        tables = [dataset.read(part, ["row", *columns]) for part in parts]
        table = pa.concat_tables(tables, promote_options="default")
        table = newest(table) if facet == SCAN else table  # whatever a row was ever listed as names it
        rows = to_array(table["row"], np.int64)
        found += [_named(table[name].combine_chunks(), rows, entries) for name in columns if name in table.column_names]
    return found


def _contents(dataset: Dataset, unit: UnitPins, rows: Ints) -> list[str]:
    """sha256 of those of these rows that are one picture each; of a pair, only what was named is meant."""
    parts = [Part(facet=SCAN, unit=unit.unit, part=part) for part in range(unit.inputs.get(SCAN, 0))]
    if not parts:
        return []
    tables = [dataset.read(part, None) for part in parts]
    table = newest(pa.concat_tables(tables, promote_options="default"))
    mask = pc.and_(pc.is_in(table["row"], value_set=pa.array(rows)), pc.is_valid(table["sha256"]))
    if "others" in table.column_names:
        mask = pc.and_(mask, pc.equal(pc.fill_null(pc.list_value_length(table["others"]), 0), 0))
    found: list[str] = table.filter(mask)["sha256"].to_pylist()
    return found


def _named(column: Any, rows: Ints, entries: pa.Array) -> tuple[Ints, Ints]:
    """Rows with an entry in the column, which may list the further pictures of a row, and the entries' positions."""
    if pa.types.is_list(column.type):
        rows = rows[to_array(pc.list_parent_indices(column), np.int64)]
        column = pc.list_flatten(column)
    if pa.types.is_struct(column.type):
        column = pc.struct_field(column, "sha256")
    at = to_array(pc.index_in(_without_range(column), value_set=entries), np.int64, missing=-1)
    return rows[at >= 0], at[at >= 0]


def _without_range(names: Any) -> Any:
    return pc.replace_substring_regex(names, pattern=_RANGE, replacement=r"\1")


def _copy(run: Path, digest: str) -> Path:
    return run / FOLDER / f"{digest}.json"
