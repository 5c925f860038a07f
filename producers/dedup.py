"""Exact deduplication by sha256, settled in source order by the driver: no decision depends on timing.

Place in the flow: scan -> **dedup** -> filters. A row takes part once it is readable and has a caption that the caption
filters leave (`fit_captions.py`): a copy that comes first with a useless caption does not cost the one after it. It is
then settled for good: kept if and only if no settled row has the same bytes, of all its pictures (`content_digest`).
Rows that take part later (a file that turned up, a caption written afterwards) are compared with everything settled
before. The facet's name holds a fingerprint of the caption filters, so other thresholds settle anew, beside the old
facet. Near duplicates: `near.py`, afterwards.

Filters on pixels say the same of copies with equal bytes, so they are not asked, but for those that compare pixels
with the captions (`similarity`, `ocr`): where one is on, a first copy that the filters on pixels reject does not cost
the one after it. That is asked only of rows that have a copy (`verdicts.py`).

Left out: a first copy whose captions are changed for useless ones after it was settled still costs the ones after it.

Memory: 36 bytes per kept row (see `key_index.py`), so 36 MB per million, for moments twice that; not Python strings,
which would take five times as much.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from producers.commit import commit_part
from producers.filters.base import BoundFilter, fingerprint_of
from producers.key_index import ABSENT, KeyIndex
from qwenimg_dist.data.facets import DataError, Dataset
from qwenimg_dist.schema import (
    CAPTIONS_PREFIX,
    DEDUP_COLUMNS,
    IMAGE,
    LISTING,
    PROMPT,
    SCAN,
    Kind,
    dedup_facet,
    row_identity,
)

KEPT: Final = -1
UNKNOWN: Final = 0
ADMITTED: Final = 1
REJECTED: Final = 2
"""What filters on pixels say of a row, as far as it is known."""

Ask = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int8]]
"""Rows -> what is known of each."""


@dataclass(frozen=True, kw_only=True)
class DedupRule:
    """Which rows take part."""

    filters: tuple[BoundFilter, ...]
    """Those on captions; none: every row with a caption does."""
    pixels: tuple[BoundFilter, ...] = ()
    """All on pixels, if one of them looks at the captions too: a row that one of them rejects costs no copy of it."""

    @property
    def facet(self) -> str:
        """Where this rule's outcome lies."""
        filters = (*self.filters, *self.pixels)
        return dedup_facet(fingerprint_of(filters) if filters else None)

    @property
    def captions_facet(self) -> str | None:
        """Where it stands which rows have a caption that the filters leave; None if all have."""
        return CAPTIONS_PREFIX + fingerprint_of(self.filters) if self.filters else None


class DigestIndex:
    """sha256 (32 bytes) -> rows that were no copies when they were settled: one, or several of which filters on pixels
    admit one at most."""

    def __init__(self) -> None:
        self._index = KeyIndex(32)
        self._further: dict[bytes, list[int]] = {}

    def __len__(self) -> int:
        return len(self._index)

    def find_many(self, digests: Sequence[bytes]) -> list[list[int]]:
        """The rows of each digest."""
        found = self._index.find_many(digests).tolist()
        return [
            [] if first == ABSENT else [first, *self._further.get(digest, ())]
            for digest, first in zip(digests, found, strict=True)
        ]

    def add(self, kept: Iterable[tuple[bytes, int]]) -> None:
        """Remember rows."""
        entries = list(kept)
        there = self._index.find_many([digest for digest, _ in entries]) != ABSENT
        fresh: set[bytes] = set()
        for (digest, row), is_there in zip(entries, there.tolist(), strict=True):
            if is_there or digest in fresh:
                self._further.setdefault(digest, []).append(row)
            else:
                fresh.add(digest)
                self._index.add(digest, row)


def load_index(dataset: Dataset, rule: DedupRule) -> DigestIndex:
    """Everything settled so far. Raises `DataError` if a dedup part has no scan."""
    index = DigestIndex()
    scans = dataset.parts_by_unit(SCAN)
    for unit, parts in dataset.parts_by_unit(rule.facet).items():
        if unit not in scans:
            raise DataError(f"unit {unit} of {dataset.root} has a dedup part but no scan: a file was removed")
        dedup, scan = dataset.merge(parts), dataset.merge(scans[unit], ["row", "sha256", "others"])
        digests = _digests(dataset, unit, scan)
        settled = zip(dedup["row"].to_pylist(), dedup["duplicate_of"].to_pylist())
        # A row without a digest was scanned anew after a repair, and its file is gone by now: nothing is its copy.
        index.add((digests[row], row) for row, original in settled if original == KEPT and row in digests)
    return index


