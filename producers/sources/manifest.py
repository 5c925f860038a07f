"""A manifest: a `.jsonl` or `.parquet` file with one row per picture, in the file's own order.

Uris may be relative (to `source.root`, else to the manifest's folder), absolute paths, or URLs that fsspec reads; one
uri may appear several times. Refuses rows without a uri, naming their line.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from producers.sources.base import Found, SourceRow, captions_of_kinds, encode_uri
from producers.sources.jsonl import read_jsonl
from qwenimg_dist.config import ManifestSource
from qwenimg_dist.schema import RAW

_BATCH_ROWS: Final = 8192


class Manifest:
    """`source=manifest`."""

    def __init__(self, config: ManifestSource) -> None:
        if not config.path:
            raise ValueError("source.path is not set: add source.path=FILE (.jsonl or .parquet) to the command")
        self._file = Path(config.path.removeprefix("file://")).expanduser()
        if self._file.suffix not in (".jsonl", ".parquet"):
            raise ValueError(f"source.path={config.path}: a manifest is a .jsonl or a .parquet file")
        self._uri_column = config.uri_column
        self._kinds = config.caption_columns
        self._columns = config.caption_columns or {RAW: config.caption_column}
        self._root = config.root if config.root is not None else str(self._file.parent)

    @property
    def root(self) -> str:
        return self._root

    def find(self, *, min_age_s: float = 0.0) -> Found:
        """See `Source.find`; `min_age_s` does not apply: a file is complete before a manifest names it."""
        if not self._file.is_file():
            raise ValueError(f"source.path={self._file} is not a file that can be read")
        # Twice through the file rather than a million rows in memory; the first time only to find what is wrong.
        num_rows = num_captioned = 0
        for row in self._rows():
            num_rows += 1
            num_captioned += bool(row.captions)
        if not num_rows:
            raise ValueError(f"{self._file} has no rows; is source.path right?")
        if not num_captioned:
            raise ValueError(
                f"{self._file}: none of its {num_rows} rows has a caption in "
                f"{', '.join(map(repr, self._columns.values()))}; set source.caption_column or source.caption_columns"
            )
        return Found(rows=self._rows())

    def _rows(self) -> Iterator[SourceRow]:
        word = "line" if self._file.suffix == ".jsonl" else "row"
        entries = read_jsonl(self._file) if word == "line" else self._parquet()
        for number, entry in entries:
            uri = entry.get(self._uri_column)
            if not isinstance(uri, str) or not uri:
                columns = ", ".join(entry) or "nothing"
                raise ValueError(
                    f"{self._file}, {word} {number}: has no uri in {self._uri_column!r} (there is: {columns}); "
                    "correct it, or set source.uri_column"
                )
            try:
                encoded = encode_uri(uri)
            except ValueError as error:
                raise ValueError(f"{self._file}, {word} {number}: {error}; correct it") from error
            captions, fault, kinds = captions_of_kinds(entry, self._columns)
            yield SourceRow(
                uri=encoded, captions=captions, caption_kinds=kinds if self._kinds is not None else (), fault=fault
            )

    def _parquet(self) -> Iterator[tuple[int, dict[str, Any]]]:
        try:
            with pq.ParquetFile(self._file) as file:
                wanted = list(dict.fromkeys([self._uri_column, *self._columns.values()]))
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
