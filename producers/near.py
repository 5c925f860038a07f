"""Near duplicates by perceptual hash, settled in source order by the driver, after exact ones.

Place in the flow: scan -> dedup -> **near** -> filters; off unless `dedup.near` is set. An image takes part once it is
the one copy of its bytes with a fit caption (`dedup.py`), has a hash and is admitted by the header's filters: a
thumbnail below `filters.resolution.min_side` does not cost the picture of which it is a copy. It is then settled for
good: kept if and only if no kept row before it is within the distance. Rows that take part later (a file that turned
up) are compared with everything settled before. Resolution classes play no role, so adding one changes no decision.

The facet's name holds the distance and a fingerprint of who takes part, so another distance or other header thresholds
settle anew, from the scan's columns, in a facet of their own; no picture is read again and nothing is rewritten. A
unit settled once more, its part lost, comes out the same.

Left out: edits and preference pairs, whose pictures are meant to be alike; and what filters on pixels will say. A first
copy that one of these rejects (a blurred thumbnail above `min_side`, say) still costs the better ones after it: they
are settled, in source order and for good, before a picture is opened. Where that matters, let the better files come
first in the source, or settle by `filters.resolution.min_side`, which is asked before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from producers.commit import commit_part
from producers.dedup import KEPT, DedupRule
from producers.filters.base import BoundFilter, Facts, fingerprint_of
from producers.near_index import HammingIndex, Hashes, Ints
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

    @property
    def facet(self) -> str:
        """Where this rule's outcome lies."""
        return near_facet(self.distance, fingerprint_of((*self.filters, *self.dedup.filters)))

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


def settle_near(dataset: Dataset, unit: int, rule: NearRule, index: HammingIndex, *, config_hash: str) -> None:
    """Settle the unit's rows that take part and are not settled; commits a part if there is none yet or rows to add.

    Call in ascending order of units, after `settle_unit`. The index is updated only after the commit.
    """
    settled = dataset.read_unit(rule.facet, unit, ["row"])
    done = set(settled["row"].to_pylist()) if settled is not None else set()
    taking_part = [entry for entry in _taking_part(dataset, unit, rule) if entry["row"] not in done]
    rows = np.array([entry["row"] for entry in taking_part], dtype=np.int64)
    hashes = np.array([entry["phash"] for entry in taking_part], dtype=np.int64).view(np.uint64)
    near, distances = settle(hashes, rows, index)
    if len(rows) or settled is None:
        columns = [rows, near, distances.astype(np.int8), hashes.view(np.int64)]
        table = pa.Table.from_arrays([pa.array(column) for column in columns], schema=NEAR_COLUMNS)
        commit_part(dataset, dataset.next_part(rule.facet, unit), table, config_hash=config_hash)
    index.add(hashes[near == KEPT], rows[near == KEPT])


def settle(hashes: Hashes, rows: Ints, index: HammingIndex) -> tuple[Ints, Ints]:
    """(row of the nearest kept one or `KEPT`, distance or -1) of each, in order; the index stays as it is.

    Of several kept rows an earlier one counts before a later one, then the nearer, then the lower number.
    """
    near, distances = np.full(len(rows), KEPT, dtype=np.int64), np.full(len(rows), -1, dtype=np.int64)
    hits = index.find(hashes)
    order = np.lexsort((hits.rows, hits.distances, hits.rows > rows[hits.asked], hits.asked))
    asked, first = np.unique(hits.asked[order], return_index=True)
    near[asked], distances[asked] = hits.rows[order][first], hits.distances[order][first]
    kept: list[int] = []
    for number in range(len(rows)):
        between = np.bitwise_count(hashes[kept] ^ hashes[number])
        inside = np.flatnonzero(between <= index.distance)
        for place_kept in inside[np.argsort(between[inside], kind="stable")][:1]:
            other = rows[kept[place_kept]]
            found = (bool(near[number] > rows[number]), int(distances[number]), int(near[number]))
            if near[number] == KEPT or (False, int(between[place_kept]), int(other)) < found:
                near[number], distances[number] = other, between[place_kept]
        if near[number] == KEPT:
            kept.append(number)
    return near, distances


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
