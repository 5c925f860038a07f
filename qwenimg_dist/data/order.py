"""The order of one stream: all batches of one resolution in one phase, epoch after epoch.

Place in the flow: the ledger (see there for the rules) keeps one `Stream` per phase and resolution. Everything is
computed for a whole segment at once with numpy and the newest orders are kept, so a step costs a look-up and a resume
costs one epoch's shuffle.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from qwenimg_dist.data.catalog import Catalog, Catalogs, Ints
from qwenimg_dist.data.draws import draw_key, hashes, uniform
from qwenimg_dist.data.phases import PlannedPhase
from qwenimg_dist.data.weights import (
    COPY_BITS,
    EpochCounts,
    choose_captions,
    offsets,
    repeat,
    row_weights,
    times_in_epoch,
)
from qwenimg_dist.data.where import Where, compile_where
from qwenimg_dist.schema import Bucket

WINDOW: Final = 65536
"""Samples of one bucket that are sorted by text length together."""
BLOCK_UNITS: Final = 128
"""Units whose rows are shuffled together."""
_CACHED_ORDERS: Final = 3


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Rows that join the streams together; one generation of the run."""

    catalog: int | None
    """Index in `Catalogs`; None brings no rows (it only closes an epoch)."""
    phase: int | None
    """The phase it belongs to; None serves every phase, epoch after epoch."""
    epoch: int
    last: bool
    """Closes its epoch: what does not fill a batch is filled, not carried."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a run may train on at all."""

    where: Where | None
    held_out_below: int
    """Rows whose key hash is smaller are never trained on."""
    weights: tuple[tuple[Where, float], ...] = ()
    """How often rows come per epoch, see `weights.py`; none: every row once."""
    caption_weights: Mapping[str, float] | None = None
    """Weight of each kind of caption; None: every caption of a row alike."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Parallel arrays: row position, text position, text tokens, number that draws are keyed by."""

    rows: Ints
    texts: Ints
    tokens: Ints
    numbers: Ints

    def take(self, index: npt.NDArray[np.intp] | slice) -> Samples:
        return Samples(
            rows=self.rows[index], texts=self.texts[index], tokens=self.tokens[index], numbers=self.numbers[index]
        )

    def then(self, other: Samples) -> Samples:
        return Samples(
            rows=np.concatenate([self.rows, other.rows]),
            texts=np.concatenate([self.texts, other.texts]),
            tokens=np.concatenate([self.tokens, other.tokens]),
            numbers=np.concatenate([self.numbers, other.numbers]),
        )

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, kw_only=True)
class Order:
    """All batches of one stream in one segment and epoch."""

    rows: Ints  # (batches, B)
    texts: Ints  # (batches, B)
    num_fill: Ints  # (batches,) fill slots, at the front of the batch
    buckets: list[Bucket]
    bucket: Ints  # (batches,) index into `buckets`


@dataclass(frozen=True, kw_only=True)
class At:
    """Where in a stream a position lies."""

    segment: int
    epoch: int
    index: int


