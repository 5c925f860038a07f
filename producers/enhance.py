"""The optional caption step: the source's captions through the prompt enhancement, before they are listed.

Place in the flow: source -> **enhance** -> listing. What is listed is what is judged, encoded and trained on, so
another setting is another caption, and the listing notices it like any changed caption. Only pictures with captions:
the text of pairs, edits and prompts stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Final, Literal

from producers.sources.base import SourceRow
from qwenimg_dist.models.prompt_enhance import enhance
from qwenimg_dist.schema import IMAGE, RAW

ENHANCED: Final = "enhanced"
Mode = Literal["off", "add", "replace"]


def enhance_rows(rows: Iterable[SourceRow], mode: Mode) -> Iterator[SourceRow]:
    """The rows with enhanced captions beside the source's, or in their place; distinct ones, in order."""
    for row in rows:
        yield row if mode == "off" or row.kind != IMAGE or not row.captions else _enhanced(row, mode)


def _enhanced(row: SourceRow, mode: Mode) -> SourceRow:
    kinds = row.caption_kinds or (RAW,) * len(row.captions)
    if mode == "replace":
        made: dict[str, str] = {}
        for caption, kind in zip(row.captions, kinds, strict=True):
            made.setdefault(enhance(caption), kind)
        return replace(row, captions=tuple(made), caption_kinds=tuple(made.values()) if row.caption_kinds else ())
    made = dict(zip(row.captions, kinds, strict=True))
    for caption in row.captions:
        made.setdefault(enhance(caption), ENHANCED)
    return replace(row, captions=tuple(made), caption_kinds=tuple(made.values()))
