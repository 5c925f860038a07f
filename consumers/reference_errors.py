"""The reference's errors on every pair, kept on disk: what `reference_pass.py` computes and the stream hands out.

A table holds one catalog's pairs at one resolution class: (entries, K, 2) fp32, an entry per row and caption, chosen
before rejected. It lies in a folder named by a hash of all that the errors depend on (weights, data, draws, sigma
density), so that another run finds what fits and nothing else:

    <id>/about.json               what was hashed
    <id>/block-00000012.npy       a block's errors, renamed into place when whole; a killed pass goes on behind the last
    <id>/errors.npy               all blocks joined at the end, which is what makes a table usable; memory-mapped

NaN stands where a pair could not be read and that was tolerated. Refuses a table that is not whole, and never advises
to remove one that a run may need: past its first step the starting weights are gone.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qwenimg_dist.config import stable_hash
from qwenimg_dist.data.catalog import Catalog, Ints
from qwenimg_dist.data.catalogs import Catalogs
from qwenimg_dist.data.facets import DataError
from qwenimg_dist.files import fsync_dir, temporary_name, write_json
from qwenimg_dist.patience import patiently
from qwenimg_dist.schema import Bucket

BLOCK: Final = 256
"""Pairs that are computed and committed together: a few hundred MB of latents and texts over all ranks."""
REMOVING: Final = (
    "Remove the folder only where no run that uses it has made a step: it is computed again then, from the starting "
    "weights, which training leaves behind"
)
_DIGITS: Final = 20

Errors = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Entries:
    """The pairs of one catalog at one resolution class, by bucket and then in listing order; parallel arrays."""

    catalog: int
    """Index in `Catalogs`."""
    resolution: int
    captions: Ints
    """Caption position in the catalog."""
    rows: Ints
    """Row position within the catalog."""
    buckets: tuple[Bucket, ...]
    bucket: Ints

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self) -> list[slice]:
        """Runs of at most `BLOCK` entries of one bucket, the same on any number of ranks."""
        ends = np.flatnonzero(np.diff(self.bucket)) + 1
        bounds = [0, *ends.tolist(), len(self)]
        return [
            slice(begin, min(begin + BLOCK, end))
            for first, end in itertools.pairwise(bounds)
            for begin in range(first, end, BLOCK)
        ]


def entries_of(catalog: Catalog, index: int, resolution: int, mask: npt.NDArray[np.bool_]) -> Entries:
    """Every caption of the rows in `mask` that have latents at this class."""
    latents = catalog.latents[resolution]
    rows = np.flatnonzero(mask & (latents.bucket >= 0))
    rows = rows[np.argsort(latents.bucket[rows], kind="stable")]
    first = np.asarray(catalog.caption_start)[rows]
    counts = np.asarray(catalog.caption_start)[rows + 1] - first
    repeated = np.repeat(rows, counts)
    within = np.arange(len(repeated)) - np.repeat(np.cumsum(counts) - counts, counts)
    return Entries(
        catalog=index,
        resolution=resolution,
        captions=np.repeat(first, counts) + within,
        rows=repeated,
        buckets=latents.buckets,
        bucket=latents.bucket[repeated].astype(np.int64),
    )


class ErrorTable:
    """One table on disk. Written by rank 0, block by block; read by all."""

    def __init__(self, root: Path, about: Mapping[str, Any], entries: Entries, draws: int) -> None:
        self.folder = root / stable_hash(about, digits=_DIGITS)
        self.entries = entries
        self._about = dict(about)
        self._shape = (len(entries), draws, 2)
        self._blocks = entries.blocks()

    @property
    def complete(self) -> bool:
        return (self.folder / "errors.npy").is_file()

    def missing(self) -> list[int]:
        """Blocks that are still to be computed. For rank 0."""
        if self.complete:
            return []
        return [number for number in range(len(self._blocks)) if not self._block(number).is_file()]

    def write(self, number: int, errors: Errors) -> None:
        """Commit a block. For rank 0."""
        if not (self.folder / "about.json").is_file():
            write_json(self.folder / "about.json", self._about)
        _save(self._block(number), errors)

    def join(self) -> None:
        """Make the table whole from its blocks, and remove these. For rank 0; does nothing if it is whole."""
        if self.complete:
            return
        errors = np.empty(self._shape, dtype=np.float32)
        for number, where in enumerate(self._blocks):
            block = np.load(self._block(number), allow_pickle=False)
            if block.shape != errors[where].shape:
                raise DataError(f"{self._block(number)} is of shape {block.shape}: remove it, it is computed again")
            errors[where] = block
        _save(self.folder / "errors.npy", errors)
        for number in range(len(self._blocks)):
            self._block(number).unlink(missing_ok=True)

    def open(self) -> Errors:
        """Memory-map the whole table. Raises `DataError`, and `StorageAwayError` where it cannot be seen now."""
        file = self.folder / "errors.npy"
        try:
            errors: Errors = patiently(lambda: np.load(file, mmap_mode="r", allow_pickle=False), str(file))
        except (OSError, ValueError) as error:
            raise DataError(f"{file} cannot be read ({error}): restore it. {REMOVING}") from error
        if errors.shape != self._shape:
            raise DataError(
                f"{file} is of shape {errors.shape}, these pairs have {self._shape}: restore it. {REMOVING}"
            )
        return errors

    def _block(self, number: int) -> Path:
        return self.folder / f"block-{number:08d}.npy"


class ReferenceErrors:
    """Looks up a batch's reference errors; made when all tables are whole."""

    def __init__(self, catalogs: Catalogs, tables: Sequence[ErrorTable]) -> None:
        self._catalogs = catalogs
        self._tables = {(one.entries.catalog, one.entries.resolution): (one, one.open()) for one in tables}
        self._at = {key: _positions(catalogs[key[0]], one.entries) for key, (one, _) in self._tables.items()}

    def of(self, rows: Ints, texts: Ints, resolution: int) -> Errors:
        """(n, K, 2) errors of pairs given by row and text positions; NaN where the pass could not read one.

        Raises `DataError` for a pair that is not in the table.
        """
        parts: list[tuple[Ints, Errors]] = []
        for index, local, where in self._catalogs.split_rows(rows):
            table, errors = self._tables[index, resolution]
            catalog = self._catalogs[index]
            captions = _caption_of(catalog, local, texts[where] - self._catalogs.text_base(index))
            at = np.where(captions >= 0, self._at[index, resolution][captions], -1)
            if (at < 0).any():
                row = int(np.flatnonzero(at < 0)[0])
                key = catalog.keys[local[row]].decode()
                raise DataError(f"{table.folder} has no reference errors of pair {key}: restore it. {REMOVING}")
            parts.append((where, errors[at]))
        found = np.empty((len(rows), *parts[0][1].shape[1:]), dtype=np.float32)
        for where, errors in parts:
            found[where] = errors
        return found


def _positions(catalog: Catalog, entries: Entries) -> npt.NDArray[np.int32]:
    """(captions,) where each caption of the catalog stands in the table; -1 where it does not."""
    at: npt.NDArray[np.int32] = np.full(len(catalog.caption_text), -1, dtype=np.int32)
    at[entries.captions] = np.arange(len(entries), dtype=np.int32)
    return at


def _caption_of(catalog: Catalog, rows: Ints, texts: Ints) -> Ints:
    """(n,) position of the caption of each row that has this text; -1 where none has."""
    start, stop = np.asarray(catalog.caption_start)[rows], np.asarray(catalog.caption_start)[rows + 1]
    found = np.full(len(rows), -1, dtype=np.int64)
    for step in range(int((stop - start).max())):
        here = np.minimum(start + step, stop - 1)
        found = np.where((found < 0) & (catalog.caption_text[here] == texts), here, found)
    return found


def _save(file: Path, array: Errors) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(file)
    try:
        with open(temporary, "wb") as sink:
            np.save(sink, array, allow_pickle=False)
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(temporary, file)
        fsync_dir(file.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
