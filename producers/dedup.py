"""Exact deduplication by sha256, settled in source order by the driver: no decision depends on timing.

Place in the flow: scan -> **dedup** -> filters. A row takes part once it is readable and has a caption that the caption
filters leave (`fit_captions.py`): a copy that comes first with a useless caption does not cost the one after it. It is
then settled for good: kept if and only if no settled row has the same bytes, of all its pictures (`content_digest`).
Rows that take part later (a file that turned up, a caption written afterwards) are compared with everything settled
before. The facet's name holds a fingerprint of the caption filters, so other thresholds settle anew, beside the old
facet. Near duplicates: `near.py`, afterwards.

Left out: filters on pixels. Of copies with equal bytes they say the same, but for those that compare pixels with the
captions (`similarity`, `ocr`): a first copy that one of these rejects still costs the ones after it, since duplicates
are settled before a picture is opened. So does a first copy whose captions are changed for useless ones afterwards.

Memory: 36 bytes per kept row (see `key_index.py`), so 36 MB per million, for moments twice that; not Python strings,
which would take five times as much.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

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


@dataclass(frozen=True, kw_only=True)
class DedupRule:
    """Which rows take part."""

    filters: tuple[BoundFilter, ...]
    """Those on captions; none: every row with a caption does."""

    @property
    def facet(self) -> str:
        """Where this rule's outcome lies."""
        return dedup_facet(fingerprint_of(self.filters) if self.filters else None)

    @property
    def captions_facet(self) -> str | None:
        """Where it stands which rows have a caption that the filters leave; None if all have."""
        return CAPTIONS_PREFIX + fingerprint_of(self.filters) if self.filters else None


class DigestIndex:
    """sha256 (32 bytes) -> row of the picture that is kept."""

    def __init__(self) -> None:
        self._index = KeyIndex(32)

    def __len__(self) -> int:
        return len(self._index)

    def find(self, digest: bytes) -> int | None:
        """Row of the kept picture with this digest."""
        row = self._index.find(digest)
        return None if row == ABSENT else row

    def add(self, digest: bytes, row: int) -> None:
        """Remember a kept row."""
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
        for row, original in zip(dedup["row"].to_pylist(), dedup["duplicate_of"].to_pylist()):
            # A row without a digest was scanned anew after a repair, and its file is gone by now: nothing is its copy.
            if original == KEPT and row in digests:
                index.add(digests[row], row)
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


def settle_unit(dataset: Dataset, unit: int, rule: DedupRule, index: DigestIndex, *, config_hash: str) -> None:
    """Settle the unit's rows that take part and are not settled; commits a part if there is none yet or rows to add.

    Call in ascending order of units. The index is updated only after the commit.
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
    kept: dict[bytes, int] = {}
    rows = []
    for entry in scan.to_pylist():
        row = entry["row"]
        if row in done or row in without_caption or entry["fault"] is not None:
            continue
        digest = digests[row]
        original = kept.get(digest)
        if original is None:
            original = index.find(digest)
        if original is None:
            kept[digest] = row
        rows.append({"row": row, "duplicate_of": KEPT if original is None else original})
    if rows or settled is None:
        table = pa.Table.from_pylist(rows, schema=DEDUP_COLUMNS)
        commit_part(dataset, dataset.next_part(rule.facet, unit), table, config_hash=config_hash)
    for digest, row in kept.items():
        index.add(digest, row)


def _unfit(dataset: Dataset, unit: int, rule: DedupRule) -> set[int]:
    """Rows of which the caption filters leave no caption."""
    if rule.captions_facet is None:
        return set()
    judged = dataset.read_unit(rule.captions_facet, unit)
    if judged is None:
        raise DataError(f"unit {unit} of {dataset.root} has no {rule.captions_facet} part: run `produce` again")
    return {entry["row"] for entry in judged.to_pylist() if not entry["fit"]}
