"""Near duplicates by perceptual hash, settled in source order by the driver, after exact ones.

Place in the flow: scan -> dedup -> **near** -> filters; off unless `dedup.near` is set. An image takes part once it is
the one copy of its bytes with a fit caption (`dedup.py`), has a hash and is admitted by the header's filters: a
thumbnail below `filters.resolution.min_side` does not cost the picture of which it is a copy. It is then settled for
good: it is no near duplicate if and only if no row before it that is none either, **and that the filters on pixels
admit**, is within the distance: a blurred first copy does not cost the sharp ones after it. What the filters say is
asked only of rows that a later one looks like (`verdicts.py`); a unit waits for those answers, and for no other unit.
Rows that take part later (a file that turned up) are compared with everything settled before. Resolution classes play
no role, so adding one changes no decision.

The facet's name holds the distance and a fingerprint of all these filters, so another distance or other thresholds
settle anew, from the scan's columns and the scores in the index, in a facet of their own; pictures are opened only
where a score is missing, and nothing is rewritten. A unit settled once more, its part lost, comes out the same.

Left out: edits and preference pairs, whose pictures are meant to be alike; and first copies that are too small for
every resolution class of the run: they cost the larger ones, since otherwise a further class would change decisions.
`filters.resolution.min_side` is what tells them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from producers.commit import commit_part
from producers.dedup import ADMITTED, KEPT, UNKNOWN, Ask, DedupRule
from producers.filters.base import BoundFilter, Facts, fingerprint_of
from producers.near_index import HammingIndex, Hashes, Hits, Ints
from qwenimg_dist.data.facets import DataError, Dataset, Part
from qwenimg_dist.data.pins import parallel
from qwenimg_dist.schema import NEAR_COLUMNS, SCAN, near_facet


@dataclass(frozen=True, kw_only=True)
class NearRule:
    """The distance, and who takes part."""

    distance: int
    filters: tuple[BoundFilter, ...]
    """Those on the header."""
    dedup: DedupRule
    """Only the copies that it keeps take part."""
    pixels: tuple[BoundFilter, ...] = ()
    """Those on pixels: a row that one of them rejects costs no other."""

    @property
    def facet(self) -> str:
        """Where this rule's outcome lies."""
        return near_facet(self.distance, fingerprint_of((*self.filters, *self.dedup.filters, *self.pixels)))

    def takes_part(self, facts: Facts) -> bool:
        """Whether a readable row with a hash does, by its header."""
        return all(one.admit(one.score(facts)) is None for one in self.filters)


def load_near_index(dataset: Dataset, rule: NearRule) -> HammingIndex:
    """Everything kept so far. Reads one small file per settled unit, columns as arrays."""
    index = HammingIndex(rule.distance)
    tables = parallel(lambda part: _kept(dataset, part), dataset.parts(rule.facet))
    if tables:
        index.add(np.concatenate([hashes for hashes, _ in tables]), np.concatenate([rows for _, rows in tables]))
    return index


def settle_near(
    dataset: Dataset, unit: int, rule: NearRule, index: HammingIndex, ask: Ask | None, *, config_hash: str
) -> frozenset[int]:
    """Settle the unit's rows that take part and are not settled; commits a part if there is none yet or rows to add.

    Returns the rows whose verdicts are wanted first; then nothing was done, and it is to be called again. `ask` tells
    those that are known; None where no filter looks at pixels. Call in ascending order of units, after `settle_unit`.
    The index is updated only after the commit.
    """
    settled = dataset.read_unit(rule.facet, unit, ["row"])
    done = set(settled["row"].to_pylist()) if settled is not None else set()
    taking_part = [entry for entry in _taking_part(dataset, unit, rule) if entry["row"] not in done]
    rows = np.array([entry["row"] for entry in taking_part], dtype=np.int64)
    hashes = np.array([entry["phash"] for entry in taking_part], dtype=np.int64).view(np.uint64)
    near, distances, wanted = settle(hashes, rows, index, ask)
    if wanted:
        return wanted
    if len(rows) or settled is None:
        columns = [rows, near, distances.astype(np.int8), hashes.view(np.int64)]
        table = pa.Table.from_arrays([pa.array(column) for column in columns], schema=NEAR_COLUMNS)
        commit_part(dataset, dataset.next_part(rule.facet, unit), table, config_hash=config_hash)
    index.add(hashes[near == KEPT], rows[near == KEPT])
    return wanted


