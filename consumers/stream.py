"""A rank's cut of each global batch, read and assembled ahead of the trainer.

Place in the flow: ledger (which samples) -> here (whose, in which micro-batches) -> `assemble.py` (tensors) -> trainer.
Works ahead in one background thread, so the order is kept and a step's read hides behind the step before it.

1. The B slots of the global batch are split over W ranks in equal contiguous cuts; where B is no multiple of W, the
   last slots are filled with the last sample at weight zero.
2. A cut is split into micro-batches by the token budget, with the longest text of the *global* batch, so that every
   rank has as many micro-batches as every other.

Refuses to hide a fault: whatever the thread met is raised in `get`, in the step that it belongs to, or, with
`tolerant`, told in the batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from consumers.assemble import Assembler
from consumers.batch import BadSample, MicroBatch, RankBatch
from consumers.look_ahead import LookAhead
from consumers.reference_errors import REMOVING, ReferenceErrors
from qwenimg_dist.data.catalog import Ints
from qwenimg_dist.data.catalogs import Catalogs
from qwenimg_dist.data.facets import DataError
from qwenimg_dist.data.held_out import HeldOutBucket
from qwenimg_dist.data.ledger import GlobalBatch, Ledger

PREFETCH: Final = 2
"""Batches that are made ahead of the one in use."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A rank's slots: positions into the padded global batch, and what each repeats."""

    slots: Ints
    """(n,) 0 .. B - 1, or >= B where it only evens out the ranks."""
    source: Ints
    """(n,) position in the global batch of the sample that a slot holds."""
    sizes: list[int]
    """Micro-batches, in order; they sum to n."""


