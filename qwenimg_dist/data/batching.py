"""Shuffled samples of a bucket -> batches of like text length, and the order in which the batches of all buckets come.

Place in the flow: `order.py` asks here for each segment and epoch; pure functions of what they are given. Samples are
sorted by text length within windows, so that batches need little padding, and what does not fill a window's last batch
is filled with slots of weight zero. Whole windows keep their place in the epoch, batches within one are shuffled.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qwenimg_dist.data.catalog import Ints
from qwenimg_dist.data.draws import uniform
from qwenimg_dist.data.samples import Samples


def shuffled_batches(num: Ints, key: int, segment: int, per_window: int) -> npt.NDArray[np.intp]:
    """The order in which batches come, given how many each bucket has; they are numbered through by bucket."""
    bucket = np.repeat(np.arange(len(num)), num)
    # Each batch gets a time in [0, 1): its window's stretch of the bucket, and a draw within it.
    ids = np.arange(len(bucket)) + (segment << 32)
    draw = uniform(key, ids)
    index_in_bucket = np.concatenate([np.zeros(0, dtype=np.int64), *(np.arange(n) for n in num)])
    begin = index_in_bucket // per_window * per_window
    length = np.minimum(begin + per_window, num[bucket]) - begin
    times = (begin + draw * length) / num[bucket]
    return np.lexsort((ids, times))


def fill_slots(num_samples: int, size: int, window: int) -> Ints:
    """(batches,) fill slots of a bucket's batches, before they are shuffled: in the first of the last window."""
    fill = np.zeros(-(-num_samples // size), dtype=np.int64)
    if short := -num_samples % size:
        fill[(num_samples - 1) // window * window // size] = short
    return fill


def cut_batches(samples: Samples, size: int, window: int) -> tuple[Ints, Ints, Ints]:
    """Sort windows by text length and cut batches: rows and texts (batches, size), fill slots (batches,)."""
    window_of = np.arange(len(samples)) // window
    by_length = samples.take(np.lexsort((samples.ties, samples.tokens, window_of)))
    fill = fill_slots(len(samples), size, window)
    if short := int(fill.sum()):
        # Fill slots repeat the last window's shortest sample: they cost the least, and the order stays sorted.
        first = int(window_of[-1]) * window
        repeat = np.full(short, first)
        index = np.concatenate([np.arange(first), repeat, np.arange(first, len(samples))])
        by_length = by_length.take(index)
    return by_length.rows.reshape(-1, size), by_length.texts.reshape(-1, size), fill
