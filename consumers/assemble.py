"""Bytes -> tensors of micro-batches: read where they belong, without a copy behind the read.

Place in the flow: `stream.py` says which samples and how they are cut, the catalog where their bytes lie, the reader
reads; here the bytes become the tensors that the trainer gets.

1. One buffer for the latents of a rank's batch and one for its texts; micro-batches are views of them.
2. Each tensor is read right into its row: a latent as it is stored (fp32 is made on the device, which also halves what
   travels there), a text into its padded row where it is stored in the compute dtype; else through one scratch buffer.
3. Texts that a cut uses several times (the empty prompt) are read once and copied.
4. A buffer is used again when nothing looks at it any more: touching fresh memory costs as much as the read itself.
   For a GPU, torch's own cache of pinned memory does the same, and knows which copies are still under way.

Raises `DataError` for what cannot be read, or, if `tolerant`, puts zeros at weight zero there and tells.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from consumers.batch import MicroBatch
from qwenimg_dist.data.catalog import Ints, Places, conditions_of
from qwenimg_dist.data.catalogs import Catalogs
from qwenimg_dist.data.reader import TarReader
from qwenimg_dist.schema import Bucket

_TORCH: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_ROUND_BYTES: Final = 1 << 20
_MAX_FREE: Final = 4
_SPARE: Final = 4

Bytes = npt.NDArray[np.uint8]


class Buffers:
    """Memory for tensors: `take` gives a flat uint8 tensor, whose memory comes back by itself when it is let go of."""

    def __init__(self, *, pin_memory: bool) -> None:
        self._pin = pin_memory
        self._free: list[Bytes] = []

    def take(self, nbytes: int) -> torch.Tensor:
        """(nbytes,) uint8, contents undefined; no other living tensor shares its memory."""
        if self._pin:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        owner = self._fitting(nbytes)
        view = owner[:nbytes]
        # The tensor keeps `view`, and slices of the tensor keep its storage: when the last is gone, so is `view`.
        weakref.finalize(view, self._free.append, owner).atexit = False
        return torch.from_numpy(view)

    def _fitting(self, nbytes: int) -> Bytes:
        fits = [one for one in tuple(self._free) if nbytes <= len(one) <= max(_SPARE * nbytes, _ROUND_BYTES)]
        if fits:
            chosen = min(fits, key=len)
            # In place and by identity: another thread may be giving a buffer back, which appends to this very list.
            del self._free[next(i for i, one in enumerate(self._free) if one is chosen)]
            return chosen
        # Of other sizes (another phase) only a few are kept.
        while len(self._free) >= _MAX_FREE:
            self._free.pop(0)
        return np.empty(-(-(nbytes + nbytes // 8) // _ROUND_BYTES) * _ROUND_BYTES, dtype=np.uint8)


class Assembler:
    """Reads n samples and cuts them into micro-batches. One thread at a time."""

    def __init__(self, catalogs: Catalogs, *, compute_dtype: torch.dtype, pin_memory: bool) -> None:
        self._catalogs = catalogs
        self.dtype = compute_dtype
        self.pin_memory = pin_memory
        self._reader = TarReader()
        self._buffers = Buffers(pin_memory=pin_memory)
        self._scratch = np.empty(0, dtype=np.uint8)
        self.read_bytes = 0
        self._tolerant = False
        self.problems: dict[int, str] = {}
        """Of the last `micro_batches`: position of a sample that could not be read -> why."""

    def close(self) -> None:
        """Close files."""
        self._reader.close()

    def micro_batches(
        self,
        *,
        rows: Ints,
        texts: Ints,
        slots: Ints,
        weights: npt.NDArray[np.float32],
        num_slots: int,
        resolution: int,
        bucket: Bucket,
        sizes: Sequence[int],
        further: Sequence[str] = (),
        tolerant: bool = False,
    ) -> list[MicroBatch]:
        """Read n samples, with their `further` tensors (`logvar`, `rejected`) and the bucket's conditions, cut into
        micro-batches of these sizes.

        Raises `DataError` for what cannot be read; if `tolerant`, zeros at weight zero stand there instead.
        """
        self.problems = {}
        self._tolerant = tolerant
        conditions = conditions_of(bucket)
        latents = self._latents(rows, resolution, bucket, (*further, *conditions))
        numbers = self._catalogs.numbers(rows) if "rejected" in latents else None
        padded = self._texts(texts, sizes)
        weights = weights.copy()
        weights[list(self.problems)] = 0.0
        made, begin = [], 0
        for size, (text, mask) in zip(sizes, padded, strict=True):
            part = slice(begin, begin + size)
            made.append(
                MicroBatch(
                    latents=latents["mean"][part],
                    logvar=latents["logvar"][part] if "logvar" in latents else None,
                    text=text,
                    text_mask=mask,
                    weights=torch.from_numpy(weights[part].copy()),
                    slots=torch.from_numpy(slots[part].copy()),
                    num_slots=num_slots,
                    bucket=bucket,
                    rejected=latents["rejected"][part] if "rejected" in latents else None,
                    numbers=None if numbers is None else torch.from_numpy(numbers[part]),
                    conditions=tuple(latents[name][part] for name in conditions),
                )
            )
            begin += size
        return made

    def text(self, position: int) -> torch.Tensor:
        """(T, D) features of one text, in the compute dtype and memory of its own."""
        self._tolerant = False
        return self._texts(np.array([position]), [1])[0][0][0].clone()

    def _latents(self, rows: Ints, resolution: int, bucket: Bucket, further: Sequence[str]) -> dict[str, torch.Tensor]:
        """Name -> (n, 16, h, w) as stored, fp32 where catalogs differ: `mean`, then the others in their order."""
        groups = list(self._catalogs.latents_places(rows, resolution, bucket, further=further))
        indexes = [catalog.latents[resolution] for catalog, _, _ in groups]
        if not indexes[0].facet:  # prompts, of which the run draws the pictures
            return {name: torch.zeros(()).expand(len(rows), *indexes[0].shape(bucket)) for name in ("mean", *further)}
        stored = {index.dtype for index in indexes}
        dtype = _TORCH[stored.pop()] if len(stored) == 1 else torch.float32
        shapes = {name: indexes[0].shape(bucket, name) for name in ("mean", *further)}
        sizes = [len(rows) * int(np.prod(shape)) for shape in shapes.values()]
        parts = torch.split(self._buffers.take(sum(sizes) * dtype.itemsize).view(dtype), sizes)
        made = {name: part.view(len(rows), *shapes[name]) for name, part in zip(shapes, parts, strict=True)}
        for (_, where, places), index in zip(groups, indexes, strict=True):
            targets = [one[at].view(-1) for one in made.values() for at in where.tolist()]
            for number, problem in self._read(places, targets, _TORCH[index.dtype]).items():
                self.problems[int(where[number % len(where)])] = problem
        return made

    def _texts(self, texts: Ints, sizes: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Per micro-batch: (b, T, D) in the compute dtype, zeros where padded; (b, T) mask, None if all are valid."""
        tokens = self._catalogs.text_tokens(texts)
        if int(tokens.min()) == 0:
            raise ValueError(f"every sample needs at least one text token; lengths are {tokens.tolist()}")
        unique, first, inverse = np.unique(texts, return_index=True, return_inverse=True)
        groups = list(self._catalogs.text_places(unique))
        width = groups[0][0].text_width
        ends = np.cumsum(sizes)
        longest = [int(tokens[end - size : end].max()) for end, size in zip(ends, sizes, strict=True)]
        flat = self._buffers.take(sum(s * t for s, t in zip(sizes, longest, strict=True)) * width * self.dtype.itemsize)
        flat = flat.view(self.dtype)
        made, spots, position = [], [], 0
        for end, size, most in zip(ends.tolist(), sizes, longest, strict=True):
            padded = flat[position : position + size * most * width].view(size, most, width)
            lengths = tokens[end - size : end]
            spots += [padded[i, :length].view(-1) for i, length in enumerate(lengths.tolist())]
            for i in np.flatnonzero(lengths < most).tolist():
                padded[i, int(lengths[i]) :].zero_()
            made.append((padded, self._mask(lengths, most)))
            position += size * most * width
        for catalog, where, places in groups:
            targets = [spots[first[at]] for at in where]
            for number, problem in self._read(places, targets, _TORCH[catalog.text_dtype]).items():
                self.problems.update(dict.fromkeys(np.flatnonzero(inverse == where[number]).tolist(), problem))
        for at in np.flatnonzero(first[inverse] != np.arange(len(texts))).tolist():
            spots[at].copy_(spots[first[inverse[at]]])
        return made

    def _mask(self, lengths: Ints, most: int) -> torch.Tensor | None:
        if int(lengths.min()) == most:
            return None
        mask = torch.from_numpy(np.arange(most)[None, :] < lengths[:, None])
        return mask.pin_memory() if self.pin_memory else mask

    def _read(self, places: Places, targets: Sequence[torch.Tensor], stored: torch.dtype) -> dict[int, str]:
        """Fill flat targets, of another type than is stored through the scratch buffer.

        Returns which could not be read, and why: empty unless that is tolerated.
        """
        direct = targets[0].dtype == stored
        parts = [_as_bytes(one) for one in targets] if direct else self._scratch_parts(places.nbytes)
        self.read_bytes += int(places.nbytes.sum())
        problems: dict[int, str] = {}
        if self._tolerant:
            problems = self._reader.read_what_can_be(places, parts)
        else:
            self._reader.read(places, parts)
        if not direct:
            for target, part in zip(targets, parts, strict=True):
                target.copy_(torch.from_numpy(part).view(stored))
        return problems

    def _scratch_parts(self, nbytes: Ints) -> list[Bytes]:
        total = int(nbytes.sum())
        if len(self._scratch) < total:
            self._scratch = np.empty(total, dtype=np.uint8)
        ends = np.cumsum(nbytes)
        return [self._scratch[end - num : end] for end, num in zip(ends.tolist(), nbytes.tolist(), strict=True)]


def _as_bytes(flat: torch.Tensor) -> Bytes:
    """The memory of a contiguous tensor."""
    found: Bytes = flat.view(torch.uint8).numpy()
    return found
