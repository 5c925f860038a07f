"""Checks the facets of one unit against each other; part of `data verify`, which first checks each part by itself.

A unit's newest `rows` part records which parts it was made from and how many rows are too small for a class: what it
promises must be there. Reads parquet only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from qwenimg_dist.data.facets import Dataset, Part
from qwenimg_dist.report.funnel import LATENTS_PREFIX, TEXT_PREFIX, latents_order
from qwenimg_dist.schema import (
    CAPTIONS_PREFIX,
    EDIT,
    LISTING,
    NEAR_PREFIX,
    ROWS,
    SCAN,
    caption_key,
    edit_caption_key,
    is_dedup,
)

REMAKE: Final = "restore it from a backup, or run `qwenimg-dist data repair` and then `produce` again"
RESTORE: Final = "restore it from a backup, or make the data set anew"
REPAIRED: Final = "repaired"
"""In the record of a unit that `data repair` took damage from and that waits for `produce`."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong."""

    file: str
    """Relative to the data set."""
    unit: int | None
    what: str
    remedy: str = RESTORE
    part: Part | None = None
    """The part that is damaged; `data repair` moves it aside."""
    facet: str | None = None
    """The facet that lacks something, though none of its parts is damaged."""

    def __str__(self) -> str:
        unit = f" (unit {self.unit})" if self.unit is not None else ""
        return f"{self.file}{unit}: {self.what}; {self.remedy}"


