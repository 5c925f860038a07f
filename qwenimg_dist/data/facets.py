"""The data set directory: facets, units and parts, and the one way to commit them.

A part is a parquet file `FACET/unit-NNNNNN.PPP.parquet` and the tars that it names. **A part exists if and only if
its parquet does**: tars are written under temporary names, fsynced and renamed; the parquet, which carries schema
version, config hash, and sha256 and size of each tar, is renamed into place last and never rewritten. Whoever dies in
between leaves only temporaries and unnamed tars, which nobody reads and `clean` removes.

Both sides use this file; it knows neither Ray nor torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from qwenimg_dist.data.errors import MENDING, LockedError
from qwenimg_dist.data.errors import DataError as DataError
from qwenimg_dist.data.mirror import Mirror
from qwenimg_dist.debug import fault_point
from qwenimg_dist.files import fsync_dir, temporary_name, write_json
from qwenimg_dist.patience import patiently
from qwenimg_dist.schema import IMAGE, LISTING, OPTIONAL_COLUMNS, SCHEMA_VERSION, Kind
from qwenimg_dist.storage import ObjectChangedError

_HELD: Final = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES})
_PART: Final = re.compile(r"^unit-(\d{6,})\.(\d{3,})\.parquet$")
_META_KEY: Final = b"qwenimg_dist"


@dataclass(frozen=True, kw_only=True)
class Tar:
    """A committed tar, as its part's parquet names it."""

    name: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True, order=True)
class Part:
    """One committed file of one unit of one facet."""

    facet: str
    unit: int
    part: int

    @property
    def stem(self) -> str:
        """File name without extension; tars of the part start with it."""
        return f"unit-{self.unit:06d}.{self.part:03d}"


