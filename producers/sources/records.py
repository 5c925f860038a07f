"""Tables of rows with pictures: `.jsonl` and `.parquet` files, one or a folder of them, read row by row.

Place in the flow: `pairs`, `edits` and `prompts` make their rows of these. A picture is named by a uri in the table, or
lies in the table itself (a parquet column of bytes, or of `{bytes, path}` as Hugging Face datasets write them): then it
gets the uri of its cell and is not read here, so that listing a terabyte costs no more than its captions. Refuses
columns that are not there, naming file and what there is; a single row that is none becomes a `bad_row`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from producers.sources import parquet_cells, urls
from producers.sources.bad_rows import bad_row
from producers.sources.base import SourceRow, encode_uri
from producers.sources.jsonl import read_jsonl
from qwenimg_dist.schema import Kind

SUFFIXES: Final = (".jsonl", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One row of a table."""

    where: str
    """`FILE, line 3`: begins every message about the row."""
    values: Mapping[str, Any]
    cells: Mapping[str, tuple[str, ...]]
    """Column of pictures -> uris of the cells of this row."""
    file: str
    """Name of the table, relative to the folder."""
    content: bytes
    """The line, or what stands for the row."""
    no_drivers: urls.NoDrivers
    """Hears of URLs that lack a driver."""
    broken: str | None = None
    """Why the line is no JSON object."""

    def row(self, make: Callable[[Record], SourceRow], kind: Kind) -> SourceRow:
        """The row that `make` gives, or a `bad_row` where it raises ValueError."""
        try:
            if self.broken is not None:
                raise ValueError(f"{self.where}: {self.broken}; correct the line")
            return make(self)
        except ValueError as error:
            return bad_row(self.file, self.content, str(error), kind)

    def text(self, column: str) -> Any:
        return self.values.get(column)

    def pictures(self, column: str) -> tuple[str, ...]:
        """Uris of the column's pictures, at least one. Raises ValueError naming file and row."""
        if column in self.cells:
            uris: Sequence[Any] = self.cells[column]
        else:
            value = self.values.get(column)
            uris = value if isinstance(value, list) else [value]
        if not uris or not all(isinstance(uri, str) and uri for uri in uris):
            there = ", ".join([*self.values, *self.cells]) or "nothing"
            raise ValueError(
                f"{self.where}: has no picture in {column!r} (there is: {there}); correct it, or name another column"
            )
        if column in self.cells:
            return tuple(uris)
        try:
            for uri in uris:
                urls.check(uri)
            return tuple(encode_uri(uri) for uri in uris)
        except ValueError as error:
            if isinstance(error, urls.NoDriverError):
                self.no_drivers.add(error)
            raise ValueError(f"{self.where}: {error}; correct it") from error

    def picture(self, column: str) -> str:
        """Uri of the column's one picture."""
        uris = self.pictures(column)
        if len(uris) > 1:
            raise ValueError(f"{self.where}: {column!r} names {len(uris)} pictures, one is wanted")
        return uris[0]

    def meta(self, columns: Sequence[str]) -> str | None:
        """These columns as JSON; None if no column is asked for."""
        if not columns:
            return None
        return json.dumps({name: self.values.get(name) for name in columns}, sort_keys=True, default=str)


