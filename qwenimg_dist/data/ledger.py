"""The ledger: which samples, with which captions, make up the global batch of every step. A pure function.

Place in the flow: the curriculum gives phases, generations give segments (catalogs that join the run), `Ledger.batch`
gives the global batch, `consumers/stream.py` reads a rank's cut of it. It knows no ranks, so the batches are the same
on any number of them, and any step can be asked for first, which is all that a resume needs.

1. A step belongs to a phase; its resolution follows from the phase's weights by quota, exact in proportion.
2. Each (phase, resolution) is a stream with its own position, made of epochs. **A phase change starts new epochs**: a
   stream begins at its first sample when its phase begins, whatever earlier phases have seen.
3. Per epoch and row, the caption and whether it is dropped are drawn before anything is grouped, so that dropped
   captions form batches of their own and cost no padding.
4. Units are shuffled and taken in blocks; rows of a bucket are shuffled within a block, which keeps reads local.
5. Windows of 64k samples of one bucket are sorted by text length and cut into global batches. What does not fill the
   last batch of an epoch is filled with slots of weight zero: an epoch is every sample exactly once, or as often as
   `data.weights` say (`weights.py`), each time with draws of its own.
6. The batches of all buckets are shuffled into one order: within windows, so that windows are still read in turn.
7. Prompts have no shape: where the run draws the pictures, a stream's batches have the phase's shapes in turn.

Several data sets (`mix.py`) become one stream: how often rows of each come per epoch follows from their shares, and in
step 4 each is spread evenly over the other ones of its bucket, so that all share buckets, windows and batches.

While producers run (`follow`), an epoch grows by segments: what does not fill a batch is carried into the next
segment of the epoch and filled only when the epoch closes.

Refused: a stream without a single row (`DataError`), because a phase that trains on nothing is a mistake.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qwenimg_dist.data.catalogs import Catalogs
from qwenimg_dist.data.facets import DataError
from qwenimg_dist.data.mix import Mix
from qwenimg_dist.data.order import BLOCK_UNITS, WINDOW, Segment, Stream
from qwenimg_dist.data.phases import PlannedPhase, phase_at, quota, steps_by_resolution
from qwenimg_dist.data.samples import Selection
from qwenimg_dist.data.tally import Tally, tally
from qwenimg_dist.schema import Bucket


@dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """The samples of one optimiser step, over all ranks."""

    step: int
    phase: int
    resolution: int
    bucket: Bucket
    epoch: int
    rows: npt.NDArray[np.int64]
    """(B,) row positions in `Catalogs`, ordered by text length."""
    texts: npt.NDArray[np.int64]
    """(B,) text positions in `Catalogs`; the empty prompt's where the caption was dropped."""
    weights: npt.NDArray[np.float32]
    """(B,) 1 = real, 0 = fill."""
    num_by_dataset: Mapping[str, int] = field(default_factory=dict)
    """Real samples of each of several data sets; empty with one."""
    epochs_by_dataset: Mapping[str, float] = field(default_factory=dict)
    """How many epochs of its own each of several data sets has given to this phase and resolution by the end of this
    batch; empty with one."""

    @property
    def num_real(self) -> int:
        """Real samples."""
        return int(np.count_nonzero(self.weights))