class Dataset:
    """A data set directory. Cheap to make; nothing is remembered, every question is put to the file system anew."""

    def __init__(self, root: Path, unit_size: int, mirror: Mirror | None = None) -> None:
        self.root = root
        self.unit_size = unit_size
        self.mirror = mirror
        """Of a data set in a bucket, which `root` mirrors; None: it lies here."""

    @classmethod
    def open(cls, root: str | Path) -> Dataset:
        """Open an existing data set. Raises `DataError` if there is none, or one of another schema."""
        root = Path(root)
        file = root / "dataset.json"
        mirror = Mirror.of(root)
        if mirror is not None:
            mirror.fetch_head()
        if not file.is_file():
            where = mirror.url if mirror is not None else root
            raise DataError(f"{where} is not a data set (no dataset.json): run `qwenimg-dist produce` first")
        try:
            head = json.loads(file.read_text())
            version, unit_size = int(head["schema_version"]), int(head["unit_size"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file} is damaged ({error}); restore it from a backup") from error
        if version != SCHEMA_VERSION:
            raise DataError(f"{file} has schema version {version}, this program reads {SCHEMA_VERSION}")
        return cls(root, unit_size, mirror)

    @classmethod
    def is_there(cls, root: Path) -> bool:
        """Whether `open` would find one; of a mirror, in its bucket."""
        mirror = Mirror.of(root)
        return mirror.fetch_head() if mirror is not None else (root / "dataset.json").is_file()

    @classmethod
    def create(cls, root: str | Path, unit_size: int) -> Dataset:
        """Open, or make an empty one. Raises `DataError` if it exists with another unit size."""
        root = Path(root)
        if cls.is_there(root):
            existing = cls.open(root)
            if existing.unit_size != unit_size:
                raise DataError(
                    f"{root} has units of {existing.unit_size} rows, not {unit_size}: the size is fixed when a data "
                    f"set is made; set data.unit_size={existing.unit_size} or choose another data.path"
                )
            return existing
        root.mkdir(parents=True, exist_ok=True)
        head = {"schema_version": SCHEMA_VERSION, "unit_size": unit_size}
        mirror = Mirror.of(root)
        if mirror is not None:
            mirror.create_head(head)
        write_json(root / "dataset.json", head)
        return cls(root, unit_size, mirror)

    def refresh(self, *, insist: bool = True) -> None:
        """Of a mirror: bring what was committed by others here. Without `insist`, not more often than makes sense."""
        if self.mirror is not None:
            self.mirror.refresh(insist=insist)

    def refresh_unit(self, unit: int) -> None:
        """As `refresh`, one unit alone."""
        if self.mirror is not None:
            self.mirror.refresh_unit(unit)

    def facets(self) -> list[str]:
        """Names of the facets there are."""
        return sorted(d.name for d in self.root.iterdir() if d.is_dir() and not d.name.startswith((".", "_")))

    def parts(self, facet: str) -> list[Part]:
        """Committed parts of a facet, by unit and part."""
        folder = self.root / facet
        if not folder.is_dir():
            return []
        found = (_PART.match(name) for name in os.listdir(folder))
        return sorted(Part(facet=facet, unit=int(m[1]), part=int(m[2])) for m in found if m)

    def units(self, facet: str) -> list[int]:
        """Units of a facet that have at least one part, ascending."""
        return sorted({part.unit for part in self.parts(facet)})

    def parts_by_unit(self, facet: str) -> dict[int, list[Part]]:
        """A facet's committed parts by unit, ascending. Lists the folder once: for whoever walks all units."""
        by_unit: dict[int, list[Part]] = {}
        for part in self.parts(facet):
            by_unit.setdefault(part.unit, []).append(part)
        return by_unit

    def unit_parts(self, facet: str, unit: int) -> list[Part]:
        """Committed parts 0, 1, ... of one unit.

        Asks for names one by one: a unit's work must not cost more the more units there are.
        """
        parts: list[Part] = []
        while self.parquet(part := Part(facet=facet, unit=unit, part=len(parts))).exists():
            parts.append(part)
        return parts

    def kind(self) -> Kind | None:
        """Kind of the rows, as the first one listed says: a data set holds one kind. None before there is one."""
        first = Part(facet=LISTING, unit=0, part=0)
        if not self.parquet(first).exists():
            return None
        table = self.read(first, ["row", "kind"]).slice(0, 1)
        kind: Kind | None = table["kind"][0].as_py() if "kind" in table.column_names and len(table) else None
        return kind or IMAGE

    def next_part(self, facet: str, unit: int) -> Part:
        """The name of the part that would be committed next for this unit."""
        return Part(facet=facet, unit=unit, part=len(self.unit_parts(facet, unit)))

    def parquet(self, part: Part) -> Path:
        return self.root / part.facet / f"{part.stem}.parquet"

    def tar(self, facet: str, name: str) -> Path:
        return self.root / facet / name

    def tar_bytes(self, facet: str, name: str) -> int:
        """Size of a tar, in its bucket if it has one. Raises OSError if it is not there."""
        if self.mirror is None:
            return os.stat(self.tar(facet, name)).st_size
        size = self.mirror.tar_bytes(f"{facet}/{name}")
        if size is None:
            raise FileNotFoundError(errno.ENOENT, f"is not in {self.mirror.url}", f"{facet}/{name}")
        return size

    @contextlib.contextmanager
    def held_tar(self, facet: str, tar: Tar) -> Iterator[Path]:
        """While a tar is here, brought from its bucket if need be. One that is missing there is missing here."""
        with contextlib.ExitStack() as stack:
            if self.mirror is not None:
                with contextlib.suppress(FileNotFoundError, ObjectChangedError):
                    stack.callback(os.close, self.mirror.tars.open(f"{facet}/{tar.name}", tar.size_bytes))
            yield self.tar(facet, tar.name)

    def put_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write one of the few files of a data set that may change."""
        write_json(self.root / name, content)
        if self.mirror is not None:
            self.mirror.push_file(name)

    def drop(self, name: str) -> None:
        """Remove such a file."""
        if self.mirror is not None:
            self.mirror.drop_file(name)
        (self.root / name).unlink(missing_ok=True)
        fsync_dir(self.root)

    def read(self, part: Part, columns: Sequence[str] | None = None) -> pa.Table:
        """The part's table; `OPTIONAL_COLUMNS` that it was written without are left out. Raises `DataError` naming the
        file if it cannot be read."""
        file = self.parquet(part)
        try:
            if columns is not None and not OPTIONAL_COLUMNS.isdisjoint(columns):
                there = patiently(lambda: pq.read_schema(file, memory_map=True), str(file)).names
                columns = [name for name in columns if name in there or name not in OPTIONAL_COLUMNS]
            wanted = list(columns) if columns is not None else None
            return patiently(lambda: pq.read_table(file, columns=wanted, memory_map=True), str(file))
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{file} cannot be read ({error}): {MENDING}") from error

    def meta(self, part: Part) -> dict[str, Any]:
        """What was committed with the part: schema_version, config_hash, tars, and the writer's own entries."""
        file = self.parquet(part)
        try:
            raw = (patiently(lambda: pq.read_schema(file), str(file)).metadata or {})[_META_KEY]
            return dict(json.loads(raw))
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:
            raise DataError(f"{file} has no readable commit record ({error})") from error

    def tars(self, part: Part) -> list[Tar]:
        """The tars of a part, with size and sha256 as committed."""
        return [Tar(**entry) for entry in self.meta(part).get("tars", [])]

    def read_unit(self, facet: str, unit: int, columns: Sequence[str] | None = None) -> pa.Table | None:
        """All parts of a unit merged (a later part supersedes earlier rows of the same key column); None if absent."""
        parts = self.unit_parts(facet, unit)
        return self.merge(parts, columns) if parts else None

    def merge(self, parts: Sequence[Part], columns: Sequence[str] | None = None) -> pa.Table:
        """Tables of several parts of one unit, later ones superseding earlier ones, sorted by row (or key)."""
        tables = [self.read(part, columns) for part in parts]
        merged = pa.concat_tables(tables, promote_options="default")
        by = "row" if "row" in merged.column_names else "key"
        if len(tables) == 1:
            return merged
        last: dict[Any, int] = {}
        for position, value in enumerate(merged.column(by).to_pylist()):
            last[value] = position
        return merged.take(pa.array(sorted(last.values()))).sort_by(by)

    def commit(
        self,
        part: Part,
        table: pa.Table,
        *,
        config_hash: str,
        tars: Sequence[Tar] = (),
        extra: Mapping[str, Any] | None = None,
    ) -> bool:
        """Make a part exist. Its tars must already be in place (`shards.ShardWriter.close`).

        Returns False, changing nothing, if the part exists already: the same unit finished twice is not an error.
        """
        file = self.parquet(part)
        file.parent.mkdir(parents=True, exist_ok=True)
        meta = {
            **(extra or {}),
            "schema_version": SCHEMA_VERSION,
            "config_hash": config_hash,
            "tars": [asdict(tar) for tar in tars],
        }
        stamped = table.replace_schema_metadata({_META_KEY: json.dumps(meta, sort_keys=True).encode()})
        temporary = temporary_name(file)
        try:
            with open(temporary, "wb") as sink:
                pq.write_table(stamped, sink, compression="zstd")
                sink.flush()
                os.fsync(sink.fileno())
            fault_point("part_commit")
            if self.mirror is not None and not self.mirror.commit(
                f"{part.facet}/{file.name}", temporary, [tar.name for tar in tars]
            ):
                return False
            try:
                os.link(temporary, file)  # fails if it exists, where rename would overwrite
            except FileExistsError:
                return self.mirror is not None  # a look at the bucket brought what was just committed
            fsync_dir(file.parent)
            if self.mirror is not None:
                self.mirror.tars.trim()
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def strays(self, broken: Collection[Part] = ()) -> list[Path]:
        """Temporaries, and tars that no committed part names: what a killed writer left. Parts in `broken` may have no
        readable record: tars under their names are taken for theirs."""
        stray: list[Path] = []
        for facet in self.facets():
            named = {tar.name for part in self.parts(facet) if part not in broken for tar in self.tars(part)}
            owned = tuple(f"{part.stem}-" for part in broken if part.facet == facet)
            for file in sorted((self.root / facet).iterdir()):
                loose = file.suffix == ".tar" and file.name not in named and not file.name.startswith(owned)
                if loose or file.name.startswith(".tmp-"):
                    stray.append(file)
        return stray

    def clean(self) -> list[Path]:
        """Remove strays. Only for the one producer that holds `lock`."""
        stray = self.strays()
        for file in stray:
            file.unlink(missing_ok=True)
        return stray

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the producer's lock. Raises `DataError` if another `produce` works here."""
        with hold_lock(self.root / ".produce.lock", f"another `produce` is working on {self.root}"):
            yield


@contextlib.contextmanager
def hold_lock(file: Path, message: str) -> Iterator[None]:
    """An advisory lock that the operating system drops when the process dies. Raises `LockedError(message)` where
    another process holds it, `DataError` where the file system gives no locks."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a") as handle:
        take_lock(handle, message)
        yield


def take_lock(handle: IO[str], message: str) -> None:
    """Lock an open file, without waiting, until it is closed; raises as `hold_lock`."""
    file = Path(handle.name)
    try:
        patiently(lambda: fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB), str(file))
    except OSError as error:
        if error.errno in _HELD:
            raise LockedError(f"{message} (lock {file}); wait for it, or end it first") from error
        raise DataError(
            f"{file.parent} is on a file system that gives no locks ({error.strerror}), by which two commands at work "
            "on it notice each other: mount it with them (Lustre: option flock; NFS: without nolock), or take another "
            "directory"
        ) from error
