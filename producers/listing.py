"""The listing: the source as it was seen, append-only, cut into units.

Place in the flow: source -> **listing** -> scan. A row keeps its number for good. New rows are appended after those
listed before, whatever their names: a last unit that is not full is filled first, by a further part, so that
unit = row // unit_size always holds. Changed captions, or a picture that lies elsewhere in a tar that was written
anew, supersede a row by a further part of its unit. Rows that the source no longer names stay: what was encoded is not
taken back.

The source is streamed: a unit of new rows is committed as soon as it is full, so a look that breaks off leaves a
shorter listing, never one with a gap. What is remembered of a listed row is its key, its number and eight bytes of its
digest (see `key_index.py`): about 35 bytes. Changed rows are held until 16,384 wait.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import numpy as np
import pyarrow as pa

from producers.commit import commit_part
from producers.key_index import ABSENT, KeyIndex
from producers.sources import tars
from producers.sources.base import SourceRow
from qwenimg_dist.data.facets import DataError, Dataset
from qwenimg_dist.schema import LISTING, LISTING_COLUMNS, Kind, row_key

_KEY_BYTES: Final = 10
_BATCH_ROWS: Final = 4096
_CHANGES_HELD: Final = 16_384
_DIGESTED: Final = ["row", "key", "uri", "captions", "caption_fault", "caption_kinds", "meta", "labels"]
_REPEATS_REMEMBERED: Final = 4
"""From this many occurrences of one row on, the next one's number is remembered instead of counted up to."""


@dataclass(frozen=True, kw_only=True)
class ListingChange:
    """What a look at the source changed."""

    num_rows: int
    """Rows listed in all, now."""
    added: int
    recaptioned: int
    """Listed again: with other captions or labels, or at another place in their tar."""
    units: tuple[int, ...]
    """Units with a further part, ascending."""


def sync_listing(
    dataset: Dataset, rows: Iterable[SourceRow], *, config_hash: str, before_commit: Callable[[], None]
) -> ListingChange:
    """Commit what the source has and the listing lacks. `before_commit` is called once, only if something changes."""
    known = _read_known(dataset)
    changes = _Changes(dataset, len(known), config_hash, before_commit)
    added = recaptioned = 0
    for batch in _batches(rows):
        digests = [_digest(one.captions, one.fault, one.meta, one.caption_kinds, one.labels, one.uri) for one in batch]
        for source_row, (key, number), digest in zip(batch, known.meet([one.identity for one in batch]), digests):
            if number == ABSENT:
                number, added = known.add(key, digest), added + 1
            elif known.recaption(number, digest):
                recaptioned += 1
            else:
                continue
            changes.add(
                {
                    "row": number,
                    "key": key.hex(),
                    "uri": source_row.uri,
                    "captions": list(source_row.captions),
                    "caption_fault": source_row.fault,
                    "caption_kinds": list(source_row.caption_kinds) or None,
                    "kind": source_row.kind,
                    "others": list(source_row.others),
                    "meta": source_row.meta,
                    "labels": source_row.labels,
                    "fault_detail": source_row.fault_detail,
                }
            )
    changes.commit_all()
    return ListingChange(num_rows=len(known), added=added, recaptioned=recaptioned, units=tuple(sorted(changes.units)))


def _batches(rows: Iterable[SourceRow]) -> Iterator[list[SourceRow]]:
    waiting = iter(rows)
    while batch := list(islice(waiting, _BATCH_ROWS)):
        yield batch


def check_kind(dataset: Dataset, kind: Kind) -> None:
    """A data set holds rows of one kind, as its first row says. Raises `DataError` for another one."""
    first = dataset.kind()
    if first not in (None, kind):
        raise DataError(
            f"{dataset.root} holds rows of kind {first}, this source gives {kind}: choose another data.path; training "
            "mixes data sets by weight"
        )


