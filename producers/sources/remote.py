"""Sources on `s3://`: which tars there are, a file brought here while it is gone through, single pictures by range.

Place in the flow: `webdataset.py` and `manifest.py` list through this, workers read pictures (`base.read_bytes`). A tar
is streamed to a temporary once per process, since its headers lie all over it; a picture in it is then one request of
just its bytes. A bucket that cannot be reached is the source that is gone (`SourceGoneError` in `base.py`), not a fault
of any row; one object that a bucket refuses is the fault of its row. Refused: what `storage.check_url` refuses, and a
tar that was written anew since it was listed.
"""

from __future__ import annotations

import errno
import fnmatch
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from producers.sources import tars
from qwenimg_dist.storage import Object, Storage, StorageError, cause_of

_OF_ONE_OBJECT: Final = frozenset(
    {"InvalidObjectState", "KeyTooLongError", "MethodNotAllowed", "InvalidBucketName", "ParamValidationError"}
)
"""Archived, deleted, or named as nothing can be."""
_DENIED: Final = frozenset({"AccessDenied", "403"})
"""Of one object, or of a missing one where listing is not allowed; or of all, for want of rights."""
_giving: set[str] = set()
"""Buckets that gave something to this process."""


def split(url: str) -> tuple[str, str]:
    """(folder, name) of an object's URL."""
    folder, _, name = url.rpartition("/")
    return folder, name


def matching(pattern: str, folder: str) -> dict[str, Object]:
    """URL -> object of the tars that a folder's URL, or a glob below `folder`, names; sorted."""
    whole = pattern == folder
    wanted = f"{folder}/*.tar" if whole else pattern
    found = {f"{folder}/{name}": one for name, one in Storage(folder).list().items()}
    return {
        url: one
        for url, one in sorted(found.items())
        if url.count("/") == wanted.count("/") and fnmatch.fnmatchcase(url, wanted)
    }


@contextmanager
def brought_here(url: str) -> Iterator[Path]:
    """A file of this machine with the object's content, while it is gone through."""
    folder, name = split(url)
    with tempfile.TemporaryDirectory(prefix="qwenimg-dist-") as here:
        file = Path(here) / name
        Storage(folder).fetch(name, file)
        yield file


class Brought:
    """The object that was brought here last, for as long as no other is, so that a first look into a tar and the walk
    through it need it once."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._what: tuple[str, Any] | None = None
        self._file = Path()

    def get(self, url: str, state: Any) -> Path:
        """A file of this machine; the one that is here if it is of this URL in this state."""
        if self._what != (url, state):
            self.let_go()
            self._file = self._stack.enter_context(brought_here(url))
            self._what = (url, state)
        return self._file

    def let_go(self) -> None:
        self._what = None
        self._stack.close()


def read(url: str) -> bytes:
    """A picture. Raises FileNotFoundError if there is none, another OSError if the storage refuses this one alone, and
    `StorageError` if the storage cannot be reached."""
    folder, name = split(url)
    with _blaming(url):
        return Storage(folder).read(name)


def read_member(url: str, uri: str) -> bytes:
    """A picture in the tar at `url`, by the range in its uri. Raises as `read`; FileNotFoundError also if it is not in
    that place now."""
    folder, name = split(url)
    with _blaming(url):
        return tars.member_of_range(uri, lambda start, stop: Storage(folder).read_range(name, start, stop), url)


@contextmanager
def _blaming(url: str) -> Iterator[None]:
    """Whether it is this object that cannot be read, or all of them."""
    folder, name = split(url)
    if not name:
        raise FileNotFoundError(errno.ENOENT, "is the name of no object", url)
    bucket = url.removeprefix("s3://").partition("/")[0]
    try:
        yield
    except StorageError as error:
        cause = cause_of(error)
        if cause in _OF_ONE_OBJECT or (cause in _DENIED and (bucket in _giving or _can_list(folder, name))):
            raise OSError(errno.EACCES, cause, url) from error
        raise
    _giving.add(bucket)


def _can_list(folder: str, name: str) -> bool:
    try:
        Storage(folder).list(prefix=name)
    except OSError:
        return False
    return True
