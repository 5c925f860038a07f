"""Pictures behind URLs that fsspec reads, other than s3://: which URLs there can be, and one picture's bytes.

Place in the flow: tables of uris ask `check` of each while they are listed, so that a mistyped scheme is a bad row, and
a driver that is not installed an error before anything is written; workers read with `read` (`base.read_bytes`). A
picture is one request. What a server refuses for the moment, or breaks off, is asked for again a few times, but not
where it has given nothing for a while, and one that cannot be reached is left alone for half a minute: a server that is
down must not cost its time-outs for every picture of a unit.

Refuses nothing by itself: a 404 or 410 is FileNotFoundError (it is not there), all else that goes wrong an OSError of
this one picture. s3:// has patience of its own (`remote.py`).
"""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections import Counter
from functools import lru_cache
from typing import Any, Final
from urllib.parse import urlsplit

_HTTP: Final = ("http", "https")
_TRIES: Final = 3
_FIRST_WAIT_S: Final = 0.5
"""Before the second try; four times that before the third."""
_SILENT_S: Final = 30.0
_CONNECT_S: Final = 10.0
_WHOLE_S: Final = 300.0
_PATIENT: Final = 3
"""After so many pictures in a row that no try could read, their server gets one try for each."""
_PASSING: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_GONE: Final = (404, 410)
_BROKEN_OFF: Final = ("ServerDisconnectedError", "ClientPayloadError", "ClientOSError", "ConnectionResetError")
"""aiohttp's names for an answer that ended too soon; aiohttp itself is only there where a URL needs it."""
_MANY: Final = 0.01
"""Share of the rows from which on a driver that is not installed is no matter of single rows."""

_SILENT_PICTURES: Final = 10
"""After so many in a row, a server that cannot be reached is not asked for `_LEFT_ALONE_S`."""
_LEFT_ALONE_S: Final = 30.0

_lock = threading.Lock()
_in_vain: Counter[str] = Counter()
"""Server -> pictures in a row that no try could read."""
_left_alone: dict[str, float] = {}
"""Server -> until when (monotonic seconds) it is not asked."""


class NoDriverError(ValueError):
    """A URL of a kind that fsspec could read, were a package installed."""

    def __init__(self, scheme: str, why: str) -> None:
        super().__init__(f"{scheme}:// cannot be read here: {why}")
        self.scheme = scheme


