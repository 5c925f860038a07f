"""Measures the text in a picture: how much, how small, in which language, and whether it is what the caption quotes.

`text_level` is for the curriculum (`where: text_level == 0`): 0 without text, 1 with a few large words, 2 with more or
smaller text. It rejects nothing unless thresholds are set. Needs the extra `ocr`; its models come with the package.
Refuses to call a text "other" for what it reads badly: only where boxes of text are found and nothing is read in most
of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Final

from pydantic import Field, PositiveInt

from producers.filters.base import Facts, Filter, FilterParams, Rejection, Resources, Scorer, Value, Values, number
from qwenimg_dist.models.ocr import Line, OcrEngine, full_text, model_files
from qwenimg_dist.text_match import Language, language, normalise, quoted_texts, quotes_found, script_counts

MIN_WEIGHT: Final = 2
"""A single letter is more often a round thing than text."""
SIMPLE_WEIGHT: Final = 40
"""About eight English words, or twenty Han characters, which weigh two each."""
SIMPLE_LINES: Final = 4
SIMPLE_HEIGHT: Final = 0.03
"""Of the shorter side: 8 px at 256 px, the least at which letters can be told apart."""
UNREAD_WEIGHT: Final = 8
"""Of a line in a script that cannot be read."""
UNREAD_FOUND: Final = 0.7
"""The detector's confidence from which a line without readable letters is one; textures reach 0.55."""


class Params(FilterParams):
    detect_side: PositiveInt = Field(default=736, ge=64)
    read_side: PositiveInt = Field(default=1536, ge=64)
    max_lines: PositiveInt = 48
    min_confidence: float = Field(default=0.5, ge=0, le=1)
    languages: tuple[Language, ...] = ("en", "zh", "other", "none")
    max_level: int = Field(default=2, ge=0, le=2)
    max_area: float = Field(default=1.0, ge=0, le=1)
    min_quote_match: float = Field(default=0.0, ge=0, le=1)


def check(params: Params) -> None:
    """Raises ValueError if the models are not installed."""
    model_files()


def load(params: Params, resources: Resources) -> Scorer:
    engine = OcrEngine(
        num_threads=resources.num_threads,
        detect_side=params.detect_side,
        read_side=params.read_side,
        max_lines=params.max_lines,
    )

    def one(facts: Facts) -> dict[str, Value]:
        assert facts.image is not None  # asked after the decode
        return measure(engine.read(facts.image), facts.captions, params.min_confidence)

    def score(facts: Sequence[Facts]) -> list[dict[str, Value]]:
        return [one(each) for each in facts]

    return score


def measure(lines: Sequence[Line], captions: Sequence[str], min_confidence: float) -> dict[str, Value]:
    """Scores and label of what was read."""
    read = [line for line in lines if line.text and line.confidence >= min_confidence]
    unread = [line for line in lines if line.text == "" and line.found >= UNREAD_FOUND]
    spoken = _language(read, unread)
    text = full_text(read)
    weight = (
        len(normalise(text)) + script_counts(text)["han"] + (UNREAD_WEIGHT * len(unread) if spoken == "other" else 0)
    )
    others = unread if spoken == "other" else [line for line in lines if line.text is None]
    there = [*read, *others] if weight >= MIN_WEIGHT else []
    quotes = list(dict.fromkeys(quote for caption in captions for quote in quoted_texts(caption)))
    return {
        "ocr_characters": float(len(normalise(text))) if there else 0.0,
        "ocr_lines": float(len(there)),
        "ocr_area": min(1.0, sum(line.area for line in there)),
        "ocr_min_height": min((line.height for line in there), default=0.0),
        "ocr_median_height": median(line.height for line in there) if there else 0.0,
        "ocr_confidence": fmean(line.confidence for line in read) if read and there else 0.0,
        "text_level": float(_level(there, weight)),
        "ocr_quotes": float(len(quotes)),
        "ocr_quote_match": quotes_found(quotes, text),
        "ocr_language": spoken if there else "none",
    }


def _language(read: Sequence[Line], unread: Sequence[Line]) -> Language:
    """By what was read, unless nothing could be read in most of the area."""
    if sum(line.area for line in unread) > sum(line.area for line in read):
        return "other"
    return language(full_text(read))


def _level(lines: Sequence[Line], weight: int) -> int:
    if not lines:
        return 0
    simple = weight <= SIMPLE_WEIGHT and len(lines) <= SIMPLE_LINES
    return 1 if simple and min(line.height for line in lines) >= SIMPLE_HEIGHT else 2


def admit(values: Values, params: Params) -> Rejection | None:
    if values["ocr_language"] not in params.languages:
        detail = f"the text is {values['ocr_language']}, not one of languages={', '.join(params.languages)}"
        return Rejection(reason="text_language", detail=detail)
    if number(values, "text_level") > params.max_level:
        detail = f"text_level {number(values, 'text_level'):.0f} > max_level={params.max_level}"
        return Rejection(reason="too_much_text", detail=detail)
    if number(values, "ocr_area") > params.max_area:
        detail = f"text covers {number(values, 'ocr_area'):.3f} > max_area={params.max_area:g}"
        return Rejection(reason="too_much_text", detail=detail)
    if number(values, "ocr_quote_match") < params.min_quote_match:
        detail = f"quotes match {number(values, 'ocr_quote_match'):.2f} < min_quote_match={params.min_quote_match:g}"
        return Rejection(reason="quoted_text_missing", detail=detail)
    return None


FILTER = Filter(
    params=Params,
    stage=4,
    looks_at="pixels",
    scores=(
        "ocr_characters",
        "ocr_lines",
        "ocr_area",
        "ocr_min_height",
        "ocr_median_height",
        "ocr_confidence",
        "text_level",
        "ocr_quotes",
        "ocr_quote_match",
    ),
    labels=("ocr_language",),
    load=load,
    check=check,
    reads_captions=True,
    scored_by=("detect_side", "read_side", "max_lines", "min_confidence"),
    admit=admit,
)
