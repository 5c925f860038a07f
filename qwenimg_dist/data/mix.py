"""Several data sets in one run: how often the rows of each come per epoch, and how they lie between each other. Pure.

Place in the flow: `data.mix` names the data sets; `order.py` asks here how many times per epoch a row of each comes,
and treats that like any other sampling weight (`weights.py`), so that shuffling, windows, buckets and resumes are those
of one data set.

**Weights are shares of samples**, whatever the sizes: with 3 and 1, three of four samples are of the first. An epoch of
the mix has as many samples as all its data sets together have; rows of a small data set with a large share come several
times in it, those of a large one with a small share come every n-th epoch, each to within one time over any number of
epochs. **Repeats** say instead how often every row comes per epoch; with 1 for all, an epoch is every sample of every
data set once. The share holds over an epoch, and over each window of 64k samples of a bucket to within a sample; within
a window, batches are grouped by text length, so that a single batch has more of the data set whose captions are of its
length, and no padding is paid for the mixing.

Deliberately left out: a fixed number of samples of each data set in every batch (it would pad short captions to the
length of another data set's), and a mix that grows while producers run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Mix:
    """What `data.mix` says of how the data sets mix."""

    unit: Literal["weight", "repeats"]
    amounts: Mapping[str, float]
    """Data set -> its weight or repeats; 0 leaves it out."""

    def with_changes(self, changes: Mapping[str, float] | None) -> Mix:
        """As a phase has it, which may give other amounts in the same unit."""
        return Mix(unit=self.unit, amounts={**self.amounts, **(changes or {})})

    def times_per_epoch(self, totals: Mapping[str, int]) -> dict[str, Fraction]:
        """Data set -> how often its rows come per epoch. `totals` are the samples that an epoch of each alone has.

        A data set without samples gets 0; `lacking` names those that should have had some.
        """
        amounts = {name: Fraction(str(self.amounts[name])) for name in totals}
        if self.unit == "repeats":
            return {name: amount if totals[name] else Fraction(0) for name, amount in amounts.items()}
        taking = [name for name in totals if totals[name] and amounts[name]]
        samples = sum(totals[name] for name in taking)
        weights = sum((amounts[name] for name in taking), Fraction(0))
        return {
            name: amounts[name] / weights * samples / totals[name] if name in taking else Fraction(0) for name in totals
        }

    def lacking(self, totals: Mapping[str, int]) -> list[str]:
        """Data sets that have a share of the samples, but no sample to give: a share cannot be kept without them."""
        if self.unit == "repeats":
            return []
        return [name for name in totals if self.amounts[name] and not totals[name]]


def even_offsets(order: Ints) -> Ints:
    """(n,) 24-bit offsets of rows, given the order they are counted through in; see `weights.py` for what they do.

    Multiples of the golden ratio: every run of neighbours in that order is spread evenly over [0, 1), so that buckets
    as well as the whole come as often as they should in every epoch, where drawn offsets would be off by the square
    root of the number of rows.
    """
    offsets = np.empty(len(order), dtype=np.int64)
    offsets[order] = (np.arange(len(order), dtype=np.int64) * _GOLDEN_24 + _HALF_24) & _MASK_24
    return offsets


_GOLDEN_24: Final = 0x9E3779  # 2^24 / golden ratio, odd
_HALF_24: Final = 1 << 23
_MASK_24: Final = (1 << 24) - 1


def interleave(lengths: Sequence[int]) -> npt.NDArray[np.intp]:
    """Positions in the concatenation of sequences, so that each is spread evenly over the whole and keeps its order."""
    times = np.concatenate([(np.arange(length) + 0.5) / max(1, length) for length in lengths])
    return np.argsort(times, kind="stable")
