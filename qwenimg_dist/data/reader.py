"""Reads exactly the bytes of the tensors wanted, from tars into buffers that are used again.

Place in the flow: the stream asks the catalog for places and this for bytes; it knows nothing of shapes or batches.
Neighbouring tensors of a tar are read with one `preadv`, the few bytes between them into a scrap buffer; a few threads
read at once, since on network storage it is waiting that takes the time. Every error
names tar, key and way out. Storage that is away is waited for (`patience.py`) and its tars are opened anew: it is no
verdict on a sample. Refuses a tar whose size is not the committed one, and never returns a short read.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qwenimg_dist.data.catalog import Places, TarFile
from qwenimg_dist.data.errors import MENDING
from qwenimg_dist.data.facets import DataError
from qwenimg_dist.data.mirror import tar_cache_of
from qwenimg_dist.data.tar_cache import TarCache
from qwenimg_dist.debug import fault_point
from qwenimg_dist.patience import patiently
from qwenimg_dist.storage import ObjectChangedError

# A local read costs about as much as copying this many bytes; a network read far more.
_MAX_GAP: Final = 64 * 1024
_MAX_HELD: Final = 4
_MAX_BUFFERS: Final = 512  # of one preadv; IOV_MAX is 1024 on Linux, and gaps need a buffer too

Bytes = npt.NDArray[np.uint8]


class TarReader:
    """Open tars are kept, up to `max_open`. Safe to use from several threads, one `read` at a time."""

    def __init__(self, *, max_open: int = 256, threads: int = 4) -> None:
        self._max_open = max_open
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._open: OrderedDict[str, int] = OrderedDict()
        self._caches: dict[str, TarCache | None] = {}
        self._cache_of_folder: dict[Path, TarCache | None] = {}
        self._held: dict[str, int] = {}
        """Open tars of buckets, which are closed as soon as they were read."""
        self._lock = threading.Lock()
        self._scrap = bytearray(_MAX_GAP)  # nobody looks at it, so all threads may write there

    def read(self, places: Places, out: Sequence[Bytes]) -> int:
        """Fill `out[i]` (uint8, contiguous, `places.nbytes[i]` long) with tensor i; returns the bytes wanted.

        Raises `DataError` for a tar that is missing, cut, or of another size than committed, `StorageAwayError` where
        the storage does not answer for two minutes.
        """
        order = np.lexsort((places.offset, places.tar))
        runs = list(_neighbours(places, order))
        with self._lock:
            for wave in self._waves(places, runs):
                try:
                    self._read_wave(places, wave, out)
                finally:
                    self._let_go()
        return int(places.nbytes.sum())

    def read_what_can_be(self, places: Places, out: Sequence[Bytes]) -> dict[int, str]:
        """As `read`, but tensors that cannot be read are filled with zeros and named: index -> problem."""
        with contextlib.suppress(DataError):
            self.read(places, out)
            return {}
        problems: dict[int, str] = {}
        for index in range(len(places.nbytes)):
            here = slice(index, index + 1)
            one = replace(
                places,
                tar=places.tar[here],
                offset=places.offset[here],
                nbytes=places.nbytes[here],
                keys=places.keys[here],
            )
            try:
                self.read(one, out[here])
            except DataError as error:
                out[index][:] = 0
                problems[index] = str(error)
        return problems

    def _waves(self, places: Places, runs: Sequence[npt.NDArray[np.intp]]) -> Iterator[Sequence[npt.NDArray[np.intp]]]:
        """No more than can be open at once: no tar is closed while one of the threads reads it. Of a bucket's tars few,
        since while they are open the cache cannot make room."""
        wave: list[npt.NDArray[np.intp]] = []
        held: set[int] = set()
        for run in runs:
            number = int(places.tar[run[0]])
            cached = self._cache_of(places.tars[number]) is not None
            if len(wave) == self._max_open or (cached and number not in held and len(held) == _MAX_HELD):
                yield wave
                wave, held = [], set()
            wave.append(run)
            if cached:
                held.add(number)
        if wave:
            yield wave

    def _cache_of(self, tar: TarFile) -> TarCache | None:
        name = str(tar.path)  # which a path remembers, unlike its parent: this is asked twice per run of tensors
        if name not in self._caches:
            folder = tar.path.parent
            if folder not in self._cache_of_folder:
                self._cache_of_folder[folder] = tar_cache_of(folder)
            self._caches[name] = self._cache_of_folder[folder]
        return self._caches[name]

    def _let_go(self) -> None:
        """Close the tars that came from a bucket: the cache may remove them now."""
        while self._held:
            os.close(self._held.popitem()[1])

    def _read_wave(self, places: Places, runs: Sequence[npt.NDArray[np.intp]], out: Sequence[Bytes]) -> None:
        handles = []
        for first in (run[0] for run in runs):
            tar = places.tars[int(places.tar[first])]
            handles.append(self._handle(tar, places.keys[first], int(places.offset[first])))

        def read(nth: int) -> None:
            for handle, run in zip(handles[nth :: self._threads], runs[nth :: self._threads], strict=True):
                self._read_run(handle, places, run, out)

        if self._threads == 1 or len(runs) == 1:
            for nth in range(self._threads):
                read(nth)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="tar-reader")
        futures = [self._pool.submit(read, nth) for nth in range(self._threads)]
        wait(futures)  # all of them, whatever one met: the buffers are the caller's again
        for future in futures:
            future.result()

    def close(self) -> None:
        """Close all tars; the reader can be used again."""
        with self._lock:
            if self._pool is not None:
                self._pool.shutdown()
                self._pool = None
            while self._open:
                os.close(self._open.popitem()[1])

    def _read_run(self, handle: int, places: Places, run: npt.NDArray[np.intp], out: Sequence[Bytes]) -> None:
        """Read tensors that lie close together in one tar."""
        tar = places.tars[int(places.tar[run[0]])]
        buffers: list[Any] = []
        position = start = int(places.offset[run[0]])
        for index in run:
            gap = int(places.offset[index]) - position
            if gap:
                buffers.append(memoryview(self._scrap)[:gap])
            buffers.append(out[index])
            position += gap + int(places.nbytes[index])
        if _preadv(handle, buffers, start) == position - start:
            return
        for index in run:  # a short read (a signal, a network file system): again, one by one
            self._read_one(handle, tar, places, int(index), out[index])

    def _read_one(self, handle: int, tar: TarFile, places: Places, index: int, out: Bytes) -> None:
        done, wanted, offset = 0, int(places.nbytes[index]), int(places.offset[index])
        while done < wanted:
            try:
                got = patiently(
                    lambda: _read_bytes(handle, [out.data[done:]], offset + done),  # noqa: B023
                    f"{tar.path} (reading sample {places.keys[index].decode()} at byte {offset + done})",
                    between=lambda: self._reopen(handle, tar),
                )
            except OSError as error:
                what = f"{error.strerror} at byte {offset + done}"
                raise self._failed(tar, places.keys[index], offset, what) from error
            if got == 0:
                what = f"ends at byte {offset + done}, {wanted} bytes were wanted"
                raise self._failed(tar, places.keys[index], offset, what)
            done += got

    def _handle(self, tar: TarFile, key: np.bytes_, offset: int) -> int:
        name = str(tar.path)
        cache = self._cache_of(tar)
        if cache is not None:
            if name not in self._held:
                self._held[name] = self._cached(cache, tar, key, offset)
            return self._held[name]
        if name not in self._open:
            while len(self._open) >= self._max_open:
                os.close(self._open.popitem(last=False)[1])
            try:
                handle, size = patiently(lambda: _open(name), f"{name} (reading sample {key.decode()})")
            except OSError as error:
                raise self._failed(tar, key, offset, f"cannot be opened ({error.strerror})") from error
            if size != tar.size_bytes:
                os.close(handle)
                raise self._failed(tar, key, offset, f"has {size} bytes, {tar.size_bytes} were committed")
            self._open[name] = handle
        self._open.move_to_end(name)
        return self._open[name]

    def _reopen(self, handle: int, tar: TarFile) -> None:
        """Put a new opening of the tar in the place of a stale one, for whoever else reads through it as well."""
        if self._cache_of(tar) is not None:
            return  # on this machine's own disk
        with contextlib.suppress(OSError):  # the next try says why
            fresh, size = _open(str(tar.path))
            if size == tar.size_bytes:
                os.dup2(fresh, handle, inheritable=False)
            os.close(fresh)

    def _cached(self, cache: TarCache, tar: TarFile, key: np.bytes_, offset: int) -> int:
        """A bucket that cannot be reached is no verdict on the sample: that passes as it is, an OSError."""
        try:
            return cache.open(f"{tar.path.parent.name}/{tar.path.name}", tar.size_bytes)
        except FileNotFoundError as error:
            raise self._failed(tar, key, offset, f"is not in {cache.storage.url}") from error
        except ObjectChangedError as error:
            raise self._failed(tar, key, offset, f"{error.strerror} ({cache.storage.url})") from error

    def _failed(self, tar: TarFile, key: np.bytes_, offset: int, what: str) -> DataError:
        return DataError(
            f"{tar.path} {what} (reading sample {key.decode()} at byte {offset}): {MENDING}. To train without such "
            "samples, set data.max_bad_samples"
        )


def _neighbours(places: Places, order: npt.NDArray[np.intp]) -> Iterator[npt.NDArray[np.intp]]:
    """Cut an order by (tar, offset) into runs that one read takes in."""
    if not len(order):
        return
    tar, offset = places.tar[order], places.offset[order]
    gap = offset[1:] - (offset[:-1] + places.nbytes[order][:-1])
    apart = (tar[1:] != tar[:-1]) | (gap > _MAX_GAP) | (gap < 0)
    cuts = np.concatenate([[0], np.flatnonzero(apart) + 1, [len(order)]])
    for begin, end in itertools.pairwise(cuts):
        for first in range(int(begin), int(end), _MAX_BUFFERS):
            yield order[first : min(first + _MAX_BUFFERS, int(end))]


def _preadv(handle: int, buffers: list[Any], offset: int) -> int:
    """Bytes read; -1 on an error, which the caller meets again where it can name the sample."""
    try:
        return _read_bytes(handle, buffers, offset)
    except OSError:
        return -1


def _read_bytes(handle: int, buffers: list[Any], offset: int) -> int:
    fault_point("tar_read")
    return os.preadv(handle, buffers, offset)


def _open(name: str) -> tuple[int, int]:
    """Handle and size in bytes."""
    handle = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return handle, os.fstat(handle).st_size
    except OSError:
        os.close(handle)
        raise
