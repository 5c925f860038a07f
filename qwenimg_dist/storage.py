"""Objects of a bucket (`s3://...`): list, read, fetch, upload, remove, each tried again with bounded patience.

Place in the flow: `data/mirror.py` keeps data sets on it, `consumers/remote_checkpoints.py` copies of checkpoints,
`producers/sources` read tars. Built on fsspec and s3fs (extra `s3`). There is no rename in a bucket and none is needed:
a PUT is atomic, so whoever uploads the object that commits *last* commits by it, and `create=True` never overwrites.

An object is fetched in ranges, so that a fault repeats one range and not 5 GB; it must have the same ETag before and
after, and the size that was promised. A call that makes no headway for its time is given up and tried again.

Refused: credentials in a URL (they come from the environment or AWS configuration and stand in no config or log), and
schemes other than s3, where "never overwrite" is not proven; of S3 itself `Mirror.create_head` tries it out, as there
are other makers' stores that overwrite nonetheless.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from qwenimg_dist.debug import fault_point

_CHUNK_BYTES: Final = 16 * 1024**2
_PART_BYTES: Final = 32 * 1024**2
"""Of a multi-part upload; s3fs raises it where 10,000 parts would not do."""
_THREADS: Final = 4
_CONNECT_S: Final = 10
_SILENT_S: Final = 30
"""A connection that sends nothing for so long is given up by the client itself."""
_FOR_GOOD: Final = frozenset(
    {
        "NoCredentialsError",
        "PartialCredentialsError",
        "ProfileNotFound",
        "ParamValidationError",
        "InvalidRegionError",
        "NotImplemented",
        "KeyTooLongError",
        "MethodNotAllowed",
    }
)
_Result = TypeVar("_Result")


class StorageError(OSError):
    """The storage did not do what was asked for, after all tries; the message names the object and the last cause."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


class ObjectChangedError(StorageError):
    """An object is not the one that was committed."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a call may take and how often it is tried."""

    attempts: int = 13
    """With their waits about two minutes where a call is refused at once, as by a 503."""
    first_s: float = 0.5
    """Wait before the second try; doubles with each further one, up to `longest_s`, with jitter."""
    longest_s: float = 20.0
    call_s: float = 60.0
    """Of one call, and `slowest_bytes_s` besides for what it carries."""
    slowest_bytes_s: float = 256 * 1024

    def limit_s(self, num_bytes: int) -> float:
        return self.call_s + num_bytes / self.slowest_bytes_s

    def wait_s(self, attempt: int) -> float:
        """After the failed try number `attempt`, from 0. Ranks that fail together must not come back together."""
        longest = min(self.longest_s, self.first_s * 2.0**attempt)
        return longest * random.uniform(0.5, 1.0)


PATIENCE: Final = Patience()


@dataclass(frozen=True, kw_only=True)
class _Deadline:
    at: float
    """By the monotonic clock."""
    told: str
    """How long that was, and what sets it."""

    def left_s(self) -> float:
        return self.at - time.monotonic()


@dataclass(frozen=True, kw_only=True)
class Object:
    """One object as it is listed."""

    size_bytes: int
    etag: str
    modified_s: float
    """Seconds since 1970, by the storage's clock; 0 where it does not say."""


def is_remote(path: str | Path | None) -> bool:
    """Whether it is a URL of a storage, and not a path."""
    return path is not None and "://" in str(path) and not str(path).startswith("file://")


def check_url(url: str, key: str) -> str:
    """The URL without a slash at its end. Raises ValueError, naming the config key, for one that is refused."""
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query:
        raise ValueError(
            f"{key}: a URL must hold no credentials: take them out; they are read from the environment "
            "(AWS_ACCESS_KEY_ID, AWS_PROFILE, ...) or from the machine's role"
        )
    if parts.scheme != "s3":
        raise ValueError(f"{key}={url}: of URLs only s3://BUCKET/FOLDER is supported, also of other makers' storage")
    if not parts.netloc or not parts.path.strip("/"):
        raise ValueError(f"{key}={url}: name a bucket and a folder in it: s3://BUCKET/FOLDER")
    return url.rstrip("/")


