"""What a stretch of a stream holds, counted without making its batches: images, epochs, fill slots, per bucket.

Place in the flow: the plan that is printed before a run asks the ledger, which asks here. Everything is taken from the
stream that trains (its counts, its mixing of batches, its fill slots), so the plan cannot drift from the run. Costs one
pass over the rows for a stream, and O(batches) for its last epoch; with weights, O(batches) for each epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qwenimg_dist.data.order import Stream
from qwenimg_dist.schema import Bucket


@dataclass(frozen=True, kw_only=True)
class BucketTally:
    """One bucket's part of a stretch."""

    samples: int
    """In one epoch (with weights: in the first)."""
    left_over: int
    """Of these, how many are in a batch that they do not fill."""
    batches: int = 0
    images: int = 0
    """Real samples that are drawn, repeats counted."""
    fill: int = 0
    """Slots of weight zero."""


@dataclass(frozen=True, kw_only=True)
class Tally:
    """The first batches of a stream, as far as it reaches."""

    asked: int
    """Batches that were asked for; more than `batches` where producers have not come that far."""
    epochs: float
    """How often what is there is drawn."""
    epochs_by_dataset: Mapping[str, float]
    """The same of each of several data sets; empty with one."""
    buckets: Mapping[Bucket, BucketTally]
    unmatched: frozenset[str] = frozenset()
    """Expressions of weights that hold for no row of the stream."""

    @property
    def batches(self) -> int:
        return sum(bucket.batches for bucket in self.buckets.values())

    @property
    def samples(self) -> int:
        """In one epoch."""
        return sum(bucket.samples for bucket in self.buckets.values())

    @property
    def left_over(self) -> int:
        """In one epoch."""
        return sum(bucket.left_over for bucket in self.buckets.values())

    @property
    def images(self) -> int:
        return sum(bucket.images for bucket in self.buckets.values())

    @property
    def fill(self) -> int:
        return sum(bucket.fill for bucket in self.buckets.values())


def tally(stream: Stream, num: int) -> Tally:
    """Count the first `num` batches of a stream."""
    size = stream.phase.global_batch
    drawn: dict[Bucket, list[int]] = {}
    position, epochs = 0, 0.0
    while position < num and (at := stream.locate(position)) is not None:
        batches = stream.batches(at.segment, at.epoch)
        per_pass = len(batches.bucket)
        passes = max(1, (num - position) // per_pass) if stream.epochs_are_alike and not stream.drawn else 1
        taken = min(num - position, per_pass)
        images = 0
        bucket_of, names = batches.bucket[:taken], tuple(batches.samples)
        if stream.drawn:
            bucket_of, names = np.arange(position, position + taken) % len(stream.drawn), stream.drawn
        for index, bucket in enumerate(names):
            mine = bucket_of == index
            num_batches, fill = int(np.count_nonzero(mine)), int(batches.num_fill[:taken][mine].sum())
            counted = drawn.setdefault(bucket, [0, 0])
            counted[0] += passes * num_batches
            counted[1] += passes * fill
            images += num_batches * size - fill
        epochs = at.epoch + passes - 1 + images / sum(batches.samples.values())
        position += passes * taken
    samples, left_over = _of_an_epoch(stream)
    buckets = {
        bucket: BucketTally(
            samples=samples.get(bucket, 0),
            left_over=left_over.get(bucket, 0),
            batches=batches_drawn,
            images=batches_drawn * size - fill,
            fill=fill,
        )
        for bucket in sorted({*samples, *drawn})
        for batches_drawn, fill in [drawn.get(bucket, [0, 0])]
    }
    total = sum(samples.values())
    if not stream.repeats:  # a segment of an epoch that still grows: by what is there
        epochs = sum(bucket.images for bucket in buckets.values()) / total if total else 0.0
    by_dataset = {name: times * epochs for name, times in stream.times_by_dataset.items()}
    unmatched = frozenset(stream.unmatched())
    return Tally(asked=num, epochs=epochs, epochs_by_dataset=by_dataset, buckets=buckets, unmatched=unmatched)


def _of_an_epoch(stream: Stream) -> tuple[dict[Bucket, int], dict[Bucket, int]]:
    """Samples per bucket, and how many of them are in a batch that they do not fill. Prompts, which come in all shapes,
    are counted as evenly many of each."""
    size, samples = stream.phase.global_batch, dict(stream.samples())
    left_over = {bucket: num % size for bucket, num in samples.items()}
    if not stream.drawn:
        return samples, left_over
    total, shapes = sum(samples.values()), stream.drawn
    evenly = {shape: (total + index) // len(shapes) for index, shape in enumerate(shapes)}
    return evenly, {shapes[-1]: sum(left_over.values())}