class Stream:
    """Batches of one resolution in one phase. Not thread-safe: the ledger locks."""

    def __init__(
        self,
        *,
        phase: PlannedPhase,
        resolution: int,
        seed: int,
        caption_dropout: float,
        catalogs: Catalogs,
        selection: Selection,
        window: int,
        block_units: int,
    ) -> None:
        self.phase = phase
        self.resolution = resolution
        self._seed = seed
        self._dropout = caption_dropout
        self._catalogs = catalogs
        self._selection = selection
        self._window = max(1, window // phase.global_batch) * phase.global_batch
        self._block_units = block_units
        self._wheres = [w for w in (selection.where, compile_where(phase.where) if phase.where else None) if w]
        self._segments: list[Segment] = []
        self._ends: list[int] = []  # batches up to the end of each segment
        self._left: list[dict[Bucket, int]] = []  # samples carried out of each segment
        self._orders: OrderedDict[tuple[int, int], Order] = OrderedDict()
        self._carried: dict[int, dict[Bucket, Samples]] = {}
        self._epoch_counts: dict[int, EpochCounts] = {}
        self._epoch_ends: list[int] = []  # of one repeating segment with weights: batches up to the end of each epoch

    def append(self, segment: Segment) -> None:
        """Further rows join; only counts are computed here."""
        counts = dict(self._carry_counts(len(self._segments), segment.epoch))
        if segment.catalog is not None:
            for bucket, num in self._counts(segment.catalog, segment.epoch).items():
                counts[bucket] = counts.get(bucket, 0) + num
        size = self.phase.global_batch
        batches = sum(-(-num // size) if segment.last else num // size for num in counts.values())
        self._segments.append(segment)
        self._ends.append((self._ends[-1] if self._ends else 0) + batches)
        self._left.append({} if segment.last else {bucket: num % size for bucket, num in counts.items() if num % size})

    def locate(self, position: int) -> At | None:
        """Segment, epoch and index of the `position`-th batch; None where the stream does not reach it yet."""
        if self._segments and self._segments[0].phase is None:
            if self._selection.weights:
                return self._locate_in_epochs(position)
            # One segment that repeats: every epoch has the same number of batches.
            per_epoch = self._ends[0]
            if per_epoch == 0:
                return None
            return At(segment=0, epoch=position // per_epoch, index=position % per_epoch)
        segment = bisect_right(self._ends, position)
        if segment == len(self._ends):
            return None
        start = self._ends[segment - 1] if segment else 0
        return At(segment=segment, epoch=self._segments[segment].epoch, index=position - start)

    def _locate_in_epochs(self, position: int) -> At | None:
        """With weights, epochs differ in length."""
        catalog = self._segments[0].catalog
        if catalog is None or not self._counter(catalog):
            return None
        size = self.phase.global_batch
        while not self._epoch_ends or self._epoch_ends[-1] <= position:
            counts = self._counts(catalog, len(self._epoch_ends))
            batches = sum(-(-num // size) for num in counts.values())
            self._epoch_ends.append((self._epoch_ends[-1] if self._epoch_ends else 0) + batches)
        epoch = bisect_right(self._epoch_ends, position)
        start = self._epoch_ends[epoch - 1] if epoch else 0
        return At(segment=0, epoch=epoch, index=position - start)

    def order(self, segment: int, epoch: int) -> Order:
        """All batches of a segment in an epoch; the newest few are kept."""
        found = self._orders.get((segment, epoch))
        if found is None:
            found = self._make_order(segment, epoch)
            while len(self._orders) >= _CACHED_ORDERS:
                self._orders.popitem(last=False)
            self._orders[segment, epoch] = found
        self._orders.move_to_end((segment, epoch))
        return found

    @property
    def num_batches(self) -> int:
        """Batches of all segments; of one that repeats, its first epoch's."""
        return self._ends[-1] if self._ends else 0

    def why_exhausted(self) -> str:
        """What to tell the user when a batch is asked for that there is none of."""
        name = f"phase {self.phase.index} at {self.resolution} px"
        kept, encoded, selected = self._totals()
        if self._ends and self._ends[-1]:
            return f"{name}: the {self._ends[-1]} batches that are ready are used up"
        return (
            f"{name} has nothing to train on: {kept} rows were kept, {encoded} of them have latents at "
            f"{self.resolution} px, {selected} of these pass "
            f"where={' and '.join(w.expression for w in self._wheres) or 'none'!r} and are not held out"
            f"{', and have a weight above 0' if self._selection.weights else ''}; "
            "produce more, or change the curriculum's resolutions, `where`, data.weights or data.held_out"
        )

    def _totals(self) -> tuple[int, int, int]:
        kept = encoded = selected = 0
        for index in {segment.catalog for segment in self._segments} - {None}:
            assert index is not None
            catalog = self._catalogs[index]
            kept += catalog.num_rows
            encoded += int(np.count_nonzero(catalog.latents[self.resolution].bucket >= 0))
            local = self._selected(catalog)
            if self._selection.weights:
                local = local[row_weights(catalog, local, self._selection.weights) > 0]
            selected += len(local)
        return kept, encoded, selected

    def _selected(self, catalog: Catalog) -> Ints:
        """Local positions of the rows this stream trains on, ascending."""
        mask = catalog.latents[self.resolution].bucket >= 0
        mask = mask & (catalog.key_hash >= np.uint64(self._selection.held_out_below))
        for where in self._wheres:
            mask = mask & where.mask(catalog.columns, catalog.num_rows)
        return np.flatnonzero(mask)

    def _counts(self, catalog_index: int, epoch: int) -> dict[Bucket, int]:
        """Samples per bucket."""
        catalog = self._catalogs[catalog_index]
        latents = catalog.latents[self.resolution]
        if self._selection.weights:
            return {latents.buckets[bucket]: num for bucket, num in self._counter(catalog_index).at(epoch).items()}
        counts = np.bincount(latents.bucket[self._selected(catalog)], minlength=len(latents.buckets))
        return {bucket: int(num) for bucket, num in zip(latents.buckets, counts, strict=True) if num}

    def _counter(self, catalog_index: int) -> EpochCounts:
        if catalog_index not in self._epoch_counts:
            catalog = self._catalogs[catalog_index]
            local = self._selected(catalog)
            self._epoch_counts[catalog_index] = EpochCounts(
                catalog.latents[self.resolution].bucket[local], *self._weighed(catalog, local)
            )
        return self._epoch_counts[catalog_index]

    def _weighed(self, catalog: Catalog, local: Ints) -> tuple[Ints, Ints]:
        """Weights and offsets of rows."""
        key = draw_key(self._seed, "weights", self.phase.index, self.resolution)
        return row_weights(catalog, local, self._selection.weights), offsets(key, catalog.rows[local])

    def _carry_counts(self, segment: int, epoch: int) -> dict[Bucket, int]:
        """Samples per bucket that the segment before leaves to this one."""
        if segment == 0 or self._segments[segment - 1].epoch != epoch:
            return {}
        return self._left[segment - 1]

    def _carry(self, segment: int, epoch: int) -> dict[Bucket, Samples]:
        """The samples themselves. Follows the epoch's segments from its first, each once."""
        if not self._carry_counts(segment, epoch):
            return {}
        if segment - 1 not in self._carried:
            first = segment - 1
            while first > 0 and first - 1 not in self._carried and self._carry_counts(first, epoch):
                first -= 1
            for earlier in range(first, segment):
                self._sequences(earlier, epoch)
        return self._carried[segment - 1]

    def _sequences(self, segment: int, epoch: int) -> dict[Bucket, Samples]:
        """Per bucket, the shuffled samples to be cut into batches; remembers what is carried on."""
        sequences = dict(self._carry(segment, epoch))
        catalog = self._segments[segment].catalog
        if catalog is not None:
            for bucket, samples in self._shuffled(catalog, epoch).items():
                sequences[bucket] = sequences[bucket].then(samples) if bucket in sequences else samples
        if self._segments[segment].last:
            return sequences
        size = self.phase.global_batch
        carried = {}
        for bucket, samples in sequences.items():
            full = len(samples) // size * size
            carried[bucket] = samples.take(slice(full, None))
            sequences[bucket] = samples.take(slice(full))
        self._carried[segment] = {bucket: samples for bucket, samples in carried.items() if len(samples)}
        return sequences

    def _key(self, purpose: str, epoch: int) -> int:
        return draw_key(self._seed, purpose, self.phase.index, self.resolution, epoch)

    def _shuffled(self, catalog_index: int, epoch: int) -> dict[Bucket, Samples]:
        """Rows of a catalog per bucket, blocks of units in random order and rows shuffled within a block."""
        catalog = self._catalogs[catalog_index]
        latents = catalog.latents[self.resolution]
        local = self._selected(catalog)
        numbers = catalog.rows[local].astype(np.int64)
        if self._selection.weights:
            local, copy = repeat(local, times_in_epoch(*self._weighed(catalog, local), epoch))
            numbers = catalog.rows[local] + (copy << COPY_BITS)
        units, unit_of_row = np.unique(catalog.units[local], return_inverse=True)
        rank = np.empty(len(units), dtype=np.int64)
        rank[np.argsort(hashes(self._key("units", epoch), units), kind="stable")] = np.arange(len(units))
        block = rank[unit_of_row] // self._block_units
        shuffle = hashes(self._key("rows", epoch), numbers)
        bucket = latents.bucket[local]
        order = np.lexsort((shuffle, block, bucket))
        samples = self._draw_texts(catalog, catalog_index, local[order], numbers[order], epoch)
        ends = np.cumsum(np.bincount(bucket, minlength=len(latents.buckets)))
        starts = ends - np.diff(ends, prepend=0)
        return {
            name: samples.take(slice(int(start), int(end)))
            for name, start, end in zip(latents.buckets, starts, ends, strict=True)
            if end > start
        }

    def _draw_texts(self, catalog: Catalog, catalog_index: int, local: Ints, numbers: Ints, epoch: int) -> Samples:
        """One caption of each row, or the empty prompt. Drawn per listing number, so that nothing else matters."""
        start = catalog.caption_start[local]
        draws = uniform(self._key("caption", epoch), numbers)
        if self._selection.caption_weights is None:
            choice = (draws * (catalog.caption_start[local + 1] - start)).astype(np.int64)
        else:
            choice = choose_captions(catalog, local, draws, self._selection.caption_weights)
        texts = catalog.caption_text[start + choice].astype(np.int64)
        dropped = uniform(self._key("dropout", epoch), numbers) < self._dropout
        texts = np.where(dropped, catalog.empty_text, texts)
        return Samples(
            rows=local + self._catalogs.row_base(catalog_index),
            texts=texts + self._catalogs.text_base(catalog_index),
            tokens=catalog.text_tokens[texts].astype(np.int64),
            numbers=numbers,
        )

    def _make_order(self, segment: int, epoch: int) -> Order:
        size = self.phase.global_batch
        sequences = {bucket: samples for bucket, samples in self._sequences(segment, epoch).items() if len(samples)}
        buckets = sorted(sequences)
        cut = [self._cut(sequences[bucket], epoch) for bucket in buckets]
        num = np.array([len(fill) for _, _, fill in cut], dtype=np.int64)
        bucket = np.repeat(np.arange(len(buckets)), num)
        if not buckets:
            empty = np.zeros((0, size), dtype=np.int64)
            return Order(rows=empty, texts=empty, num_fill=empty[:, 0], buckets=[], bucket=empty[:, 0])
        # Each batch gets a time in [0, 1): its window's stretch of the bucket, and a draw within it.
        ids = np.arange(len(bucket)) + (segment << 32)
        draw = uniform(self._key("batches", epoch), ids)
        index_in_bucket = np.concatenate([np.arange(n) for n in num])
        per_window = self._window // size
        begin = index_in_bucket // per_window * per_window
        length = np.minimum(begin + per_window, num[bucket]) - begin
        times = (begin + draw * length) / num[bucket]
        order = np.lexsort((ids, times))
        return Order(
            rows=np.concatenate([rows for rows, _, _ in cut])[order],
            texts=np.concatenate([texts for _, texts, _ in cut])[order],
            num_fill=np.concatenate([fill for _, _, fill in cut])[order],
            buckets=buckets,
            bucket=bucket[order],
        )

    def _cut(self, samples: Samples, epoch: int) -> tuple[Ints, Ints, Ints]:
        """Sort windows by text length and cut batches: rows and texts (batches, B), fill slots (batches,)."""
        size = self.phase.global_batch
        tie = hashes(self._key("ties", epoch), samples.numbers)
        window = np.arange(len(samples)) // self._window
        by_length = samples.take(np.lexsort((tie, samples.tokens, window)))
        fill = np.zeros(-(-len(samples) // size), dtype=np.int64)
        short = -len(samples) % size
        if short:
            # Fill slots repeat the last window's shortest sample: they cost the least, and the order stays sorted.
            first = int(window[-1]) * self._window
            fill[first // size] = short
            repeat = np.full(short, first)
            index = np.concatenate([np.arange(first), repeat, np.arange(first, len(samples))])
            by_length = by_length.take(index)
        return by_length.rows.reshape(-1, size), by_length.texts.reshape(-1, size), fill
