"""Prompts without pictures, for stages that draw their own: one per line of a `.txt`, or a column of a table.

A row is its text; what a reward needs to know about it (`meta_columns`) goes along as JSON. The same prompt twice is
one sample: the later row is a duplicate. Refuses tables without a prompt, and lists of prompts in one row.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from producers.sources.bad_rows import look_through
from producers.sources.base import BAD_CAPTION, Found, SourceRow, clean_captions
from producers.sources.pairs import one_text
from producers.sources.records import Record, Records
from qwenimg_dist.config import PromptsSource
from qwenimg_dist.schema import PROMPT


class Prompts:
    """`source=prompts`."""

    def __init__(self, config: PromptsSource) -> None:
        self._config = config
        self._text = Path(config.path).expanduser() if config.path and config.path.endswith(".txt") else None
        self._records = Records(config.path, None, "prompts, or .txt")

    @property
    def root(self) -> str:
        return str(self._text.parent) if self._text is not None else self._records.root

    def find(self, *, min_age_s: float = 0.0) -> Found:
        """See `Source.find`; with `min_age_s` a last line half written is left for later."""
        # Twice through the file rather than a million rows in memory; the first time to find what is wrong.
        look = look_through(self._rows(min_age_s > 0))
        if not look.num_rows:
            raise ValueError(f"{self._config.path} has no rows; is source.path right?")
        problems = look.problems()
        if not look.num_captioned:
            raise ValueError(
                f"{self._config.path}: none of its {look.num_rows} rows has a prompt in "
                f"{self._config.prompt_column!r}; set source.prompt_column"
            )
        return Found(rows=self._rows(min_age_s > 0), problems=problems)

    def _rows(self, growing: bool) -> Iterator[SourceRow]:
        if self._text is not None:
            yield from self._lines(self._text, growing)
            return
        column, meta = self._config.prompt_column, self._config.meta_columns
        for record in self._records.read([column], optional=meta, growing=growing):
            yield record.row(self._row, PROMPT)

    def _row(self, record: Record) -> SourceRow:
        captions, fault = one_text(record.text(self._config.prompt_column))
        meta = record.meta(self._config.meta_columns)
        return SourceRow(kind=PROMPT, uri="", captions=captions, fault=fault, meta=meta)

    def _lines(self, file: Path, growing: bool) -> Iterator[SourceRow]:
        """Lines that are not blank. Of a growing file a last line without its end is half written, and not there yet:
        any beginning of a prompt is a prompt."""
        try:
            with open(file, "rb") as lines:
                for raw in lines:
                    if growing and not raw.endswith(b"\n"):
                        return
                    try:
                        text = raw.decode("utf-8-sig")
                    except UnicodeDecodeError:
                        yield SourceRow(kind=PROMPT, uri="", captions=(), fault=BAD_CAPTION)
                        continue
                    if text.strip():
                        captions, fault = clean_captions(text)
                        yield SourceRow(kind=PROMPT, uri="", captions=captions, fault=fault)
        except OSError as error:
            raise ValueError(f"{file} cannot be read ({error.strerror})") from error