def settle(
    hashes: Hashes, rows: Ints, index: HammingIndex, ask: Ask | None = None
) -> tuple[Ints, Ints, frozenset[int]]:
    """(row of the nearest kept one or `KEPT`, distance or -1) of each, in order; the index stays as it is. And the rows
    of which `ask` must know the verdict first: unless there is none, the two others say nothing yet.

    Of several kept rows an earlier one counts before a later one, then the nearer, then the lower number.
    """
    near, distances = np.full(len(rows), KEPT, dtype=np.int64), np.full(len(rows), -1, dtype=np.int64)
    hits, unknown = _that_count(index.find(hashes), ask)
    wanted, open_rows = set(unknown.rows.tolist()), set(unknown.asked.tolist())
    own = ask(rows) if ask is not None else np.full(len(rows), ADMITTED, dtype=np.int8)
    order = np.lexsort((hits.rows, hits.distances, hits.rows > rows[hits.asked], hits.asked))
    asked, first = np.unique(hits.asked[order], return_index=True)
    near[asked], distances[asked] = hits.rows[order][first], hits.distances[order][first]
    kept: list[int] = []
    for number in range(len(rows)):
        between = np.bitwise_count(hashes[kept] ^ hashes[number])
        inside = np.flatnonzero(between <= index.distance)
        wanted.update(int(rows[kept[place]]) for place in inside if own[kept[place]] == UNKNOWN)
        if any(own[kept[place]] == UNKNOWN for place in inside):
            open_rows.add(number)
        inside = inside[[bool(own[kept[place]] == ADMITTED) for place in inside]]
        for place_kept in inside[np.argsort(between[inside], kind="stable")][:1]:
            other = rows[kept[place_kept]]
            found = (bool(near[number] > rows[number]), int(distances[number]), int(near[number]))
            if near[number] == KEPT or (False, int(between[place_kept]), int(other)) < found:
                near[number], distances[number] = other, between[place_kept]
        if near[number] == KEPT and number not in open_rows:
            kept.append(number)
    return near, distances, frozenset(wanted)


def _that_count(hits: Hits, ask: Ask | None) -> tuple[Hits, Hits]:
    """Hits on rows that the filters on pixels admit, and those on rows of which it is not known."""
    if ask is None:
        return hits, hits.of(np.zeros(len(hits.rows), dtype=np.bool_))
    told = ask(hits.rows)
    return hits.of(told == ADMITTED), hits.of(told == UNKNOWN)


def _taking_part(dataset: Dataset, unit: int, rule: NearRule) -> Sequence[dict[str, Any]]:
    """Scan entries of the unit's rows that take part, ascending."""
    dedup = dataset.read_unit(rule.dedup.facet, unit)
    scan = dataset.read_unit(SCAN, unit)
    if dedup is None or scan is None:
        raise DataError(f"unit {unit} of {dataset.root} has no scan or dedup part: run `produce` again")
    if "phash" not in scan.column_names:  # from before there were hashes
        return []
    unique = {row for row, of in zip(dedup["row"].to_pylist(), dedup["duplicate_of"].to_pylist()) if of == KEPT}
    columns = scan.select(["row", "bytes", "width", "height", "orientation", "phash"])
    return [
        entry
        for entry in sorted(columns.to_pylist(), key=lambda entry: int(entry["row"]))
        if entry["row"] in unique and entry["phash"] is not None and rule.takes_part(_facts(entry))
    ]


def _facts(entry: dict[str, Any]) -> Facts:
    return Facts(
        num_bytes=entry["bytes"], width=entry["width"], height=entry["height"], orientation=entry["orientation"]
    )


def _kept(dataset: Dataset, part: Part) -> tuple[Hashes, Ints]:
    table = dataset.read(part, ["row", "near_duplicate_of", "phash"])
    kept = table["near_duplicate_of"].to_numpy() == KEPT
    return table["phash"].to_numpy()[kept].view(np.uint64), table["row"].to_numpy()[kept]
