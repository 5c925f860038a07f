"""The samples that one data set gives to one stream: which rows, how often, in which order, with which captions.

Place in the flow: `order.py` keeps one `Sampler` per data set and cuts what it gives into batches. All draws are keyed
by the row's number in the listing, and by the data set's name where there are several, so that neither other rows nor
other data sets change what is drawn for one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from qwenimg_dist.data.catalog import Catalog, Ints
from qwenimg_dist.data.catalogs import Catalogs
from qwenimg_dist.data.draws import draw_key, hashes, uniform
from qwenimg_dist.data.mix import even_offsets
from qwenimg_dist.data.phases import PlannedPhase
from qwenimg_dist.data.weights import (
    COPY_BITS,
    EpochCounts,
    choose_captions,
    joined,
    offsets,
    repeat,
    row_weights,
    scaled,
    times_in_epoch,
)
from qwenimg_dist.data.where import Where, compile_where
from qwenimg_dist.schema import Bucket


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a run may train on of one data set."""

    where: Where | None
    held_out_below: int
    """Rows whose key hash is smaller are never trained on."""
    weights: tuple[tuple[Where, float], ...] = ()
    """How often rows come per epoch, see `weights.py`; none: every row once."""
    caption_weights: Mapping[str, float] | None = None
    """Weight of each kind of caption; None: every caption of a row alike."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Parallel arrays: row position, text position, text tokens, and a draw that settles equal lengths."""

    rows: Ints
    texts: Ints
    tokens: Ints
    ties: npt.NDArray[np.uint64]

    def take(self, index: npt.NDArray[np.intp] | slice) -> Samples:
        return Samples(rows=self.rows[index], texts=self.texts[index], tokens=self.tokens[index], ties=self.ties[index])

    @staticmethod
    def joined(parts: Sequence[Samples]) -> Samples:
        """One after the other."""
        if len(parts) == 1:
            return parts[0]
        return Samples(
            rows=np.concatenate([part.rows for part in parts]),
            texts=np.concatenate([part.texts for part in parts]),
            tokens=np.concatenate([part.tokens for part in parts]),
            ties=np.concatenate([part.ties for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.rows)


class Sampler:
    """Samples of one data set at one resolution in one phase. Not thread-safe: the ledger locks."""

    def __init__(
        self,
        *,
        name: str,
        phase: PlannedPhase,
        resolution: int,
        seed: int,
        caption_dropout: float,
        catalogs: Catalogs,
        selection: Selection,
        block_units: int,
    ) -> None:
        self.name = name
        self.wheres = [w for w in (selection.where, compile_where(phase.where) if phase.where else None) if w]
        self.times: Fraction | None = None
        """How often a row of weight 1 comes per epoch; None where there is no mix, which counts as 1."""
        self._rules = joined(selection.weights, phase.row_weights)
        self._selection = selection
        self._resolution = resolution
        self._dropout = caption_dropout
        self._catalogs = catalogs
        self._block_units = block_units
        self._keyed = (seed, phase.index, resolution)
        self._counters: dict[int, EpochCounts] = {}

    @property
    def weighed(self) -> bool:
        """Whether rows come more or less often than once per epoch."""
        return bool(self._rules) or self.times is not None

    @property
    def rules(self) -> str:
        """The weights of rows, for messages."""
        return "; ".join(f"{weight:g} x {where.expression}" for where, weight in self._rules)

    def counts(self, catalog_index: int, epoch: int) -> dict[Bucket, int]:
        """Samples per bucket in an epoch."""
        catalog = self._catalogs[catalog_index]
        latents = catalog.latents[self._resolution]
        if self.weighed:
            return {latents.buckets[bucket]: num for bucket, num in self.counter(catalog_index).at(epoch).items()}
        counts = np.bincount(latents.bucket[self._selected(catalog)], minlength=len(latents.buckets))
        return {bucket: int(num) for bucket, num in zip(latents.buckets, counts, strict=True) if num}

    def counts_of_epochs(self, catalog_index: int, first: int, num: int) -> dict[Bucket, Ints]:
        """(num,) samples per bucket of each of some epochs, without looking at the rows again."""
        buckets = self._catalogs[catalog_index].latents[self._resolution].buckets
        return {buckets[bucket]: counts for bucket, counts in self.counter(catalog_index).of(first, num).items()}

    def counter(self, catalog_index: int) -> EpochCounts:
        """Counts of all epochs; false where no row ever comes."""
        if catalog_index not in self._counters:
            catalog = self._catalogs[catalog_index]
            local = self._selected(catalog)
            self._counters[catalog_index] = EpochCounts(
                catalog.latents[self._resolution].bucket[local], *self._weights(catalog, local)
            )
        return self._counters[catalog_index]

    def total(self, catalog_index: int) -> int:
        """Samples that an epoch of this data set alone has, in units of 2^-24."""
        catalog = self._catalogs[catalog_index]
        return int(row_weights(catalog, self._selected(catalog), self._rules).sum())

    def totals(self, catalog_indices: Iterable[int]) -> tuple[int, int, int]:
        """For messages: rows kept; of these with latents; of these selected, not held out and of a weight above 0."""
        kept = encoded = selected = 0
        for index in catalog_indices:
            catalog = self._catalogs[index]
            local = self._selected(catalog)
            if self._rules:
                local = local[row_weights(catalog, local, self._rules) > 0]
            kept += catalog.num_rows
            encoded += int(np.count_nonzero(catalog.latents[self._resolution].bucket >= 0))
            selected += len(local)
        return kept, encoded, selected

    def unmatched(self, catalog_indices: Iterable[int]) -> list[str]:
        """Expressions of weights that hold for none of the rows that are trained on."""
        left = {where.expression: where for where, _ in self._rules}
        for index in catalog_indices if left else ():
            catalog = self._catalogs[index]
            local = self._selected(catalog)
            for expression, where in list(left.items()):
                if where.mask(catalog.columns, catalog.num_rows)[local].any():
                    del left[expression]
        return list(left)

    def shuffled(self, catalog_index: int, epoch: int) -> dict[Bucket, Samples]:
        """Samples of a catalog per bucket, blocks of units in random order and rows shuffled within a block."""
        catalog = self._catalogs[catalog_index]
        latents = catalog.latents[self._resolution]
        local = self._selected(catalog)
        numbers = catalog.rows[local].astype(np.int64)
        if self.weighed:
            local, copy = repeat(local, times_in_epoch(*self._weights(catalog, local), epoch))
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

    def _selected(self, catalog: Catalog) -> Ints:
        """Local positions of the rows that are trained on, ascending."""
        mask = catalog.latents[self._resolution].bucket >= 0
        mask = mask & (catalog.key_hash >= np.uint64(self._selection.held_out_below))
        for where in self.wheres:
            mask = mask & where.mask(catalog.columns, catalog.num_rows)
        return np.flatnonzero(mask)

    def _weights(self, catalog: Catalog, local: Ints) -> tuple[Ints, Ints]:
        """Weights and offsets of rows."""
        key = self._key("weights")
        weights = row_weights(catalog, local, self._rules)
        if self.times is None:
            return weights, offsets(key, catalog.rows[local])
        weights = scaled(weights, self.times, self.name)
        bucket = catalog.latents[self._resolution].bucket[local]
        return weights, even_offsets(np.lexsort((hashes(key, catalog.rows[local]), weights, bucket)))

    def _key(self, purpose: str, *epoch: int) -> int:
        seed, phase, resolution = self._keyed
        return draw_key(seed, purpose, phase, resolution, *epoch, *([self.name] if self.name else []))

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
        texts = np.where(dropped, catalog.empty_texts(local), texts)
        return Samples(
            rows=local + self._catalogs.row_base(catalog_index),
            texts=texts + self._catalogs.text_base(catalog_index),
            tokens=catalog.text_tokens[texts].astype(np.int64),
            ties=hashes(self._key("ties", epoch), numbers),
        )