class Ledger:
    """`batch(step)` for any step. Segments may be appended while it is in use; earlier batches never change."""

    def __init__(
        self,
        *,
        phases: Sequence[PlannedPhase],
        seed: int,
        caption_dropout: float,
        catalogs: Catalogs,
        selection: Selection | Mapping[str, Selection],
        mix: Mix | None = None,
        window: int = WINDOW,
        block_units: int = BLOCK_UNITS,
    ) -> None:
        """`selection` is one per data set, by name, where there are several, which then need a `mix`."""
        self.phases = tuple(phases)
        self.catalogs = catalogs
        selections = selection if isinstance(selection, Mapping) else {"": selection}
        self._streams = {
            (phase.index, resolution): Stream(
                phase=phase,
                resolution=resolution,
                seed=seed,
                caption_dropout=caption_dropout,
                catalogs=catalogs,
                selections=selections,
                mix=mix,
                window=window,
                block_units=block_units,
            )
            for phase in self.phases
            for resolution in phase.weights
        }
        # The prefetching thread asks for batches while the training thread appends segments.
        self._lock = threading.RLock()

    def append(self, segment: Segment) -> None:
        """A further generation joins."""
        with self._lock:
            for (phase, _), stream in self._streams.items():
                if segment.phase is None or segment.phase == phase:
                    stream.append(segment)

    def phase_at(self, step: int) -> PlannedPhase:
        """The phase of a step. Raises ValueError outside the plan."""
        return phase_at(self.phases, step)

    def resolution_at(self, step: int) -> int:
        """Resolution class of a step."""
        phase = self.phase_at(step)
        return quota(phase.weights, step - phase.first_step)[0]

    def available(self, step: int) -> bool:
        """Whether `batch(step)` can be given from the segments there are."""
        with self._lock:
            stream, position = self._find(step)
            return stream.locate(position) is not None

    def batch(self, step: int) -> GlobalBatch:
        """The global batch of a step. Raises `DataError` if its stream is empty or not yet that long."""
        with self._lock:
            stream, position = self._find(step)
            at = stream.locate(position)
            if at is None:
                raise DataError(stream.why_exhausted())
            order, index = stream.order(at.segment, at.epoch), at.index
            fill = int(order.num_fill[index])
            weights = np.ones(order.rows.shape[1], dtype=np.float32)
            weights[:fill] = 0.0
            epochs = stream.epochs_by_dataset(at)
            return GlobalBatch(
                step=step,
                phase=stream.phase.index,
                resolution=stream.resolution,
                bucket=stream.drawn[position % len(stream.drawn)]
                if stream.drawn
                else order.buckets[order.bucket[index]],
                epoch=at.epoch,
                rows=order.rows[index],
                texts=order.texts[index],
                weights=weights,
                num_by_dataset=self._num_by_dataset(order.rows[index][fill:]) if epochs else {},
                epochs_by_dataset=epochs,
            )

    def _num_by_dataset(self, rows: npt.NDArray[np.int64]) -> dict[str, int]:
        return dict(sorted(self.catalogs.count_by_dataset(rows).items()))

    def check(self) -> None:
        """Raise `DataError` for the first stream that has steps but no rows."""
        with self._lock:
            for stream in self._streams.values():
                if stream.locate(0) is None and stream.phase.last_step > stream.phase.first_step:
                    raise DataError(stream.why_exhausted())

    def batches_so_far(self, phase: int, resolution: int) -> int:
        """Batches of all segments that a stream has (one epoch where its segment repeats)."""
        with self._lock:
            return self._streams[phase, resolution].num_batches

    def used(self, phase: int, step: int) -> list[float]:
        """Of each segment of a phase, in order, the share of its batches that the steps before `step` have taken."""
        planned = self.phases[phase]
        taken = steps_by_resolution(planned.weights, min(max(0, step - planned.first_step), planned.num_steps))
        with self._lock:
            batches = [self._streams[phase, resolution].batches_of_segments for resolution in sorted(taken)]
            shares = []
            for segment, ends in enumerate(zip(*batches, strict=True)):
                of_all = sum(end - start for start, end in ends)
                used = sum(
                    min(max(0, taken[resolution] - start), end - start)
                    for resolution, (start, end) in zip(sorted(taken), ends, strict=True)
                )
                # What fills no batch is carried into the segment after it.
                shares.append(used / of_all if of_all else float(segment + 1 < len(batches[0])))
        return shares

    def tally(self, phase: int, resolution: int) -> Tally:
        """What all steps that a phase has at a resolution hold, counted without making the batches."""
        with self._lock:
            return tally(self._streams[phase, resolution], self.phases[phase].steps_by_resolution[resolution])

    def _find(self, step: int) -> tuple[Stream, int]:
        phase = self.phase_at(step)
        resolution, position = quota(phase.weights, step - phase.first_step)
        return self._streams[phase.index, resolution], position
