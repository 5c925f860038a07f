"""Tars of a bucket on this machine's disk: fetched whole when they are read, removed again by a limit of bytes.

Place in the flow: `mirror.py` has one per data set; `reader.py` opens tars through it. All processes of the machine
share it, with nothing but the file system between them:

- A tar appears under its name by a rename, from `.fetch/`, where a fetch reserves its bytes first. Of several that want
  one tar, one fetches and the others wait for it.
- Who reads a tar holds a shared lock on it; the operating system drops the lock with the process. What is locked is
  not removed, nor is a tar that was written here and whose parquet is not here yet: a producer is about to commit it.
  Fetched ones are told by their mode, which is read-only: the parquets of a run that follows its producers come to one
  machine alone.
- Room is made by removing the tars that were opened longest ago. If all that is left is in use, a fetch ahead of need
  is left out, while a reader passes the limit rather than wait: the tars never take more than the limit and what the
  ranks of a machine read at one moment.

The tars of readers and fetches count, the index (parquets) does not.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from qwenimg_dist.debug import fault_point
from qwenimg_dist.files import fsync_dir
from qwenimg_dist.storage import Storage

FETCHING: Final = ".fetch"
_STRIPES: Final = 64
_TRIES: Final = 8
_FETCHED: Final = 0o444
"""Mode of what the bucket has for certain; what a producer writes here its owner may write."""


class _Entry(NamedTuple):
    opened_ns: int
    size_bytes: int
    path: str
    half: bool
    """Being fetched, or left so by the dead."""


@dataclass(frozen=True)
class TarCache:
    """The tars below `root`, which mirrors `storage`."""

    root: Path
    storage: Storage
    max_bytes: int

    def open(self, name: str, size_bytes: int) -> int:
        """A handle of the tar `FACET/NAME`, locked as in use until it is closed; fetched if it is not here.

        Raises FileNotFoundError if the bucket has none, `StorageError` if it has another size or cannot be reached.
        """
        for _ in range(_TRIES):
            handle = self._open_here(name, size_bytes)
            if handle is not None:
                return handle
            self.fetch(name, size_bytes)
        raise OSError(f"{name} is removed from {self.root} as fast as it is fetched: raise data.cache_bytes")

    def fetch(self, name: str, size_bytes: int, *, ahead: bool = False) -> None:
        """Bring a tar here, if it is not; `ahead` of need, only if there is room."""
        with self._lock(f"{zlib.crc32(name.encode()) % _STRIPES:02d}.lock"):
            if (self.root / name).exists():
                return
            temporary = self.root / FETCHING / f"{uuid.uuid4().hex}.tar"
            try:
                with self._reserved(temporary, size_bytes, pass_limit=not ahead) as reserved:
                    if not reserved:
                        return
                    self.storage.fetch(name, temporary, size_bytes=size_bytes)
                    fault_point("tar_fetched")
                    file = self.root / name
                    file.parent.mkdir(exist_ok=True)
                    os.chmod(temporary, _FETCHED)
                    os.replace(temporary, file)
                fsync_dir(file.parent)
            finally:
                temporary.unlink(missing_ok=True)

    def trim(self, wanted_bytes: int = 0) -> None:
        """Remove what was opened longest ago until `wanted_bytes` more fit, and what the dead left half fetched."""
        with self._lock("room.lock"):
            self._trim(wanted_bytes)

    def num_bytes(self) -> int:
        """Bytes of all tars here that may be removed, and of those being fetched."""
        return sum(one.size_bytes for one in self._entries())

    def _open_here(self, name: str, size_bytes: int) -> int | None:
        try:
            handle = os.open(self.root / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(handle, fcntl.LOCK_SH)
        status = os.fstat(handle)
        if status.st_nlink == 0:  # removed between the two
            os.close(handle)
            return None
        if status.st_size != size_bytes:  # not the committed one: a disk that lost its end
            (self.root / name).unlink(missing_ok=True)
            os.close(handle)
            return None
        os.utime(handle)
        return handle

    @contextlib.contextmanager
    def _reserved(self, temporary: Path, size_bytes: int, *, pass_limit: bool) -> Iterator[bool]:
        """While a temporary takes up the tar's size; made, and locked as alive, while nobody else counts. False where
        the tar does not fit and the limit may not be passed."""
        with contextlib.ExitStack() as stack:
            with self._lock("room.lock"):
                left_bytes = self._trim(size_bytes)
                if not pass_limit and left_bytes + size_bytes > self.max_bytes:
                    yield False
                    return
                handle = stack.enter_context(open(temporary, "xb"))
                fcntl.flock(handle, fcntl.LOCK_EX)
                handle.truncate(size_bytes)
            yield True

    def _trim(self, wanted_bytes: int) -> int:
        """Bytes of the tars that are left."""
        found = sorted(self._entries())
        total = sum(one.size_bytes for one in found)
        for one in found:
            if (one.half or total + wanted_bytes > self.max_bytes) and _remove_unused(one.path):
                total -= one.size_bytes
        return total

    def _entries(self) -> Iterator[_Entry]:
        """Tars that may be removed, and those that are being fetched."""
        for folder in os.scandir(self.root):
            if not folder.is_dir():
                continue
            half = folder.name == FETCHING
            names = {entry.name: entry for entry in os.scandir(folder.path)}
            for name, entry in names.items():
                stem = name.rpartition("-")[0].rpartition("-")[0]
                if not name.endswith(".tar"):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    if half or f"{stem}.parquet" in names or not status.st_mode & stat.S_IWUSR:
                        yield _Entry(status.st_mtime_ns, status.st_size, entry.path, half)

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        folder = self.root / FETCHING
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / name, "a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def _remove_unused(path: str) -> bool:
    """Remove a file unless somebody holds a lock on it."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True
    finally:
        os.close(handle)
    return True