def content_digest(kind: Kind, sha256s: Sequence[str], captions: Sequence[str]) -> bytes:
    """32 bytes, equal for rows that are copies of each other: an image's sha256; else of kind, all pictures in order,
    and the text where it is part of the row's identity. Edits with the same pictures are one row with several
    instructions, as a picture has several captions."""
    if kind == IMAGE:
        return bytes.fromhex(sha256s[0])
    return hashlib.sha256(row_identity(kind, sha256s, captions).encode("utf-8", "surrogatepass")).digest()


def _digests(dataset: Dataset, unit: int, scan: pa.Table) -> dict[int, bytes]:
    """Row -> what it is compared by; of the scan's rows with all of their pictures read."""
    listed: dict[int, dict[str, Any]] = {}
    kinds = dataset.read_unit(LISTING, unit, ["row", "kind"])
    assert kinds is not None  # units come from the listing
    if any(kind not in (None, IMAGE) for kind in kinds.to_pydict().get("kind", [])):
        listing = dataset.read_unit(LISTING, unit, ["row", "kind", "captions"])
        assert listing is not None
        listed = {entry["row"]: entry for entry in listing.to_pylist()}
    found = {}
    for entry in scan.to_pylist():
        row = listed.get(entry["row"], {})
        kind = row.get("kind") or IMAGE
        sha256s = [entry["sha256"], *(one["sha256"] for one in entry.get("others") or ())] if kind != PROMPT else []
        if all(sha256s):
            found[entry["row"]] = content_digest(kind, sha256s, row.get("captions") or ())
    return found


def settle_unit(
    dataset: Dataset, unit: int, rule: DedupRule, index: DigestIndex, ask: Ask | None = None, *, config_hash: str
) -> frozenset[int]:
    """Settle the unit's rows that take part and are not settled; commits a part if there is none yet or rows to add.

    Returns the rows whose verdicts are wanted first; then nothing was done, and it is to be called again. `ask` tells
    those that are known; it is asked only where `rule.pixels` has filters. Call in ascending order of units. The index
    is updated only after the commit.
    """
    listing = dataset.read_unit(LISTING, unit, ["row", "caption_fault"])
    scan = dataset.read_unit(SCAN, unit, ["row", "sha256", "fault", "others"])
    assert listing is not None  # units come from the listing
    assert scan is not None  # and are settled after their scan
    settled = dataset.read_unit(rule.facet, unit, ["row"])
    done = set(settled["row"].to_pylist()) if settled is not None else set()
    without_caption = {entry["row"] for entry in listing.to_pylist() if entry["caption_fault"] is not None}
    without_caption |= _unfit(dataset, unit, rule)
    digests = _digests(dataset, unit, scan)
    todo = [
        entry["row"]
        for entry in scan.to_pylist()
        if entry["row"] not in done and entry["row"] not in without_caption and entry["fault"] is None
    ]
    before = dict(zip(todo, index.find_many([digests[row] for row in todo]), strict=True))
    kept: dict[bytes, list[int]] = {}
    wanted: set[int] = set()
    rows = []
    for row in todo:
        originals = [*before[row], *kept.get(digests[row], ())]
        if ask is not None and rule.pixels and originals:
            told = ask(np.array(originals, dtype=np.int64))
            wanted.update(one for one, state in zip(originals, told, strict=True) if state == UNKNOWN)
            originals = [one for one, state in zip(originals, told, strict=True) if state != REJECTED]
        if not originals:
            kept.setdefault(digests[row], []).append(row)
        rows.append({"row": row, "duplicate_of": min(originals, default=KEPT)})
    if wanted:
        return frozenset(wanted)
    if rows or settled is None:
        table = pa.Table.from_pylist(rows, schema=DEDUP_COLUMNS)
        commit_part(dataset, dataset.next_part(rule.facet, unit), table, config_hash=config_hash)
    index.add((digest, row) for digest, of_digest in kept.items() for row in of_digest)
    return frozenset()


def _unfit(dataset: Dataset, unit: int, rule: DedupRule) -> set[int]:
    """Rows of which the caption filters leave no caption."""
    if rule.captions_facet is None:
        return set()
    judged = dataset.read_unit(rule.captions_facet, unit)
    if judged is None:
        raise DataError(f"unit {unit} of {dataset.root} has no {rule.captions_facet} part: run `produce` again")
    return {entry["row"] for entry in judged.to_pylist() if not entry["fit"]}