class _Known:
    """The listed rows: key -> row -> digest of the captions, and which of them this look has met."""

    def __init__(self) -> None:
        self._index = KeyIndex(_KEY_BYTES)
        self._digests = np.zeros(0, dtype=np.uint64)
        self._met = np.zeros(0, dtype=bool)
        self._next_repeat: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._index)

    def meet(self, identities: Sequence[str]) -> Iterable[tuple[bytes, int]]:
        """(key, row or `ABSENT`) of each row's next occurrence: the n-th one in the source has the n-th key.

        Lazily, so that the caller can `add` what is absent before the next one is looked up.
        """
        keys = [bytes.fromhex(row_key(identity)) for identity in identities]
        rows = self._index.find_many(keys).tolist()
        of_batch: set[bytes] = set()
        for identity, key, row in zip(identities, keys, rows):
            if key in of_batch or (row != ABSENT and self._met[row]):
                key, row = self._next_free(identity)
            if row == ABSENT:
                of_batch.add(key)
            else:
                self._met[row] = True
            yield key, row

    def _next_free(self, identity: str) -> tuple[bytes, int]:
        repeat = self._next_repeat.get(identity, 1)
        while True:
            key = bytes.fromhex(row_key(identity, repeat))
            row = self._index.find(key)
            repeat += 1
            if row == ABSENT or not self._met[row]:
                if repeat > _REPEATS_REMEMBERED:
                    self._next_repeat[identity] = repeat
                return key, row

    def add(self, key: bytes, digest: int, *, met: bool = True) -> int:
        """List a key as the next row; returns its number."""
        row = len(self._index)
        self._index.add(key, row)
        self._reserve(row + 1)
        self._digests[row], self._met[row] = digest, met
        return row

    def recaption(self, row: int, digest: int) -> bool:
        """Note the row's captions; whether they changed."""
        changed = int(self._digests[row]) != digest
        self._digests[row] = digest
        return changed

    def _reserve(self, num_rows: int) -> None:
        if num_rows > len(self._digests):
            grown = max(num_rows, 1024, len(self._digests) * 9 // 8)
            self._digests = np.pad(self._digests, (0, grown - len(self._digests)))
            self._met = np.pad(self._met, (0, grown - len(self._met)))


class _Changes:
    """Entries on their way into listing parts: a unit of new rows goes when it is full, all others now and then."""

    def __init__(self, dataset: Dataset, num_known: int, config_hash: str, before_commit: Callable[[], None]) -> None:
        self._dataset = dataset
        self._config_hash = config_hash
        self._before_commit = before_commit
        self._num_known = num_known
        self._held: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
        self._num_held = 0
        self.units: set[int] = set()
        """With a further part."""

    def add(self, entry: dict[str, Any]) -> None:
        row, size = entry["row"], self._dataset.unit_size
        self._held[row // size].append(entry)
        self._num_held += 1
        if row >= self._num_known and (row + 1) % size == 0:  # new rows come in ascending order
            self._commit(row // size)
        elif self._num_held >= _CHANGES_HELD:
            for unit in sorted(self._held):
                if (unit + 1) * size <= self._num_known:  # the unit that is being filled waits until it is full
                    self._commit(unit)

    def commit_all(self) -> None:
        """Ascending, so that a kill in between leaves row numbers without a gap."""
        for unit in sorted(self._held):
            self._commit(unit)

    def _commit(self, unit: int) -> None:
        if not self.units:
            self._before_commit()
        entries = sorted(self._held.pop(unit), key=lambda entry: entry["row"])
        self._num_held -= len(entries)
        table = pa.Table.from_pylist(entries, schema=LISTING_COLUMNS)
        commit_part(self._dataset, self._dataset.next_part(LISTING, unit), table, config_hash=self._config_hash)
        self.units.add(unit)


def _read_known(dataset: Dataset) -> _Known:
    """What the newest listing parts say. Raises `DataError` if a part is missing."""
    known = _Known()
    for part in dataset.parts(LISTING):
        table = dataset.read(part, _DIGESTED)
        for entry in sorted(table.to_pylist(), key=lambda entry: entry["row"]):
            captions, fault, kinds = entry["captions"], entry["caption_fault"], entry.get("caption_kinds") or ()
            digest = _digest(captions, fault, entry.get("meta"), kinds, entry.get("labels"), entry["uri"])
            if entry["row"] < len(known):
                known.recaption(entry["row"], digest)
            elif entry["row"] == len(known):
                known.add(bytes.fromhex(entry["key"]), digest, met=False)
            else:
                raise DataError(f"{dataset.root / LISTING} has gaps: a part was removed; restore it from a backup")
    return known


def _digest(
    captions: Sequence[str], fault: str | None, meta: str | None, kinds: Sequence[str], labels: str | None, uri: str
) -> int:
    """Kinds and labels count where there are any, so that rows listed before there were such stay as they are. Of the
    uri counts what is not in the row's key: where in its tar the picture lies."""
    place = tars.byte_range(uri)
    text = "\0".join(
        (
            fault or "",
            *captions,
            *(() if meta is None else ("", meta)),
            *(("", "", *kinds) if kinds else ()),
            *(("", "", "", labels) if labels is not None else ()),
            *(("", "", "", "", place) if place else ()),
        )
    )
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