class NoDrivers:
    """Counts rows whose URLs lack a driver, while the table `where` is looked through."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._rows: Counter[str] = Counter()
        self._why: dict[str, str] = {}

    def clear(self) -> None:
        """Before each look."""
        self._rows.clear()

    def add(self, error: NoDriverError) -> None:
        self._rows[error.scheme] += 1
        self._why[error.scheme] = str(error)

    def refuse(self, num_rows: int) -> None:
        """Raises ValueError if so many rows want a driver that it is rather the driver that is wrong than the rows."""
        for scheme, number in self._rows.items():
            if number > _MANY * num_rows:
                raise ValueError(
                    f"{self._where}: {number} of {num_rows} rows name {scheme}:// pictures. {self._why[scheme]} (on "
                    "every machine with producers)"
                )


def check(uri: str) -> None:
    """Raises ValueError for a URL that nothing reads, `NoDriverError` where a package is missing for it. What is no URL
    passes."""
    if "://" not in uri:
        return
    for link in uri.split("::"):  # zip://a.jpg::https://host/b.zip
        scheme = link.partition("://")[0] if "://" in link else link
        _driver(scheme)
        if scheme in _HTTP:
            _check_host(link)


def check_root(root: str) -> None:
    """Raises ValueError for a `source.root` that nothing reads."""
    try:
        check(root)
    except ValueError as error:
        raise ValueError(f"source.root={root}: {error}") from error


def read(url: str) -> bytes:
    """The picture. Raises FileNotFoundError if it is not there, and OSError for whatever else."""
    server = _server(url)
    if time.monotonic() < _left_alone.get(server, 0.0):
        raise OSError(errno.EIO, f"{server} could not be reached {_in_vain[server]} times and is left alone", url)
    tries = _TRIES if _in_vain[server] < _PATIENT else 1
    for attempt in range(tries):
        try:
            data = _get(url)
        except _PassingError as error:
            if attempt + 1 < tries:
                time.sleep(_FIRST_WAIT_S * 4**attempt * random.uniform(0.5, 1.0))
                continue
            _note_failure(server, reached=error.reached)
            raise OSError(errno.EIO, str(error), url) from error
        with _lock:
            _in_vain.pop(server, None)
        return data
    raise AssertionError("the last try returns or raises")


def _note_failure(server: str, *, reached: bool) -> None:
    with _lock:
        _in_vain[server] += 1
        if not reached and _in_vain[server] >= _SILENT_PICTURES:
            _left_alone[server] = time.monotonic() + _LEFT_ALONE_S


class _PassingError(Exception):
    """Worth another try. `reached`: the server answered something."""

    def __init__(self, told: str, *, reached: bool) -> None:
        super().__init__(told)
        self.reached = reached


def _get(url: str) -> bytes:
    """One try."""
    try:
        if url.startswith(tuple(f"{scheme}://" for scheme in _HTTP)):
            return bytes(_http(os.getpid()).cat_file(url))
        from fsspec.core import url_to_fs

        system, path = url_to_fs(url)
        return bytes(system.cat_file(path))
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # each driver has its own
        raise _as_one_of_ours(error, url) from error


def _as_one_of_ours(error: Exception, url: str) -> Exception:
    status = getattr(error, "status", None)  # of aiohttp's ClientResponseError
    if isinstance(status, int):
        said = f"HTTP {status} {getattr(error, 'message', '')}".strip()
        if status in _GONE:
            return FileNotFoundError(errno.ENOENT, said, url)
        return _PassingError(said, reached=True) if status in _PASSING else OSError(errno.EACCES, said, url)
    if isinstance(error, TimeoutError):
        return _PassingError(f"no answer for {_SILENT_S:g} s", reached=False)
    name, why = type(error).__name__, (getattr(error, "strerror", None) or str(error)).partition("\n")[0][:160]
    told = f"{name}: {why}" if why else name
    if name in _BROKEN_OFF:
        return _PassingError(told, reached=True)
    if isinstance(error, ConnectionError) or "Connect" in name:
        return _PassingError(told, reached=False)
    return OSError(errno.EIO, told, url)


@lru_cache(maxsize=1)
def _http(process: int) -> Any:
    """One per process, with time-outs: fsspec's own would wait five minutes for a silent server."""
    import aiohttp
    from fsspec.implementations.http import HTTPFileSystem

    patience = aiohttp.ClientTimeout(total=_WHOLE_S, sock_connect=_CONNECT_S, sock_read=_SILENT_S)
    return HTTPFileSystem(client_kwargs={"timeout": patience})


def _server(url: str) -> str:
    parts = url.partition("://")
    return f"{parts[0]}://{parts[2].partition('/')[0]}"


@lru_cache(maxsize=256)
def _driver(scheme: str) -> None:
    """Raises as `check`."""
    import fsspec

    try:
        if not scheme:
            raise ValueError("fsspec would take it for a path")
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        why = "pip install 'qwenimg-dist[s3]'" if scheme in ("s3", "s3a") else str(error).partition("\n")[0]
        raise NoDriverError(scheme, why) from error
    except ValueError as error:
        raise ValueError(f"nothing reads {scheme[:20]}:// URLs (there are https://, s3://, gs://, ...)") from error


def _check_host(link: str) -> None:
    try:
        host = urlsplit(link).hostname
    except ValueError:
        host = None
    if not host:
        raise ValueError(f"{link[:60]!a} names no host")
