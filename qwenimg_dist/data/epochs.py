"""Where each epoch of a stream ends, in batches, when epochs differ in length (weights, several data sets).

Place in the flow: `order.py` finds a step's epoch here. No earlier epoch is made for it: per epoch that is passed, a
few numbers per bucket and distinct weight are computed, for stretches of epochs at once, and one is kept; a million
epochs take well under a minute and 8 MB. No shorter way exists as long as the last batch of a bucket is filled in every
epoch, since how many batches an epoch has is then no linear function of its number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from qwenimg_dist.data.catalog import Ints
from qwenimg_dist.data.samples import Sampler
from qwenimg_dist.schema import Bucket

_FIRST_STRETCH: Final = 16
_LONGEST_STRETCH: Final = 8192


class EpochEnds:
    """`find(position)` for any position; grows as far as it is asked."""

    def __init__(self, giving: Sequence[tuple[Sampler, int]], global_batch: int) -> None:
        """Samplers and their catalogs, of which at least one has a row that comes at some time."""
        self._giving = giving
        self._size = global_batch
        self._ends: Ints = np.zeros(0, dtype=np.int64)

    def find(self, position: int) -> tuple[int, int]:
        """(epoch, batches before it) of the `position`-th batch."""
        stretches, last = [self._ends], int(self._ends[-1]) if len(self._ends) else 0
        num = len(self._ends)
        while last <= position:
            stretch = last + np.cumsum(self._batches(num, min(_LONGEST_STRETCH, max(_FIRST_STRETCH, num))))
            stretches.append(stretch)
            num, last = num + len(stretch), int(stretch[-1])
        if len(stretches) > 1:
            self._ends = np.concatenate(stretches)
        epoch = int(np.searchsorted(self._ends, position, side="right"))
        return epoch, int(self._ends[epoch - 1]) if epoch else 0

    def _batches(self, first: int, num: int) -> Ints:
        """(num,) batches of each of some epochs."""
        counts: dict[Bucket, Ints] = {}
        for sampler, catalog in self._giving:
            for bucket, of_epochs in sampler.counts_of_epochs(catalog, first, num).items():
                counts[bucket] = counts[bucket] + of_epochs if bucket in counts else of_epochs
        batches: Ints = np.sum([-(-of_epochs // self._size) for of_epochs in counts.values()], axis=0, dtype=np.int64)
        return batches
