"""A data set in a bucket, as it is seen on this machine: a directory like any other, which says what it mirrors.

Place in the flow: `data.path=s3://BUCKET/FOLDER` becomes a directory below `data.cache` (`data_root`) with the file
`.remote.json` in it; everything that opens data sets opens that directory, and `Dataset` finds its mirror by the file.
Producers and consumers stay as they are; what differs is here:

- **A part exists if and only if its parquet is in the bucket.** `commit` uploads the tars, then the parquet, under the
  condition that there is none; only then does it appear in the directory. A process that is killed between leaves tars
  that no parquet names, which `clean` removes once they are a day old: a living writer's are younger.
- `refresh` brings the parquets here: rows last, since a unit's newest rows part names all others.
- Tars come when they are read, whole (`TarCache`), and go again by the limit.

Refused: a committed object that is not what it was, and a bucket folder that holds another data set than before.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from qwenimg_dist.config.data import DataConfig
from qwenimg_dist.data.errors import DataError
from qwenimg_dist.data.tar_cache import FETCHING, TarCache
from qwenimg_dist.debug import fault_point
from qwenimg_dist.files import write_json
from qwenimg_dist.schema import ROWS, SOURCE_COMPLETE
from qwenimg_dist.storage import Object, Storage, check_url, folder_of, is_remote

FILE: Final = ".remote.json"
HEAD: Final = "dataset.json"
CACHE_VARIABLE: Final = "QWENIMG_DIST_CACHE"
_PARQUET: Final = re.compile(r"^[^/]+/unit-\d{6,}\.\d{3,}\.parquet$")
_TAR: Final = re.compile(r"^[^/]+/unit-\d{6,}\.[^/]+\.tar$")
_THREADS: Final = 16
_REFRESH_S: Final = 5.0
"""A look at the bucket is not repeated sooner where nobody insists."""
STRAY_S: Final = 24 * 3600.0
"""Younger tars may be those of a part that is about to be committed."""
_CLOCK: Final = ".clock"


def data_dir(path: str, data: DataConfig) -> Path:
    """The directory of a data set: the path itself, or for a URL where its mirror is or would be. Makes nothing."""
    return _cache_dir(data) / f"data-{folder_of(check_url(path, 'data.path'))}" if is_remote(path) else Path(path)


def data_root(path: str, data: DataConfig, at: Path | None = None) -> Path:
    """`data_dir` (or `at`, if that is known), made if it is a mirror that is not there.

    Raises ValueError for a URL that is refused.
    """
    root = at or data_dir(path, data)
    if not is_remote(path):
        return root
    url = check_url(path, "data.path")
    content = {"url": url, "max_bytes": data.cache_bytes}
    if _read_json(root / FILE) != content:
        write_json(root / FILE, content)
    return root


def _cache_dir(data: DataConfig) -> Path:
    if data.cache:
        return Path(data.cache).absolute()
    home = os.environ.get(CACHE_VARIABLE)
    return Path(home).absolute() if home else Path.home() / ".cache" / "qwenimg-dist"


@dataclass
class Mirror:
    """The mirror of one data set on this machine. Several processes of the machine may have one each."""

    root: Path
    url: str
    max_bytes: int
    _refreshed: float = float("-inf")
    _sizes: dict[str, int] | None = None

    @classmethod
    def of(cls, root: Path) -> Mirror | None:
        """The mirror that a directory is; None for a data set of this file system."""
        tree = _read_json(root / FILE)
        return cls(root=root, url=tree["url"], max_bytes=tree["max_bytes"]) if tree else None

    @cached_property
    def storage(self) -> Storage:
        return Storage(self.url)

    @cached_property
    def tars(self) -> TarCache:
        return TarCache(self.root, self.storage, self.max_bytes)

    def fetch_head(self) -> bool:
        """Bring `dataset.json` here; False if the bucket has none. Raises `DataError` if it is another data set now."""
        try:
            content = self.storage.read(HEAD)
        except FileNotFoundError:
            return False
        file = self.root / HEAD
        if not file.is_file():
            _put(file, content)
        elif json.loads(content) != json.loads(file.read_text()):
            raise DataError(f"{self.url} holds another data set than {self.root} mirrors: remove that directory")
        return True

    def create_head(self, content: dict[str, Any]) -> None:
        """Make the data set exist. Raises `DataError` if another process made another one meanwhile, or if the store
        lets commits overwrite each other."""
        self._prove_conditional_writes()
        data = json.dumps(content, indent=1, sort_keys=True).encode() + b"\n"
        if not self.storage.write(HEAD, data, create=True) and json.loads(self.storage.read(HEAD)) != content:
            raise DataError(f"{self.url} was made meanwhile, as another data set: run the same command again")

    def _prove_conditional_writes(self) -> None:
        name = f".probe-{uuid.uuid4().hex}"
        try:
            made = self.storage.write(name, b"a", create=True)
            overwritten = self.storage.write(name, b"b", create=True)
        finally:
            self.storage.remove([name])
        if not made or overwritten:
            raise DataError(
                f"{self.url}: this store overwrites an object that a PUT with If-None-Match must leave alone, and two "
                "producers could mix their parts: use a store with conditional writes (AWS S3, newer MinIO or Ceph), "
                "or give a directory as data.path"
            )

    # ---- Parts

    def refresh(self, *, insist: bool = True) -> None:
        """Bring all parquets, and the mark of a finished source, here. Raises `DataError` for one that changed."""
        if not insist and time.monotonic() - self._refreshed < _REFRESH_S:
            return
        with self._pulling():
            here = self._parquets_here()
            # The order of readers: the mark before the units, the rows parts before what they name. A part that is
            # committed between two looks is then never half seen.
            self.pull_file(SOURCE_COMPLETE)
            rows = self.storage.list(ROWS)
            there = self.storage.list()
            self._pull({name: one for name, one in there.items() if not name.startswith(f"{ROWS}/")})
            self._pull(rows)
            for name in here - there.keys():  # removed from the bucket: what is left here is no commit
                (self.root / name).unlink(missing_ok=True)
            self._sizes = {name: one.size_bytes for name, one in there.items() if _TAR.match(name)}
        self._refreshed = time.monotonic()

    def refresh_unit(self, unit: int) -> None:
        """Bring the parquets of one unit here."""
        facets = {name for name in self.storage.folders() if not name.startswith((".", "_"))}
        for of_rows in (False, True):
            for facet in sorted(facet for facet in facets if (facet == ROWS) == of_rows):
                self._pull(self.storage.list(facet, prefix=f"unit-{unit:06d}."))

    def commit(self, name: str, file: Path, tars: Iterable[str]) -> bool:
        """Upload a part's tars and then its parquet (`FACET/NAME`, lying in `file`). False if the part exists; the one
        that does is here then."""
        facet, tars = name.partition("/")[0], [*tars]
        for tar in tars:
            self.storage.upload(self.root / facet / tar, f"{facet}/{tar}")
        fault_point("upload_commit")
        made = self.storage.write(name, file.read_bytes(), create=True)
        if not made:
            self.storage.remove(f"{facet}/{tar}" for tar in tars)
            winner = self.storage.look(name)
            self._pull({name: winner} if winner is not None else {})
        return made

    def tar_bytes(self, name: str) -> int | None:
        """Size of the tar `FACET/NAME` in the bucket; None if it is not there."""
        if self._sizes is None or name not in self._sizes:
            self._sizes = {key: one.size_bytes for key, one in self.storage.list().items() if _TAR.match(key)}
        return self._sizes.get(name)

    def clean(self) -> None:
        """Remove tars from the bucket that no parquet names and nobody can still be about to name. Asks what a parquet
        names only where tars of several tries lie beside it."""
        there = self.storage.list()
        tries: dict[str, dict[str, list[str]]] = {}
        for name in there:
            if _TAR.match(name):
                one_try = name.rpartition("-")[0]
                tries.setdefault(one_try.rpartition("-")[0], {}).setdefault(one_try, []).append(name)
        strays: list[str] = []
        for stem, of_part in tries.items():
            named: set[str] = set()
            if f"{stem}.parquet" in there:
                if len(of_part) == 1:
                    continue
                named = _tars_named_by(self.storage.read(f"{stem}.parquet"), stem.partition("/")[0])
            strays += [name for names in of_part.values() for name in names if name not in named]
        if not strays:
            return
        # By the storage's own clock: this machine's may be wrong.
        self.storage.write(_CLOCK, b"")
        now = self.storage.look(_CLOCK)
        if now is not None and now.modified_s:
            self.storage.remove(name for name in strays if now.modified_s - there[name].modified_s > STRAY_S)

    # ---- Files that change

    def push_file(self, name: str) -> None:
        """Upload a file as it is here."""
        self.storage.write(name, (self.root / name).read_bytes())

    def drop_file(self, name: str) -> None:
        self.storage.remove([name])

    def pull_file(self, name: str) -> None:
        """Bring a file here as it is in the bucket."""
        try:
            _put(self.root / name, self.storage.read(name))
        except FileNotFoundError:
            (self.root / name).unlink(missing_ok=True)

    # ---- Inside

    def _pull(self, objects: dict[str, Object]) -> None:
        """Fetch the parquets among these that are not here."""
        missing = []
        for name, one in objects.items():
            if not _PARQUET.match(name):
                continue
            try:
                size = (self.root / name).stat().st_size
            except FileNotFoundError:
                missing.append(name)
                continue
            if size != one.size_bytes:
                raise DataError(
                    f"{self.url}/{name} has {one.size_bytes} bytes, {size} when it was committed: parts never change. "
                    f"Restore it in the bucket, or, if the data set was made anew there, remove {self.root}"
                )
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="mirror") as pool:
            for _ in pool.map(self._fetch_parquet, missing):
                pass

    def _fetch_parquet(self, name: str) -> None:
        _put(self.root / name, self.storage.read(name))

    def _parquets_here(self) -> set[str]:
        folders = (entry.name for entry in os.scandir(self.root) if entry.is_dir())
        names = (f"{folder}/{file}" for folder in folders for file in os.listdir(self.root / folder))
        return {name for name in names if _PARQUET.match(name)}

    @contextlib.contextmanager
    def _pulling(self) -> Iterator[None]:
        """One process of the machine at a time: the others then find what it brought."""
        (self.root / FETCHING).mkdir(parents=True, exist_ok=True)
        with open(self.root / FETCHING / ".pull.lock", "a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def tar_cache_of(folder: Path) -> TarCache | None:
    """The cache that a tar lies in, by the tar's folder; None for a data set of this file system."""
    mirror = Mirror.of(folder.parent)
    return mirror.tars if mirror else None


def _tars_named_by(parquet: bytes, facet: str) -> set[str]:
    meta = json.loads(pq.read_schema(pa.BufferReader(parquet)).metadata[b"qwenimg_dist"])
    return {f"{facet}/{tar['name']}" for tar in meta.get("tars", [])}


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}): remove {file.parent}, it is made again") from error
    return tree if isinstance(tree, dict) else None


def _put(file: Path, content: bytes) -> None:
    """Make a file appear whole, over an older one. Durable, since it stands for what is committed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.parent / f".get-{file.name}-{uuid.uuid4().hex[:8]}"
    try:
        with open(temporary, "wb") as sink:
            sink.write(content)
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