def check_unit(dataset: Dataset, unit: int, parts: dict[str, list[Part]]) -> Iterator[Problem]:
    for of_facet in parts.values():
        if [part.part for part in of_facet] != list(range(len(of_facet))):
            what = f"is one of parts {[part.part for part in of_facet]}: one between is gone"
            facet = of_facet[-1].facet
            yield Problem(file=part_name(dataset, of_facet[-1]), unit=unit, what=what, remedy=REMAKE, facet=facet)
    listing = dataset.merge(parts[LISTING], ["row", "key", "captions"])
    keys = dict(zip(listing["row"].to_pylist(), listing["key"].to_pylist()))
    name = part_name(dataset, parts[LISTING][-1])
    if any(row // dataset.unit_size != unit for row in keys):
        yield Problem(file=name, unit=unit, what=f"lists rows of another unit (units have {dataset.unit_size} rows)")
    for facet in (facet for facet in parts if _rows_alone(facet) or facet.startswith(LATENTS_PREFIX)):
        yield from _check_rows_known(dataset, unit, facet, parts[facet], keys)
    if ROWS not in parts:
        return
    name = part_name(dataset, parts[ROWS][-1])
    table = dataset.merge(parts[ROWS], ["row", "key", "status", "caption_faults"])
    yield from _check_rows_known(dataset, unit, ROWS, parts[ROWS], keys)
    record = dataset.meta(parts[ROWS][-1])
    inputs = dict(record.get("inputs", {}))
    for facet, count in sorted(inputs.items()):
        there = len(parts.get(facet, []))
        if there < count:
            what = f"was made from {count} parts of {facet}, of which {there} are there"
            yield Problem(file=name, unit=unit, what=what, remedy=REMAKE, facet=facet)
    if REPAIRED in record:
        return  # the next `produce` adds what is missing
    # Rows listed later are decided by a later part; up to then the decisions cover what `inputs` says.
    seen = dataset.merge(parts[LISTING][: int(inputs.get(LISTING, len(parts[LISTING])))], ["row", "captions", "kind"])
    undecided = set(seen["row"].to_pylist()) - set(table["row"].to_pylist())
    if undecided:
        what = f"has no decision on {len(undecided)} listed rows (first: row {min(undecided)})"
        yield Problem(file=name, unit=unit, what=what, remedy=REMAKE, facet=ROWS)
    kept = {row for row, status in zip(table["row"].to_pylist(), table["status"].to_pylist()) if status == "kept"}
    faults = {entry["row"]: entry.get("caption_faults") or [] for entry in table.to_pylist()}
    edits = {entry["row"]: entry for entry in seen.to_pylist() if entry["row"] in kept and entry.get("kind") == EDIT}
    for facet in sorted(facet for facet in inputs if facet.startswith(TEXT_PREFIX) and facet in parts):
        yield from _check_captions(dataset, unit, parts[facet], seen, kept - edits.keys(), faults)
        yield from _check_edit_texts(dataset, unit, parts, facet, edits, faults)
    yield from _check_encoded(dataset, unit, parts, record, kept)


def _check_encoded(
    dataset: Dataset, unit: int, parts: dict[str, list[Part]], record: dict[str, Any], kept: set[int]
) -> Iterator[Problem]:
    """Every kept row has latents at every class, but for those that the record counts as too small, and those whose
    file was gone when the class was added."""
    latents = [name for name in record.get("inputs", {}) if name.startswith(LATENTS_PREFIX) and name in parts]
    classes = Counter(latents_order(name)[0] for name in latents)
    for facet in sorted(latents):
        resolution = latents_order(facet)[0]
        left_out = record.get("left_out", {}).get(str(resolution))
        if left_out is None or classes[resolution] > 1:  # the record counts by class, not by encoder
            continue
        there = set(dataset.merge(parts[facet], ["row"])["row"].to_pylist())
        lacking = sum(resolution in one["classes"] for one in record.get("lacking", {}).values())
        absent = len(kept - there) - int(left_out) - lacking
        if absent > 0:
            what = f"lacks the latents of {absent} kept rows that are large enough"
            name = part_name(dataset, parts[facet][-1])
            yield Problem(file=name, unit=unit, what=what, remedy=REMAKE, facet=facet)


def _rows_alone(facet: str) -> bool:
    """Whether the facet's rows stand without their keys."""
    return facet == SCAN or is_dedup(facet) or facet.startswith((NEAR_PREFIX, CAPTIONS_PREFIX))


def _check_rows_known(
    dataset: Dataset, unit: int, facet: str, parts: Sequence[Part], keys: dict[int, str]
) -> Iterator[Problem]:
    """Every row of the facet is a listed row, under the listing's key."""
    for part in parts:
        schema = dataset.read(part, ["row"] if _rows_alone(facet) else ["row", "key"]).to_pydict()
        strange = sorted(set(schema["row"]) - set(keys))
        if strange:
            what = f"has {len(strange)} rows that are not listed (first: row {strange[0]})"
            yield Problem(file=part_name(dataset, part), unit=unit, what=what, remedy=REMAKE, part=part)
        pairs = zip(schema["row"], schema.get("key", []))
        other = [row for row, key in pairs if row in keys and keys[row] != key]
        if other:
            what = f"has {len(other)} rows under another key than the listing's (first: row {other[0]})"
            yield Problem(file=part_name(dataset, part), unit=unit, what=what, remedy=REMAKE, part=part)


def _check_captions(
    dataset: Dataset,
    unit: int,
    parts: Sequence[Part],
    listing: pa.Table,
    kept: set[int],
    faults: Mapping[int, Sequence[str]],
) -> Iterator[Problem]:
    """Every fit caption of a kept row has features, and so has the empty prompt."""
    there = {key for part in parts for key in dataset.read(part, ["key"])["key"].to_pylist()}
    wanted = {
        caption_key(caption): caption
        for row, captions in zip(listing["row"].to_pylist(), listing["captions"].to_pylist())
        if row in kept
        for caption, fault in zip_longest(captions or [], faults[row], fillvalue="")
        if not fault
    }
    wanted[caption_key("")] = ""
    absent = sorted(wanted[key] for key in set(wanted) - there)
    if absent:
        what = f"lacks the features of {len(absent)} captions of kept rows (first: {absent[0][:60]!r})"
        facet = parts[-1].facet
        yield Problem(file=part_name(dataset, parts[-1]), unit=unit, what=what, remedy=REMAKE, facet=facet)


def _check_edit_texts(
    dataset: Dataset,
    unit: int,
    parts: dict[str, list[Part]],
    facet: str,
    edits: dict[int, dict[str, Any]],
    faults: Mapping[int, Sequence[str]],
) -> Iterator[Problem]:
    """Every fit instruction of a kept edit, and the empty one, has features that saw the edit's pictures."""
    if not edits:
        return
    there = {key for part in parts[facet] for key in dataset.read(part, ["key"])["key"].to_pylist()}
    scans = {entry["row"]: entry for entry in dataset.merge(parts[SCAN], ["row", "others"]).to_pylist()}
    pictures = {row: [one["sha256"] or "" for one in scans.get(row, {}).get("others") or ()] for row in edits}
    absent = [
        (row, text)
        for row, entry in sorted(edits.items())
        for text, fault in zip_longest(("", *entry["captions"]), ("", *faults[row]), fillvalue="")
        if not fault and edit_caption_key(text, pictures[row]) not in there
    ]
    if absent:
        row, text = absent[0]
        what = f"lacks the features of {len(absent)} instructions of kept edits (first: row {row}, {text[:60]!r})"
        yield Problem(file=part_name(dataset, parts[facet][-1]), unit=unit, what=what, remedy=REMAKE)


def repeated_keys(dataset: Dataset, listing: dict[int, list[Part]], repeated: set[int]) -> Iterator[Problem]:
    """Second pass, only when two keys share a hash: tells real repeats by name."""
    first: dict[str, int] = {}
    for unit, parts in sorted(listing.items()):
        for row in dataset.merge(parts, ["row", "key"]).to_pylist():
            if hash(row["key"]) not in repeated:
                continue
            if row["key"] in first:
                what = f"row {row['row']} has the key {row['key']} of row {first[row['key']]}"
                yield Problem(file=part_name(dataset, parts[-1]), unit=unit, what=what)
            first.setdefault(row["key"], row["row"])


def part_name(dataset: Dataset, part: Part) -> str:
    """FACET/FILE, as problems name it."""
    return str(Path(part.facet) / dataset.parquet(part).name)
