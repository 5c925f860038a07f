"""The listing: the source as it was seen, append-only, cut into units.

Place in the flow: source -> **listing** -> scan. A row keeps its number for good. New rows are appended after those
listed before, whatever their names: a last unit that is not full is filled first, by a further part, so that
unit = row // unit_size always holds. Changed captions supersede a row by a further part of its unit. Rows that the
source no longer names stay: what was encoded is not taken back.

Memory: about 300 bytes per listed row, and the source's own rows while they are looked through (about 0.5 KB each).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from producers.commit import commit_part
from producers.sources.base import SourceRow
from qwenimg_dist.data.facets import DataError, Dataset
from qwenimg_dist.schema import LISTING, LISTING_COLUMNS, row_key


@dataclass(frozen=True, kw_only=True)
class ListingChange:
    """What a look at the source changed."""

    num_rows: int
    """Rows listed in all, now."""
    added: int
    recaptioned: int
    units: tuple[int, ...]
    """Units with a further part, ascending."""


def sync_listing(
    dataset: Dataset, rows: Sequence[SourceRow], *, config_hash: str, before_commit: Callable[[], None]
) -> ListingChange:
    """Commit what the source has and the listing lacks. `before_commit` is called once, only if something changes."""
    known = _known(dataset)
    changed: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    next_row = len(known)
    seen: set[bytes] = set()
    added = recaptioned = 0
    for source_row in rows:
        key, packed = _free_key(source_row.uri, seen)
        seen.add(packed)
        digest = _digest(source_row.captions, source_row.fault)
        if packed in known:
            number, before = known[packed]
            if before == digest:
                continue
            recaptioned += 1
        else:
            number, next_row, added = next_row, next_row + 1, added + 1
        changed[number // dataset.unit_size].append(
            {
                "row": number,
                "key": key,
                "uri": source_row.uri,
                "captions": list(source_row.captions),
                "caption_fault": source_row.fault,
            }
        )
    if changed:
        before_commit()
    # Ascending, so that a kill in between leaves row numbers without a gap.
    for unit in sorted(changed):
        table = pa.Table.from_pylist(sorted(changed[unit], key=lambda entry: entry["row"]), schema=LISTING_COLUMNS)
        commit_part(dataset, dataset.next_part(LISTING, unit), table, config_hash=config_hash)
    return ListingChange(num_rows=next_row, added=added, recaptioned=recaptioned, units=tuple(sorted(changed)))


def _known(dataset: Dataset) -> dict[bytes, tuple[int, bytes]]:
    """Packed key -> (row, digest of its captions), of the newest parts."""
    known: dict[bytes, tuple[int, bytes]] = {}
    for part in dataset.parts(LISTING):
        table = dataset.read(part, ["row", "key", "captions", "caption_fault"])
        for entry in table.to_pylist():
            digest = _digest(tuple(entry["captions"]), entry["caption_fault"])
            known[bytes.fromhex(entry["key"])] = (entry["row"], digest)
    if known and max(row for row, _ in known.values()) != len(known) - 1:
        raise DataError(f"{dataset.root / LISTING} has gaps: a part was removed; restore it from a backup")
    return known


def _free_key(uri: str, seen: set[bytes]) -> tuple[str, bytes]:
    """Key of this occurrence of a uri: the n-th one in the source has the n-th key."""
    repeat = 0
    while True:
        key = row_key(uri, repeat)
        packed = bytes.fromhex(key)
        if packed not in seen:
            return key, packed
        repeat += 1


def _digest(captions: Sequence[str], fault: str | None) -> bytes:
    text = "\0".join((fault or "", *captions))
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
