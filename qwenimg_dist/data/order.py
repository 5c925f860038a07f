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

from qwenimg_dist.data.batching import cut_batches, fill_slots, shuffled_batches
from qwenimg_dist.data.catalog import Ints
from qwenimg_dist.data.catalogs import Catalogs
from qwenimg_dist.data.draws import draw_key
from qwenimg_dist.data.epochs import EpochEnds
from qwenimg_dist.data.mix import Mix, interleave
from qwenimg_dist.data.phases import PlannedPhase
from qwenimg_dist.data.samples import Sampler, Samples, Selection
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
    dataset: str = ""
    """Which of several data sets it is of; each of them joins once, and serves every phase and epoch."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """All batches of one stream in one segment and epoch."""

    rows: Ints  # (batches, B)
    texts: Ints  # (batches, B)
    num_fill: Ints  # (batches,) fill slots, at the front of the batch
    buckets: list[Bucket]
    bucket: Ints  # (batches,) index into `buckets`


@dataclass(frozen=True, kw_only=True)
class Batches:
    """The batches of a stream in one segment and epoch, without their samples."""

    samples: Mapping[Bucket, int]
    """Ascending; what fills no batch of an epoch that goes on is not among them."""
    bucket: Ints
    """(batches,) index into `samples`, in the order of the batches."""
    num_fill: Ints
    """(batches,)"""


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
        selections: Mapping[str, Selection],
        mix: Mix | None,
        window: int,
        block_units: int,
    ) -> None:
        """One selection per data set, by name; with `mix` there are several."""
        self.phase = phase
        self.resolution = resolution
        self._seed = seed
        self._window = max(1, window // phase.global_batch) * phase.global_batch
        self._samplers = {
            name: Sampler(
                name=name,
                phase=phase,
                resolution=resolution,
                seed=seed,
                caption_dropout=caption_dropout,
                catalogs=catalogs,
                selection=selection,
                block_units=block_units,
            )
            for name, selection in selections.items()
        }
        self._mix = mix.with_changes(phase.mix) if mix else None
        self._lacking: list[str] = []  # data sets with a share and no sample
        self._segments: list[Segment] = []
        self._ends: list[int] = []  # batches up to the end of each segment
        self._left: list[dict[Bucket, int]] = []  # samples carried out of each segment
        self._orders: OrderedDict[tuple[int, int], Order] = OrderedDict()
        self._carried: dict[int, dict[Bucket, Samples]] = {}
        self._epoch_ends: EpochEnds | None = None

    @property
    def drawn(self) -> tuple[Bucket, ...]:
        """Shapes that the batches have in turn, of pictures that the run draws; empty where latents have theirs."""
        return self.phase.drawn.get(self.resolution, ())

    def append(self, segment: Segment) -> None:
        """Further rows join; only counts are computed here."""
        if self._mix is not None:
            self._append_to_mix(segment, self._mix)
            return
        counts = dict(self._carry_counts(len(self._segments), segment.epoch))
        for bucket, num in self._counts(segment).items():
            counts[bucket] = counts.get(bucket, 0) + num
        size = self.phase.global_batch
        batches = sum(-(-num // size) if segment.last else num // size for num in counts.values())
        self._segments.append(segment)
        self._ends.append((self._ends[-1] if self._ends else 0) + batches)
        self._left.append({} if segment.last else {bucket: num % size for bucket, num in counts.items() if num % size})

    def _append_to_mix(self, segment: Segment, mix: Mix) -> None:
        """A data set joins. How often its rows come is known when all of them are there."""
        assert segment.phase is None
        assert segment.last
        self._segments.append(segment)
        if not self._complete:
            return
        totals = {name: sampler.total(catalog) for name, sampler, catalog in self._joined}
        self._lacking = mix.lacking(totals)
        for name, times in mix.times_per_epoch(totals).items():
            self._samplers[name].times = times
        if not self._lacking:
            self._ends.append(sum(-(-num // self.phase.global_batch) for num in self._mixed_counts(0).values()))

    @property
    def _complete(self) -> bool:
        """Every data set has joined."""
        return len(self._segments) >= len(self._samplers)

    @property
    def _joined(self) -> list[tuple[str, Sampler, int]]:
        """Data sets that have joined a mix, with their samplers and catalogs; by name."""
        return [
            (segment.dataset, self._samplers[segment.dataset], segment.catalog)
            for segment in sorted(self._segments, key=lambda segment: segment.dataset)
            if segment.catalog is not None
        ]

    def _mixed_counts(self, epoch: int) -> dict[Bucket, int]:
        counts: dict[Bucket, int] = {}
        for _, sampler, catalog in self._joined:
            for bucket, num in sampler.counts(catalog, epoch).items():
                counts[bucket] = counts.get(bucket, 0) + num
        return counts

    def _counts(self, segment: Segment) -> dict[Bucket, int]:
        """Samples per bucket that a segment brings to its epoch."""
        if segment.catalog is None:
            return {}
        return self._samplers[segment.dataset].counts(segment.catalog, segment.epoch)

    @property
    def repeats(self) -> bool:
        """What has joined serves all epochs (a run without `follow`)."""
        return bool(self._segments) and self._segments[0].phase is None

    @property
    def epochs_are_alike(self) -> bool:
        """Every epoch has as many samples of every bucket."""
        return self.repeats and not any(sampler.weighed for sampler in self._samplers.values())

    def locate(self, position: int) -> At | None:
        """Segment, epoch and index of the `position`-th batch; None where the stream does not reach it yet."""
        if self.epochs_are_alike and self._mix is None:
            per_epoch = self._ends[0]
            if per_epoch == 0:
                return None
            return At(segment=0, epoch=position // per_epoch, index=position % per_epoch)
        if self.repeats:
            return self._locate_in_epochs(position)
        segment = bisect_right(self._ends, position)
        if segment == len(self._ends):
            return None
        start = self._ends[segment - 1] if segment else 0
        return At(segment=segment, epoch=self._segments[segment].epoch, index=position - start)

    def _locate_in_epochs(self, position: int) -> At | None:
        """With weights or several data sets, epochs differ in length."""
        if not self._complete or self._lacking:
            return None
        if self._epoch_ends is None:
            giving = [(sampler, catalog) for _, sampler, catalog in self._joined if sampler.counter(catalog)]
            if not giving:
                return None
            self._epoch_ends = EpochEnds(giving, self.phase.global_batch)
        epoch, start = self._epoch_ends.find(position)
        return At(segment=0, epoch=epoch, index=position - start)

    def epochs_by_dataset(self, at: At) -> dict[str, float]:
        """Data set -> how many epochs of its own its samples amount to when a batch is done; empty without a mix."""
        if self._mix is None:
            return {}
        passed = at.epoch + (at.index + 1) / len(self.order(at.segment, at.epoch).num_fill)
        return {name: float(sampler.times or 0) * passed for name, sampler, _ in self._joined}

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

    @property
    def batches_of_segments(self) -> list[tuple[int, int]]:
        """(first batch, end) of each segment of a growing epoch."""
        return list(zip([0, *self._ends], self._ends, strict=False))

    def unmatched(self) -> set[str]:
        """Expressions of weights that hold for no row of any data set."""
        found = [set(sampler.unmatched(self._catalogs_of(name))) for name, sampler in self._samplers.items()]
        return set.intersection(*found) if found else set()

    def _catalogs_of(self, dataset: str) -> list[int]:
        return sorted({s.catalog for s in self._segments if s.dataset == dataset and s.catalog is not None})

    def why_exhausted(self) -> str:
        """What to tell the user when a batch is asked for that there is none of."""
        name = f"{self.phase} at {self.resolution} px"
        if self._ends and self._ends[-1]:
            return f"{name}: the {self._ends[-1]} batches that are ready are used up"
        if self._lacking:
            there = "; ".join(self._what_is_there(dataset) for dataset in self._lacking)
            changes = ", ".join(f"{dataset}: 0" for dataset in self._lacking)
            return (
                f"{name} has nothing to train on of data.mix.{', data.mix.'.join(self._lacking)}, so the shares cannot "
                f"be kept: {there}; produce more, leave it out of this phase (its `mix: {{{changes}}}`), or give all "
                "data sets `repeats` instead of `weight`"
            )
        there = "; ".join(map(self._what_is_there, self._samplers))
        return (
            f"{name} has nothing to train on: {there}; produce more, or change the curriculum's resolutions, `where`, "
            "`weights`, data.weights or data.held_out"
        )

    def _what_is_there(self, dataset: str) -> str:
        """How many rows of a data set are left after each condition."""
        sampler = self._samplers[dataset]
        kept, encoded, selected = sampler.totals(self._catalogs_of(dataset))
        where = " and ".join(w.expression for w in sampler.wheres)
        return (
            f"{f'{dataset}: ' if dataset else ''}{kept} rows were kept, {encoded} of them have latents at "
            f"{self.resolution} px, {selected} of these "
            f"{f'pass where={where!r} and ' if where else ''}are not held out"
            f"{', and have a weight above 0' if sampler.weighed else ''}"
            f"{f' by {sampler.rules}' if sampler.rules else ''}"
        )

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
        if self._mix is not None:
            return self._mixed_sequences(epoch)
        sequences = dict(self._carry(segment, epoch))
        at = self._segments[segment]
        if at.catalog is not None:
            for bucket, samples in self._samplers[at.dataset].shuffled(at.catalog, epoch).items():
                sequences[bucket] = Samples.joined([sequences[bucket], samples]) if bucket in sequences else samples
        if at.last:
            return sequences
        size = self.phase.global_batch
        carried = {}
        for bucket, samples in sequences.items():
            full = len(samples) // size * size
            carried[bucket] = samples.take(slice(full, None))
            sequences[bucket] = samples.take(slice(full))
        self._carried[segment] = {bucket: samples for bucket, samples in carried.items() if len(samples)}
        return sequences

    def _mixed_sequences(self, epoch: int) -> dict[Bucket, Samples]:
        """Those of all data sets, each spread evenly over the epoch."""
        parts: dict[Bucket, list[Samples]] = {}
        for _, sampler, catalog in self._joined:
            for bucket, samples in sampler.shuffled(catalog, epoch).items():
                parts.setdefault(bucket, []).append(samples)
        return {
            bucket: Samples.joined(of_bucket).take(interleave([len(samples) for samples in of_bucket]))
            for bucket, of_bucket in parts.items()
        }

    def _key(self, purpose: str, epoch: int) -> int:
        return draw_key(self._seed, purpose, self.phase.index, self.resolution, epoch)

    def _make_order(self, segment: int, epoch: int) -> Order:
        size = self.phase.global_batch
        sequences = {bucket: samples for bucket, samples in self._sequences(segment, epoch).items() if len(samples)}
        buckets = sorted(sequences)
        cut = [cut_batches(sequences[bucket], size, self._window) for bucket in buckets]
        num = np.array([len(fill) for _, _, fill in cut], dtype=np.int64)
        bucket = np.repeat(np.arange(len(buckets)), num)
        if not buckets:
            empty = np.zeros((0, size), dtype=np.int64)
            return Order(rows=empty, texts=empty, num_fill=empty[:, 0], buckets=[], bucket=empty[:, 0])
        order = shuffled_batches(num, self._key("batches", epoch), segment, self._window // size)
        return Order(
            rows=np.concatenate([rows for rows, _, _ in cut])[order],
            texts=np.concatenate([texts for _, texts, _ in cut])[order],
            num_fill=np.concatenate([fill for _, _, fill in cut])[order],
            buckets=buckets,
            bucket=bucket[order],
        )

    def batches(self, segment: int, epoch: int) -> Batches:
        """What `order` makes, without the samples: O(batches), once the rows were counted. For plans."""
        counts = self._mixed_counts(epoch) if self.repeats else self._segment_counts(segment)
        counts = {bucket: counts[bucket] for bucket in sorted(counts) if counts[bucket]}
        fills = [fill_slots(num, self.phase.global_batch, self._window) for num in counts.values()]
        num_batches = np.array([len(fill) for fill in fills], dtype=np.int64)
        per_window = self._window // self.phase.global_batch
        order = shuffled_batches(num_batches, self._key("batches", epoch), segment, per_window)
        return Batches(
            samples=counts,
            bucket=np.repeat(np.arange(len(fills)), num_batches)[order],
            num_fill=np.concatenate(fills or [np.zeros(0, dtype=np.int64)])[order],
        )

    def _segment_counts(self, segment: int) -> dict[Bucket, int]:
        """Samples per bucket that a segment of a growing epoch cuts into batches."""
        at, size = self._segments[segment], self.phase.global_batch
        counts = dict(self._carry_counts(segment, at.epoch))
        for bucket, num in self._counts(at).items():
            counts[bucket] = counts.get(bucket, 0) + num
        return counts if at.last else {bucket: num // size * size for bucket, num in counts.items()}

    def samples(self) -> dict[Bucket, int]:
        """Samples per bucket of the newest epoch as far as it is there; of what serves all epochs, of the first."""
        if self.repeats:
            return self._mixed_counts(0)
        counts: dict[Bucket, int] = {}
        for segment in self._segments:
            if segment.epoch == self._segments[-1].epoch:
                for bucket, num in self._counts(segment).items():
                    counts[bucket] = counts.get(bucket, 0) + num
        return counts

    @property
    def times_by_dataset(self) -> dict[str, float]:
        """How often an epoch of the mix has a row of each data set; empty without a mix."""
        return {name: float(sampler.times or 0) for name, sampler, _ in self._joined} if self._mix else {}
