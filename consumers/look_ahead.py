"""Fetches the tars of the steps to come, of data sets in a bucket, so that no step waits for a download.

Place in the flow: the stream calls `after(step)` from its own thread once it has read a step's batch; downloads run in
threads of their own, in the ledger's order, and end in the cache that all ranks of a machine share. Half of the cache,
divided among those ranks, is what may be fetched ahead: more would push out what is read now; and nothing is fetched
ahead where all that is in the cache is in use. A data set on the file
system costs nothing here. Errors are left to the reader, which meets them where it can name the sample.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import numpy as np

from qwenimg_dist.data.catalog import Ints, Places, TarFile
from qwenimg_dist.data.ledger import GlobalBatch, Ledger
from qwenimg_dist.data.mirror import Mirror, tar_cache_of

_STEPS: Final = 64
_THREADS: Final = 3


class LookAhead:
    """One per stream. `share` gives the positions in a global batch that this rank reads."""

    def __init__(self, ledger: Ledger, share: Callable[[GlobalBatch], Ints]) -> None:
        self._ledger = ledger
        self._share = share
        mirrors = [mirror for root in ledger.catalogs.roots if (mirror := Mirror.of(root)) is not None]
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._budget_bytes = min((mirror.max_bytes for mirror in mirrors), default=0) // (2 * local_ranks)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="look-ahead") if mirrors else None
        self._tars_of: dict[int, list[TarFile]] = {}
        self._fetches: dict[str, Future[None]] = {}

    def after(self, step: int) -> None:
        """Begin to fetch what the steps after this one read, as far as the budget goes."""
        if self._threads is None:
            return
        self._tars_of = {ahead: tars for ahead, tars in self._tars_of.items() if ahead > step}
        wanted: dict[str, TarFile] = {}
        num_bytes = 0
        for ahead in range(step + 1, min(step + 1 + _STEPS, self._ledger.phases[-1].last_step)):
            if ahead not in self._tars_of:
                if not self._ledger.available(ahead):
                    break
                self._tars_of[ahead] = self._tars(ahead)
            for tar in self._tars_of[ahead]:
                if str(tar.path) not in wanted:
                    wanted[str(tar.path)] = tar
                    num_bytes += tar.size_bytes
            if num_bytes > self._budget_bytes:
                break
        # What is no longer wanted and not begun need not be; what was fetched may have been removed since.
        for name in [name for name in self._fetches if name not in wanted]:
            self._fetches.pop(name).cancel()
        for name, tar in wanted.items():
            if name not in self._fetches:
                self._fetches[name] = self._threads.submit(_fetch, tar)

    def close(self) -> None:
        """Begin no further fetch."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def _tars(self, step: int) -> list[TarFile]:
        batch = self._ledger.batch(step)
        mine = np.unique(self._share(batch))
        catalogs, rows = self._ledger.catalogs, batch.rows[mine]
        latents = catalogs.latents_places(rows, batch.resolution, batch.bucket)
        found = [_named(places) for catalog, _, places in latents if catalog.latents[batch.resolution].facet]
        found += [_named(places) for _, _, places in catalogs.text_places(np.unique(batch.texts[mine]))]
        return [tar for tars in found for tar in tars]


def _named(places: Places) -> list[TarFile]:
    return [places.tars[int(number)] for number in np.unique(places.tar)]


def _fetch(tar: TarFile) -> None:
    cache = tar_cache_of(tar.path.parent)
    if cache is not None:
        with contextlib.suppress(OSError):
            cache.fetch(f"{tar.path.parent.name}/{tar.path.name}", tar.size_bytes, ahead=True)