def cut_for(
    num_slots: int, image_tokens: int, max_text_tokens: int, budget: int, *, rank: int, world: int, pictures: int = 1
) -> Cut:
    """Rank's share of `num_slots`, and its micro-batches under a budget of tokens each (at least one sample).

    `image_tokens` are a sample's, conditions included (`Bucket.tokens`). `pictures` of a sample are computed at once,
    each with the text: 2 of a preference pair.
    """
    per_rank = -(-num_slots // world)
    slots = np.arange(rank * per_rank, (rank + 1) * per_rank, dtype=np.int64)
    sizes = micro_batch_sizes(per_rank, image_tokens, max_text_tokens, budget, pictures=pictures)
    return Cut(slots=slots, source=np.minimum(slots, num_slots - 1), sizes=sizes)


def micro_batch_sizes(
    per_rank: int, image_tokens: int, max_text_tokens: int, budget: int, *, pictures: int = 1
) -> list[int]:
    """How a rank's samples are split; as even as can be: the fewest micro-batches with the smallest peak memory."""
    largest = max(1, budget // (pictures * (image_tokens + max_text_tokens)))
    num = -(-per_rank // largest)
    return [per_rank // num + (index < per_rank % num) for index in range(num)]


def cut_batch(
    batch: GlobalBatch, tokens: Ints, budget: int, *, rank: int, world: int, pictures: int = 1
) -> tuple[Cut, npt.NDArray[np.float32]]:
    """A rank's share of a global batch with texts of `tokens`, and the weights of its slots."""
    longest = int(tokens.max())
    cut = cut_for(len(batch.rows), batch.bucket.tokens, longest, budget, rank=rank, world=world, pictures=pictures)
    return cut, np.where(cut.slots < len(batch.rows), batch.weights[cut.source], np.float32(0))


def pictures_of(further: Sequence[str], *, guided: bool = False) -> int:
    """Pictures that a forward computes per row, where these tensors are read besides its latents, or where the empty
    prompt's row goes beside it."""
    return 1 + ("rejected" in further or guided)


def repeated(batch: GlobalBatch, times: int) -> GlobalBatch:
    """Every sample so many times in a row."""
    if times == 1:
        return batch
    return replace(
        batch,
        rows=np.repeat(batch.rows, times),
        texts=np.repeat(batch.texts, times),
        weights=np.repeat(batch.weights, times),
        num_by_dataset={name: num * times for name, num in batch.num_by_dataset.items()},
    )


class Stream:
    """`get(step)` gives this rank's batch. One per rank and run; close it at the end."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        rank: int,
        world: int,
        compute_dtype: torch.dtype,
        pin_memory: bool = False,
        prefetch: int = PREFETCH,
        further: Sequence[str] = (),
        tolerant: bool = False,
        repeat: int = 1,
        guided: bool = False,
    ) -> None:
        """`further` tensors of a sample are read besides its latents: `logvar`, `rejected`. Each sample of the ledger
        fills `repeat` slots in a row. `guided` micro-batches have the empty prompt's features with them.

        With `tolerant`, what cannot be read of a training batch is told in `RankBatch.bad` instead of raised.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
        self._ledger = ledger
        self._rank = rank
        self._world = world
        self._prefetch = prefetch
        self._further = tuple(further)
        self._tolerant = tolerant
        self._repeat = repeat
        self._guided = guided
        self._negative: torch.Tensor | None = None
        self._assembler = Assembler(ledger.catalogs, compute_dtype=compute_dtype, pin_memory=pin_memory)
        self.reference: ReferenceErrors | None = None
        """Handed out with pairs, once it is here: set before the first `get`."""
        self._ahead = LookAhead(ledger, self._positions)
        self._pending: dict[int, Future[RankBatch | None]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stream")

    def get(self, step: int) -> RankBatch:
        """This rank's batch of a step. Raises what reading it met, or `DataError` if the ledger has no such batch.

        The following steps are begun in the background as far as the ledger reaches; any step may come first.
        """
        begin = time.perf_counter()
        last = min(step + self._prefetch, self._ledger.phases[-1].last_step - 1)
        for other in [other for other in self._pending if not step <= other <= last]:
            self._pending.pop(other).cancel()
        self._submit(step)
        batch = self._pending.pop(step).result()
        if batch is None:  # asked for ahead of its generation, which has come since
            self._submit(step, required=True)
            batch = self._pending.pop(step).result()
        assert batch is not None
        for ahead in range(step + 1, last + 1):
            self._submit(ahead)
        return replace(batch, wait_s=time.perf_counter() - begin)

    def held_out_batches(
        self,
        held_out: Sequence[HeldOutBucket],
        *,
        micro_batch_tokens: int,
        catalogs: Catalogs | None = None,
        pairs: bool = False,
    ) -> list[MicroBatch]:
        """This rank's share of a held-out set (`Generations.held_out`), as many micro-batches on every rank.

        The same samples with the same slots on any number of ranks; slots that even out the ranks have weight zero.
        `catalogs` is what the set's positions count in; None: the ledger's. With `pairs`, the rejected pictures too.
        """
        counted_in = self._ledger.catalogs if catalogs is None else catalogs
        further = ("rejected",) if pairs else ()
        return self._thread.submit(self._make_held_out, held_out, micro_batch_tokens, counted_in, further).result()

    def whole(self, groups: Sequence[HeldOutBucket]) -> list[MicroBatch]:
        """Each of these sets of samples as one micro-batch, read by this rank alone."""
        return self._thread.submit(self._make_whole, groups).result()

    def begin_pairs(self, group: HeldOutBucket, *, micro_batch_tokens: int) -> Future[list[MicroBatch]]:
        """As `held_out_batches`, of pairs with their rejected pictures, read in the background."""
        catalogs = self._ledger.catalogs
        return self._thread.submit(
            self._make_held_out, [group], micro_batch_tokens, catalogs, self._further, self._tolerant
        )

    def close(self) -> None:
        """Stop working ahead and close files."""
        for future in self._pending.values():
            future.cancel()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._ahead.close()
        self._assembler.close()

    def _positions(self, batch: GlobalBatch) -> Ints:
        """Positions in a global batch that this rank reads."""
        tokens = self._ledger.phases[batch.phase].micro_batch_tokens  # decides the micro-batches, not whose they are
        return cut_for(len(batch.rows), 1, 0, tokens, rank=self._rank, world=self._world).source

    def _submit(self, step: int, *, required: bool = False) -> None:
        asked = self._pending.get(step)
        if required or asked is None or _came_too_soon(asked):
            self._pending[step] = self._thread.submit(self._make, step, required)

    def _make_whole(self, groups: Sequence[HeldOutBucket]) -> list[MicroBatch]:
        made: list[MicroBatch] = []
        assembler = Assembler(
            self._ledger.catalogs, compute_dtype=self._assembler.dtype, pin_memory=self._assembler.pin_memory
        )
        for group in groups:
            made += assembler.micro_batches(
                rows=group.rows,
                texts=group.texts,
                slots=group.slots,
                weights=np.ones(len(group.rows), dtype=np.float32),
                num_slots=len(group.rows),
                resolution=group.resolution,
                bucket=group.bucket,
                sizes=[len(group.rows)],
            )
        assembler.close()
        return made

    def _make_held_out(
        self,
        held_out: Sequence[HeldOutBucket],
        micro_batch_tokens: int,
        catalogs: Catalogs,
        further: Sequence[str] = (),
        tolerant: bool = False,
    ) -> list[MicroBatch]:
        made: list[MicroBatch] = []
        # One of its own: its files and buffers are not needed again.
        assembler = Assembler(catalogs, compute_dtype=self._assembler.dtype, pin_memory=self._assembler.pin_memory)
        for group in held_out:
            tokens = catalogs.text_tokens(group.texts)
            cut = cut_for(
                len(group.rows),
                group.bucket.tokens,
                int(tokens.max()),
                micro_batch_tokens,
                rank=self._rank,
                world=self._world,
                pictures=pictures_of(further),
            )
            made += assembler.micro_batches(
                rows=group.rows[cut.source],
                texts=group.texts[cut.source],
                slots=group.slots[cut.source],
                weights=(cut.slots < len(group.rows)).astype(np.float32),
                num_slots=len(group.rows),
                resolution=group.resolution,
                bucket=group.bucket,
                sizes=cut.sizes,
                further=further,
                tolerant=tolerant,
            )
        assembler.close()
        return made

    def _make(self, step: int, required: bool) -> RankBatch | None:
        # Availability is asked here and not in `get`, where it would wait for an epoch being shuffled.
        if not required and not self._ledger.available(step):
            return None
        begin = time.perf_counter()
        batch = repeated(self._ledger.batch(step), self._repeat)
        budget = self._ledger.phases[batch.phase].micro_batch_tokens
        tokens = self._ledger.catalogs.text_tokens(batch.texts)
        pictures = pictures_of(self._further, guided=self._guided)
        cut, weights = cut_batch(batch, tokens, budget, rank=self._rank, world=self._world, pictures=pictures)
        before = self._assembler.read_bytes
        micro_batches = self._assembler.micro_batches(
            rows=batch.rows[cut.source],
            texts=batch.texts[cut.source],
            slots=cut.slots,
            weights=weights,
            num_slots=len(batch.rows),
            resolution=batch.resolution,
            bucket=batch.bucket,
            sizes=cut.sizes,
            further=self._further,
            tolerant=self._tolerant,
        )
        self._ahead.after(step)
        keys = self._ledger.catalogs.keys(batch.rows)
        if self._guided:
            if self._negative is None:
                self._negative = self._assembler.text(self._ledger.catalogs.empty_text())
            micro_batches = [replace(micro, negative=self._negative) for micro in micro_batches]
        if self.reference is not None:
            errors = self.reference.of(batch.rows[cut.source], batch.texts[cut.source], batch.resolution)
            micro_batches = self._with_reference(micro_batches, errors, [keys[at] for at in cut.source.tolist()])
        bad = tuple(
            BadSample(key=keys[int(cut.source[at])], slot=int(cut.slots[at]), problem=problem)
            for at, problem in sorted(self._assembler.problems.items())
        )
        return _rank_batch(
            batch,
            micro_batches,
            keys=keys,
            bad=bad,
            tokens=tokens[cut.source],
            weights=weights,
            read_s=time.perf_counter() - begin,
            read_bytes=self._assembler.read_bytes - before,
        )

    def _with_reference(
        self, micro_batches: Sequence[MicroBatch], errors: npt.NDArray[np.float32], keys: Sequence[str]
    ) -> list[MicroBatch]:
        """With the reference's errors (n, K, 2); pairs without them are left out where that is tolerated."""
        lost = np.isnan(errors).any(axis=(1, 2))
        for at in np.flatnonzero(lost).tolist():
            problem = f"pair {keys[at]} could not be read when the reference's errors were computed"
            if not self._tolerant:
                raise DataError(
                    f"{problem}, which data.max_bad_samples allowed then: set it to what it was. {REMOVING}"
                )
            self._assembler.problems.setdefault(at, problem)
        known, reference = torch.from_numpy(~lost), torch.from_numpy(np.nan_to_num(errors))
        made, begin = [], 0
        for micro in micro_batches:
            part = slice(begin, begin + len(micro.weights))
            made.append(replace(micro, weights=micro.weights * known[part], reference=reference[part]))
            begin = part.stop
        return made


def _came_too_soon(asked: Future[RankBatch | None]) -> bool:
    """A batch was asked for before its generation had come: it may have, meanwhile."""
    return asked.done() and not asked.cancelled() and asked.exception() is None and asked.result() is None


def _rank_batch(
    batch: GlobalBatch,
    micro_batches: list[MicroBatch],
    *,
    keys: list[str],
    bad: tuple[BadSample, ...],
    tokens: Ints,
    weights: npt.NDArray[np.float32],
    read_s: float,
    read_bytes: int,
) -> RankBatch:
    per_image = batch.bucket.tokens
    pictures = micro_batches[0].pictures_per_row
    computed = sum(pictures * len(micro.weights) * (per_image + micro.text.shape[1]) for micro in micro_batches)
    useful = pictures * int(((tokens + per_image) * (weights > 0)).sum())
    return RankBatch(
        batch=batch,
        micro_batches=micro_batches,
        keys=keys,
        num_real=batch.num_real,
        wait_s=0.0,
        read_s=read_s,
        read_bytes=read_bytes,
        image_tokens=pictures * len(tokens) * per_image,
        text_tokens=pictures * int(tokens.sum()),
        padding=1 - useful / computed,
        bad=bad,
    )
