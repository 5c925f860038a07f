"""Text in pictures as scores: amount, size, language, level, and the caption's quotes; photographs have none."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import lettering
import numpy as np
import pytest
from PIL import Image
from skimage import data

from producers.filters import validate_filters
from producers.filters.base import Facts, Resources, Scorers, Values
from producers.filters.ocr import measure
from producers.sources import open_source
from producers.sources.base import read_bytes
from producers.synthetic_text.recipe import parse
from qwenimg_dist.config import SyntheticTextSource
from qwenimg_dist.models.ocr import Line

SCORERS = Scorers(Resources(pipeline_dir=Path("no pipeline"), device="cpu"))
(OCR,) = validate_filters({"ocr": {}})


def ask(image: Image.Image, *captions: str) -> Values:
    facts = Facts(num_bytes=1, width=image.width, height=image.height, captions=captions, image=image)
    (values,) = SCORERS.score(OCR, [facts])
    assert set(values) == set(OCR.filter.names)
    return values


def test_english_chinese_other_and_none() -> None:
    english = lettering.page(("OPEN 24 HOURS", 40, (60, 40)))
    chinese = lettering.page(("今日特价", 60, (60, 40)), font=lettering.CHINESE)
    russian = lettering.page(("Открыто всегда", 44, (40, 90)))
    photo = Image.fromarray(data.astronaut())
    found = [ask(image) for image in (english, chinese, russian, photo)]
    assert [one["ocr_language"] for one in found] == ["en", "zh", "other", "none"]
    assert [one["text_level"] for one in found] == [1.0, 1.0, 1.0, 0.0]
    assert [one["ocr_characters"] for one in found] == [11.0, 4.0, 0.0, 0.0]
    assert {name: value for name, value in found[3].items() if name != "ocr_language"} == {
        **dict.fromkeys(OCR.filter.scores, 0.0),
        "ocr_quote_match": 1.0,
    }


def test_more_or_smaller_text_is_complex() -> None:
    sentence = "A baker opens his shop at six every day of the year"
    many = ask(lettering.page(*[(sentence[:24], 26, (20, 20 + 60 * row)) for row in range(6)]))
    small = ask(lettering.page(("tiny print", 13, (200, 200)), size=(700, 700)))
    assert many["text_level"] == small["text_level"] == 2.0
    assert many["ocr_lines"] == 6.0
    assert small["ocr_min_height"] < 0.03 < many["ocr_min_height"]
    assert many["ocr_area"] > 10 * small["ocr_area"] > 0


def test_text_on_a_photograph_is_held_to_what_captions_quote() -> None:
    image = Image.fromarray(data.astronaut())
    lettering.write(image, "LIFT OFF", 56, (60, 30), fill="white")
    right = ask(image, "an astronaut under the words “Lift off”", "an astronaut")
    wrong = ask(image, 'an astronaut under the words "Good night"')
    half = ask(image, 'a poster with "LIFT OFF" and "TOMORROW"')
    assert (right["ocr_quotes"], right["ocr_quote_match"]) == (1.0, 1.0)
    assert wrong["ocr_quote_match"] < 0.5  # type: ignore[operator]
    assert half["ocr_quotes"] == 2.0
    assert 0.4 < half["ocr_quote_match"] < 0.8  # type: ignore[operator]


def test_pages_of_the_synthetic_source_show_what_their_captions_quote() -> None:
    font = str(lettering.CHINESE)
    config = SyntheticTextSource(kind="synthetic_text", num_rows=12, size=640, fonts=(font,), chinese_fonts=(font,))
    for row in open_source(config).find().rows:
        values = ask(Image.open(io.BytesIO(read_bytes("/", row.uri))).convert("RGB"), *row.captions)
        assert values["ocr_quotes"] >= 1, row.uri  # type: ignore[operator]
        assert values["ocr_quote_match"] > 0.9, row.uri  # type: ignore[operator]
        assert values["ocr_language"] == parse(row.uri).language
        assert values["text_level"] >= 1  # type: ignore[operator]


def line(text: str | None, *, confidence: float = 0.9, found: float = 0.9, height: float = 0.1) -> Line:
    corners = np.array([[0.1, 0.1], [0.5, 0.1], [0.5, 0.2], [0.1, 0.2]], dtype=np.float32)
    return Line(text=text, confidence=confidence, found=found, corners=corners, height=height)


def test_one_letter_a_texture_and_bad_readings_are_no_text() -> None:
    for alone in (line("8"), line("", found=0.6), line("hello", confidence=0.4)):
        assert measure([alone], [], 0.5)["text_level"] == 0.0
    assert measure([line("", found=0.8)], [], 0.5)["ocr_language"] == "other"
    seen = measure([line("WELCOME"), line(None, height=0.01)], [], 0.5)
    assert (seen["ocr_lines"], seen["ocr_min_height"], seen["text_level"]) == (2.0, 0.01, 2.0)
    assert seen["ocr_area"] == pytest.approx(0.08)


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({}, None),
        ({"languages": ["en", "zh", "none"]}, "text_language"),
        ({"max_level": 1}, "too_much_text"),
        ({"max_area": 0.2}, "too_much_text"),
        ({"min_quote_match": 0.7}, "quoted_text_missing"),
    ],
)
def test_thresholds(params: dict[str, Any], reason: str | None) -> None:
    (bound,) = validate_filters({"ocr": params})
    values: Values = {"ocr_language": "other", "text_level": 2.0, "ocr_area": 0.3, "ocr_quote_match": 0.6}
    rejection = bound.admit(values)
    assert (rejection.reason if rejection else None) == reason
    if rejection is not None:
        assert next(iter(params)) in rejection.detail


def test_an_engine_that_is_not_there_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    OCR.check()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"filters\.ocr: rapidocr is not installed: pip install .*enabled=false"):
        OCR.check()
