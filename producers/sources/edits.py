"""Edits: one or more source pictures, an instruction, and the picture that following it gives.

A row's own picture is the target; the sources become its conditions, in order. Several instructions for one edit are a
list, of which training draws one, as with captions. Reconstruction is an edit without instruction, whose source is the
target or a picture given. Rows without a target or a source become a `bad_row`.
"""

from __future__ import annotations

from collections.abc import Iterator

from producers.sources.bad_rows import look_through
from producers.sources.base import Found, SourceRow, clean_captions
from producers.sources.records import Record, Records
from qwenimg_dist.config import EditsSource
from qwenimg_dist.schema import EDIT


class Edits:
    """`source=edits`."""

    def __init__(self, config: EditsSource) -> None:
        self._records = Records(config.path, config.root, "edits")
        self._config = config

    @property
    def root(self) -> str:
        return self._records.root

    def find(self, *, min_age_s: float = 0.0) -> Found:
        """See `Source.find`; with `min_age_s` a last line half written is left for later. The files that a table
        names are complete."""
        # Twice through the files rather than a million rows in memory; the first time to find what is wrong.
        look = look_through(self._rows(min_age_s > 0), self._records.no_drivers)
        if not look.num_rows:
            raise ValueError(f"{self._config.path} has no rows; is source.path right?")
        problems = look.problems()
        if not look.num_captioned and self._config.instruction is None:
            raise ValueError(
                f"{self._config.path}: none of its {look.num_rows} edits has an instruction in "
                f"{self._config.instruction_column!r}; set source.instruction_column, or source.instruction for all"
            )
        return Found(rows=self._rows(min_age_s > 0), problems=problems)

    def _rows(self, growing: bool) -> Iterator[SourceRow]:
        config = self._config
        worded = [config.instruction_column] if config.instruction is None else []
        columns = dict.fromkeys([*config.source_columns, *worded, config.target_column])
        for record in self._records.read(list(columns), optional=config.meta_columns, growing=growing):
            yield record.row(self._row, EDIT)

    def _row(self, record: Record) -> SourceRow:
        config = self._config
        sources = [uri for column in config.source_columns for uri in record.pictures(column)]
        if config.max_sources < len(sources):
            raise ValueError(
                f"{record.where}: has {len(sources)} source pictures, source.max_sources is {config.max_sources}"
            )
        if config.instruction is None:
            captions, fault = clean_captions(record.text(config.instruction_column))
        else:
            captions, _ = clean_captions(config.instruction)
            fault = None
        return SourceRow(
            kind=EDIT,
            uri=record.picture(config.target_column),
            others=tuple(sources),
            captions=captions,
            fault=fault,
            meta=record.meta(config.meta_columns),
        )