class Storage:
    """A folder of a bucket; names are relative to it. Safe to use from several threads, and cheap to make."""

    def __init__(self, url: str, *, patience: Patience | None = None) -> None:
        self.url = url.rstrip("/")
        if not url.startswith("s3://") or "@" in urlsplit(url).netloc:
            check_url(url, "a URL")  # raises
        self.patience = patience or PATIENCE
        self._deadline: _Deadline | None = None
        self._root = self.url.removeprefix("s3://")
        self._fs = _file_system()

    def within(self, limit_s: float, set_by: str) -> Storage:
        """The same folder, for calls that together, with all their tries, may take so long from now on; then they raise
        `StorageError`, which names what sets the limit."""
        made = Storage(self.url, patience=self.patience)
        made._deadline = _Deadline(at=time.monotonic() + limit_s, told=f"within {limit_s:.0f} s ({set_by})")
        return made

    def where(self, name: str) -> str:
        return f"{self.url}/{name}"

    def list(self, folder: str = "", *, prefix: str = "") -> dict[str, Object]:
        """Name -> object of all that lies below `folder`, or there under names that begin with `prefix`."""
        path = f"{self._root}/{folder}".rstrip("/")
        options: dict[str, Any] = {"prefix": prefix} if prefix else {}

        def find() -> dict[str, Any]:
            self._fs.invalidate_cache()
            try:
                found: dict[str, Any] = self._call(self._fs._find, path, detail=True, **options)
            except FileNotFoundError:
                self._check_bucket()
                return {}
            return found

        found = self._patiently(f"list {folder or '.'}", find)
        return {
            name.removeprefix(f"{self._root}/"): _object(entry)
            for name, entry in sorted(found.items())
            if entry["type"] == "file" and not name.endswith("/")
        }

    def folders(self) -> set[str]:
        """Names of the folders right below."""

        def names() -> set[str]:
            try:
                entries = self._call(self._fs._ls, self._root, detail=True, refresh=True)
            except FileNotFoundError:
                return set()
            return {entry["name"].rpartition("/")[2] for entry in entries if entry["type"] == "directory"}

        return self._patiently("list folders", names)

    def look(self, name: str) -> Object | None:
        """The object, or None if there is none."""

        def info() -> Object | None:
            try:
                entry = self._call(self._fs._info, f"{self._root}/{name}", refresh=True)
            except FileNotFoundError:
                return None
            return _object(entry) if entry["type"] == "file" else None

        return self._patiently(f"look at {name}", info)

    def read(self, name: str) -> bytes:
        """A small object. Raises FileNotFoundError if there is none."""
        return self._patiently(f"read {name}", lambda: bytes(self._call(self._fs._cat_file, f"{self._root}/{name}")))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop), fewer at the object's end. Raises FileNotFoundError if there is none."""

        def get() -> bytes:
            path = f"{self._root}/{name}"
            try:
                return bytes(self._call(self._fs._cat_file, path, start=start, end=stop, num_bytes=stop - start))
            except OSError as error:
                if _code(error) == "InvalidRange":  # it ends before `start`
                    return b""
                raise

        return self._patiently(f"read {name}", get)

    def fetch(self, name: str, file: Path, *, size_bytes: int | None = None) -> None:
        """Copy an object to `file`, which appears whole or not at all only if the caller renames it: give a temporary.

        Fsynced. Raises FileNotFoundError if there is no such object, `ObjectChangedError` if it has another size than
        `size_bytes`, or was replaced meanwhile.
        """
        before = self.look(name)
        if before is None:
            raise FileNotFoundError(errno.ENOENT, "is not there", self.where(name))
        if size_bytes is not None and before.size_bytes != size_bytes:
            raise ObjectChangedError(
                errno.EBADMSG, f"has {before.size_bytes} bytes, {size_bytes} were committed", self.where(name)
            )
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.ftruncate(handle, before.size_bytes)
            starts = range(0, before.size_bytes, _CHUNK_BYTES)
            _together(lambda start: self._fetch_range(name, handle, start, before.size_bytes), starts)
            os.fsync(handle)
        finally:
            os.close(handle)
        after = self.look(name)
        if after is None or after.etag != before.etag:
            raise ObjectChangedError(errno.EBADMSG, "was replaced while it was read", self.where(name))

    def _fetch_range(self, name: str, handle: int, start: int, size_bytes: int) -> None:
        stop = min(start + _CHUNK_BYTES, size_bytes)

        def get() -> bytes:
            path = f"{self._root}/{name}"
            data = bytes(self._call(self._fs._cat_file, path, start=start, end=stop, num_bytes=stop - start))
            if len(data) != stop - start:
                raise OSError(errno.EIO, f"gave {len(data)} of {stop - start} bytes from {start} on", self.where(name))
            return data

        view = memoryview(self._patiently(f"read {name}", get))
        while view:
            done = os.pwrite(handle, view, stop - len(view))
            view = view[done:]

    def upload(self, file: Path, name: str) -> None:
        """Copy a file to an object, in parts if it is large. Nothing is visible of it before it is whole."""
        size = file.stat().st_size

        def put() -> None:
            fault_point("upload")
            path = f"{self._root}/{name}"
            self._call(self._fs._put_file, str(file), path, chunksize=_PART_BYTES, num_bytes=size)
            there = self.look(name)
            if there is None or there.size_bytes != size:
                raise OSError(errno.EIO, f"has {there and there.size_bytes} of {size} bytes", self.where(name))

        self._patiently(f"upload {name}", put)

    def write(self, name: str, data: bytes, *, create: bool = False) -> bool:
        """Make a small object. With `create`, one that is there already stays, and False is returned unless it is the
        same: a try whose answer was lost may have made it."""
        mode = "create" if create else "overwrite"

        def put() -> bool:
            try:
                self._call(self._fs._pipe_file, f"{self._root}/{name}", data, mode=mode, num_bytes=len(data))
            except OSError as error:
                if create and _code(error) == "PreconditionFailed":
                    return False
                raise
            return True

        return self._patiently(f"write {name}", put) or self.read(name) == data

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects, in this order; those that are gone are none."""
        for name in names:

            def delete(name: str = name) -> None:
                with contextlib.suppress(FileNotFoundError):
                    self._call(self._fs._rm_file, f"{self._root}/{name}")

            self._patiently(f"remove {name}", delete)

    def _check_bucket(self) -> None:
        """Raise FileNotFoundError if it is the bucket that is missing, and not only what was looked for in it."""
        bucket = self._root.partition("/")[0]
        self._call(self._fs._call_s3, "head_bucket", Bucket=bucket)

    def _call(self, method: Callable[..., Any], *args: Any, num_bytes: int = 0, **options: Any) -> Any:
        """One try, in its time."""
        from fsspec.asyn import sync

        limit_s = self.patience.limit_s(num_bytes)
        if self._deadline:
            limit_s = max(0.001, min(limit_s, self._deadline.left_s()))  # 0 would mean for ever
        return sync(self._fs.loop, method, *args, timeout=limit_s, **options)

    def _patiently(self, what: str, action: Callable[[], _Result]) -> _Result:
        """Raises FileNotFoundError as it comes, `StorageError` for what further tries cannot mend or did not."""
        for attempt in range(self.patience.attempts):
            try:
                return action()
            except FileNotFoundError as error:
                raise FileNotFoundError(errno.ENOENT, "is not there", f"{self.url} ({what})") from error
            except Exception as error:
                name = _code(error) or type(error).__name__
                hopeless = isinstance(error, PermissionError | TypeError) or name in _FOR_GOOD
                if hopeless or attempt + 1 == self.patience.attempts:
                    tries = "" if hopeless else f" after {attempt + 1} tries"
                    cause = str(error) or type(error).__name__
                    raise StorageError(
                        errno.EACCES if hopeless else errno.EIO, f"could not {what}{tries} ({cause})", self.url
                    ) from error
                wait_s = self.patience.wait_s(attempt)
                if self._deadline and self._deadline.left_s() <= wait_s:
                    cause = str(error) or type(error).__name__
                    raise StorageError(
                        errno.ETIMEDOUT, f"could not {what} {self._deadline.told} ({cause})", self.url
                    ) from error
                time.sleep(wait_s)
        raise AssertionError("the last try returns or raises")


def _file_system() -> Any:
    """One per process. Credentials, region and endpoint (`AWS_ENDPOINT_URL`) as every AWS client finds them."""
    try:
        import s3fs
    except ImportError as error:
        raise ValueError("s3:// needs the extra `s3`: pip install 'qwenimg-dist[s3]'") from error
    config = {
        "connect_timeout": _CONNECT_S,
        "read_timeout": _SILENT_S,
        "retries": {"mode": "standard", "total_max_attempts": 1},
        "max_pool_connections": 32,
    }
    client = s3fs.S3FileSystem(config_kwargs=config, use_listings_cache=False)
    client.retries = 4  # of a call, quickly, which mends single parts of an upload; the patience is ours
    return client


def _object(entry: dict[str, Any]) -> Object:
    modified: Any = entry.get("LastModified")
    return Object(
        size_bytes=int(entry["size"]),
        etag=str(entry.get("ETag") or ""),
        modified_s=modified.timestamp() if hasattr(modified, "timestamp") else 0.0,
    )


def _code(error: BaseException) -> str:
    """The storage's own word for an error."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    return str(response["Error"]["Code"]) if isinstance(response, dict) and "Error" in response else ""


def cause_of(error: StorageError) -> str:
    """The storage's own word for what went wrong, else the class of the client's error."""
    cause = error.__cause__
    return "" if cause is None else _code(cause) or type(cause).__name__


def _together(action: Callable[[int], None], items: Iterable[int]) -> None:
    todo = [*items]
    if len(todo) < 2:
        for item in todo:
            action(item)
        return
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="fetch") as pool:
        for _ in pool.map(action, todo):
            pass


def folder_of(url: str) -> str:
    """A directory name for what is kept of a URL on this machine."""
    return hashlib.sha256(url.encode()).hexdigest()[:16]
