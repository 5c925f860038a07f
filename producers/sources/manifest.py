"""A manifest: a `.jsonl` or `.parquet` file with one row per picture, in the file's own order.

Uris may be relative (to `source.root`, else to the manifest's folder), absolute paths, or URLs that fsspec reads
(s3:// with patience, see `storage.py`); the manifest itself may lie on s3://. One uri may appear several
times. A row without a uri, or a broken line, becomes a `bad_row`.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from producers.sources import remote, urls
from producers.sources.bad_rows import bad_row, look_through
from producers.sources.base import Found, SourceRow, captions_of_kinds, encode_uri, with_labels
from producers.sources.jsonl import read_jsonl
from qwenimg_dist.config import ManifestSource
from qwenimg_dist.schema import RAW
from qwenimg_dist.storage import check_url, is_remote

_BATCH_ROWS: Final = 8192


class Manifest:
    """`source=manifest`."""

    def __init__(self, config: ManifestSource) -> None:
        if not config.path:
            raise ValueError("source.path is not set: add source.path=FILE (.jsonl or .parquet) to the command")
        self._url = check_url(config.path, "source.path") if is_remote(config.path) else None
        # Of a URL the name alone, until `find` has brought it here.
        plain = config.path.removeprefix("file://") if self._url is None else posixpath.basename(self._url)
        self._file = Path(plain).expanduser()
        if self._file.suffix not in (".jsonl", ".parquet"):
            raise ValueError(f"source.path={config.path}: a manifest is a .jsonl or a .parquet file")
        self._uri_column = config.uri_column
        self._kinds = config.caption_columns
        self._labels = config.label_columns
        self._columns = config.caption_columns or {RAW: config.caption_column}
        folder = str(self._file.parent) if self._url is None else posixpath.dirname(self._url)
        self._root = config.root if config.root is not None else folder
        self._no_drivers = urls.NoDrivers(config.path)
        self._stack = ExitStack()

    @property
    def root(self) -> str:
        return self._root

    def find(self, *, min_age_s: float = 0.0) -> Found:
        """See `Source.find`; with `min_age_s` a last line half written is left for later. The files that a manifest
        names are complete."""
        urls.check_root(self._root)
        if self._url is not None:
            self._stack.close()  # the look before this one
            try:
                self._file = self._stack.enter_context(remote.brought_here(self._url))
            except FileNotFoundError as error:
                raise ValueError(f"source.path={self._url} is not there") from error
        if not self._file.is_file():
            raise ValueError(f"source.path={self._file} is not a file that can be read")
        # Twice through the file rather than a million rows in memory; the first time only to find what is wrong.
        look = look_through(self._rows(min_age_s > 0), self._no_drivers)
        if not look.num_rows:
            raise ValueError(f"{self._file} has no rows; is source.path right?")
        problems = look.problems()
        if not look.num_captioned:
            raise ValueError(
                f"{self._file}: none of its {look.num_rows} rows has a caption in "
                f"{', '.join(map(repr, self._columns.values()))}; set source.caption_column or source.caption_columns"
            )
        return Found(rows=self._rows(min_age_s > 0), problems=problems)

    def _rows(self, growing: bool) -> Iterator[SourceRow]:
        if self._file.suffix == ".jsonl":
            for line in read_jsonl(self._file, growing=growing):
                yield self._row(f"line {line.number}", line.entry, line.raw, line.broken)
        else:
            for number, entry in self._parquet():
                yield self._row(f"row {number}", entry, None, None)

    def _row(self, place: str, entry: Mapping[str, Any], raw: bytes | None, broken: str | None) -> SourceRow:
        try:
            if broken is not None:
                raise ValueError(f"{broken}; correct the line")
            uri = self._uri(entry)
        except ValueError as error:
            content = raw if raw is not None else json.dumps(entry, default=str).encode("utf-8", "surrogatepass")
            return bad_row(self._file.name, content, f"{self._file}, {place}: {error}")
        captions, fault, kinds = captions_of_kinds(entry, self._columns)
        kinds = kinds if self._kinds is not None else ()
        row = SourceRow(uri=uri, captions=captions, caption_kinds=kinds, fault=fault)
        return with_labels(row, entry, self._labels)

    def _uri(self, entry: Mapping[str, Any]) -> str:
        uri = entry.get(self._uri_column)
        if not isinstance(uri, str) or not uri:
            columns = ", ".join(entry) or "nothing"
            raise ValueError(
                f"has no uri in {self._uri_column!r} (there is: {columns}); correct it, or set source.uri_column"
            )
        try:
            urls.check(uri)
            return encode_uri(uri)
        except ValueError as error:
            if isinstance(error, urls.NoDriverError):
                self._no_drivers.add(error)
            raise ValueError(f"{error}; correct it") from error

    def _parquet(self) -> Iterator[tuple[int, dict[str, Any]]]:
        try:
            with pq.ParquetFile(self._file) as file:
                wanted = list(dict.fromkeys([self._uri_column, *self._columns.values(), *self._labels.values()]))
                missing = [name for name in wanted if name not in file.schema_arrow.names]
                if missing:
                    there = ", ".join(file.schema_arrow.names)
                    raise ValueError(f"{self._file} has no column {' or '.join(missing)}; there is: {there}")
                number = 0
                for batch in file.iter_batches(_BATCH_ROWS, columns=wanted):
                    for entry in batch.to_pylist():
                        number += 1
                        yield number, entry
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{self._file} cannot be read as parquet ({error})") from error