class Records:
    """The rows of `path`, in the order of file names and then of the files."""

    def __init__(self, path: str | None, root: str | None, source: str) -> None:
        if not path:
            raise ValueError(f"source.path is not set: add source.path=FILE or FOLDER ({source}: .jsonl or .parquet)")
        self._path = Path(path.removeprefix("file://")).expanduser()
        folder = self._path if self._path.suffix not in SUFFIXES else self._path.parent
        self._folder = folder
        self.root = root if root is not None else str(folder)
        urls.check_root(self.root)
        self.no_drivers = urls.NoDrivers(path)

    def files(self) -> list[Path]:
        """The tables there are. Raises ValueError if there is none."""
        if self._path.suffix in SUFFIXES:
            if not self._path.is_file():
                raise ValueError(f"source.path={self._path} is not a file that can be read")
            return [self._path]
        if not self._path.is_dir():
            raise ValueError(f"source.path={self._path}: is neither a folder nor a {' or '.join(SUFFIXES)} file")
        found = sorted(file for file in self._path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not found:
            raise ValueError(f"source.path={self._path} holds no {' or '.join(SUFFIXES)} file")
        return found

    def columns(self) -> list[str]:
        """Columns of the first table; of a jsonl file, those of its first line."""
        first = self.files()[0]
        if first.suffix == ".parquet":
            with _open(first) as file:
                return list(file.schema_arrow.names)
        return next((list(line.entry) for line in read_jsonl(first) if line.broken is None), [])

    def read(self, columns: Sequence[str], *, optional: Sequence[str] = (), growing: bool = False) -> Iterator[Record]:
        """Every row, with these columns; see `read_jsonl` for `growing`. Raises ValueError naming the file that cannot
        be read or lacks one."""
        for file in self.files():
            if file.suffix == ".parquet":
                yield from self._parquet(file, columns, optional)
            else:
                for line in read_jsonl(file, growing=growing):
                    yield Record(
                        where=f"{file}, line {line.number}",
                        values=line.entry,
                        cells={},
                        file=str(file.relative_to(self._folder)),
                        content=line.raw,
                        no_drivers=self.no_drivers,
                        broken=line.broken,
                    )

    def _parquet(self, path: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[Record]:
        with _open(path) as file:
            schema = file.schema_arrow
            missing = [name for name in columns if name not in schema.names]
            if missing:
                there = ", ".join(schema.names)
                raise ValueError(f"{path} has no column {' or '.join(missing)}; there is: {there}")
            wanted = list(dict.fromkeys([*columns, *(name for name in optional if name in schema.names)]))
            embedded = [name for name in wanted if _holds_bytes(schema.field(name).type)]
            parquet_cells.check_size(file, str(path), embedded)
            plain = [name for name in wanted if name not in embedded]
            number = 0
            for group in range(file.num_row_groups):
                counts = {name: _counts(file, group, name) for name in embedded}
                for row, values in enumerate(_rows(file, path, group, plain)):
                    number += 1
                    cells = {name: self._cells(path, group, row, name, counts[name]) for name in embedded}
                    yield Record(
                        where=f"{path}, row {number}",
                        values=values,
                        cells=cells,
                        file=str(path.relative_to(self._folder)),
                        content=f"row {number}".encode(),
                        no_drivers=self.no_drivers,
                    )

    def _cells(self, path: Path, group: int, row: int, column: str, counts: Sequence[int] | None) -> tuple[str, ...]:
        # Relative where it can be, so that a folder that moves keeps its keys.
        inside = self.root == str(self._folder)
        file_uri = encode_uri(str(path.relative_to(self._folder) if inside else path.resolve()))
        if counts is None:
            return (parquet_cells.uri_of(file_uri, group, row, column),)
        return tuple(parquet_cells.uri_of(file_uri, group, row, column, item) for item in range(counts[row] or 0))


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read as parquet ({error})") from error


def _rows(file: pq.ParquetFile, path: Path, group: int, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The row group's rows, by 1024."""
    if not columns:
        yield from ({} for _ in range(file.metadata.row_group(group).num_rows))
        return
    try:
        for batch in file.iter_batches(1024, row_groups=[group], columns=list(columns)):
            yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read as parquet ({error})") from error


def _counts(file: pq.ParquetFile, group: int, column: str) -> list[int] | None:
    """Pictures per row of a list column; None for a column of single pictures."""
    kind = file.schema_arrow.field(column).type
    if not _is_list(kind):
        return None
    names = [field.name for field in kind.value_type] if pa.types.is_struct(kind.value_type) else []
    small = next((name for name in names if name != "bytes"), None)
    # Without another field beside the bytes there is no way to count but to read them.
    leaves = [one.path for one in map(file.schema.column, range(len(file.schema))) if one.path.split(".")[0] == column]
    chosen = [leaf for leaf in leaves if small is not None and leaf.endswith(f".{small}")] or [column]
    lengths: list[int] = pc.list_value_length(file.read_row_group(group, columns=chosen)[column]).to_pylist()
    return lengths


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _holds_bytes(kind: pa.DataType) -> bool:
    if _is_list(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
