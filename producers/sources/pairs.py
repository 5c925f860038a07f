"""Preference pairs: a prompt, the picture that was chosen, and the one that was rejected.

Two layouts: `chosen` has a column for each; `labels` has two pictures and a label for each (Pick-a-Pic: `jpg_0`,
`jpg_1`, `label_0`, `label_1`), of which the higher one wins. Ties and rows without labels teach nothing about a
preference: they are dropped and counted. Rows without a picture, and with labels that are no numbers, become a
`bad_row`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

from producers.sources.bad_rows import look_through
from producers.sources.base import BAD_CAPTION, Found, SourceRow, clean_captions
from producers.sources.records import Record, Records
from qwenimg_dist.config import PairsSource
from qwenimg_dist.schema import PREFERENCE

_PROMPTS: Final = ("prompt", "caption")
_CHOSEN: Final = ("chosen", "rejected")
_LABELLED: Final = ("jpg_0", "jpg_1")

TIES: Final = "ties"
UNLABELLED: Final = "pairs without labels"


class Pairs:
    """`source=pairs`."""

    def __init__(self, config: PairsSource) -> None:
        self._records = Records(config.path, config.root, "pairs")
        self._config = config

    @property
    def root(self) -> str:
        return self._records.root

    def find(self, *, min_age_s: float = 0.0) -> Found:
        """See `Source.find`; with `min_age_s` a last line half written is left for later. The files that a table
        names are complete."""
        there = self._records.columns()
        labelled = self._labelled(there)
        prompt = self._config.prompt_column or next((name for name in _PROMPTS if name in there), _PROMPTS[0])
        pictures = self._config.picture_columns or (_LABELLED if labelled else _CHOSEN)
        labels = self._config.label_columns if labelled else ()
        dropped: Counter[str] = Counter()
        # Twice through the files rather than a million rows in memory; the first time to find what is wrong.
        growing = min_age_s > 0
        look = look_through(self._rows(prompt, pictures, labels, dropped, growing), self._records.no_drivers)
        if not look.num_rows:
            counts = ", ".join(f"{number} {what}" for what, number in dropped.items()) or "no rows at all"
            raise ValueError(f"{self._config.path} gives no pair ({counts}); is source.path right?")
        problems = look.problems()
        if not look.num_captioned:
            raise ValueError(
                f"{self._config.path}: none of its {look.num_rows} pairs has a prompt in {prompt!r}; "
                "set source.prompt_column"
            )
        rows = self._rows(prompt, pictures, labels, Counter(), growing)
        return Found(rows=rows, dropped=dropped, problems=problems)

    def _labelled(self, there: list[str]) -> bool:
        if self._config.layout != "auto":
            return self._config.layout == "labels"
        return all(name in there for name in self._config.label_columns)

    def _rows(
        self,
        prompt: str,
        pictures: tuple[str, str],
        labels: tuple[str, ...],
        dropped: Counter[str],
        growing: bool,
    ) -> Iterator[SourceRow]:
        meta = self._config.meta_columns

        def make(record: Record) -> SourceRow:
            first, second = pictures
            if labels:
                better = _compare(record, labels)
                if better is None or better == 0:
                    raise _NoPreference(UNLABELLED if better is None else TIES)
                if better < 0:
                    first, second = second, first
            captions, fault = one_text(record.text(prompt))
            return SourceRow(
                kind=PREFERENCE,
                uri=record.picture(first),
                others=(record.picture(second),),
                captions=captions,
                fault=fault,
                meta=record.meta(meta),
            )

        for record in self._records.read([prompt, *pictures, *labels], optional=meta, growing=growing):
            try:
                yield record.row(make, PREFERENCE)
            except _NoPreference as none:
                dropped[none.what] += 1


class _NoPreference(Exception):
    """A row that teaches nothing about a preference, and why."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


def one_text(value: Any) -> tuple[tuple[str, ...], str | None]:
    """A single text from outside -> (it alone, fault)."""
    if isinstance(value, list | tuple):
        return (), BAD_CAPTION
    return clean_captions(value)


def _compare(record: Record, labels: tuple[str, ...]) -> float | None:
    """Above 0 where the first picture won, below where the second did, 0 for a tie; None without labels."""
    values = [record.text(name) for name in labels]
    if any(value is None or (isinstance(value, float) and math.isnan(value)) for value in values):
        return None
    if not all(isinstance(value, int | float) for value in values):
        raise ValueError(f"{record.where}: labels {values} are no numbers; correct them, or set source.label_columns")
    return float(values[0]) - float(values[1])
