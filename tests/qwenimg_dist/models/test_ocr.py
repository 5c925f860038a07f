"""The OCR engine reads what was drawn, and says where."""

from __future__ import annotations

from pathlib import Path

import lettering
import numpy as np
import pytest
from PIL import Image
from skimage import data

from qwenimg_dist.models import ocr
from qwenimg_dist.models.ocr import OcrEngine, full_text, model_files
from qwenimg_dist.text_match import edit_similarity


@pytest.fixture(scope="module")
def engine() -> OcrEngine:
    return OcrEngine()


def test_reads_english_and_says_where(engine: OcrEngine) -> None:
    image = lettering.page(("OPEN 24 HOURS", 40, (60, 40)), ("Fresh bread", 24, (60, 300)))
    first, second = engine.read(image)
    assert (first.text, second.text) == ("OPEN 24 HOURS", "Fresh bread")
    assert min(first.confidence, second.confidence) > 0.9
    left, top = first.corners[0]
    assert left == pytest.approx(60 / 512, abs=0.03)
    assert top == pytest.approx(45 / 384, abs=0.04)
    # The box reaches somewhat around the letters.
    ink = np.argwhere(np.asarray(image.convert("L").crop((0, 0, 512, 200))) < 128)
    (y0, x0), (y1, x1) = ink.min(0), ink.max(0)
    assert 1.0 < first.height / ((y1 - y0) / 384) < 1.6
    assert 1.0 < first.area / ((y1 - y0) * (x1 - x0) / (512 * 384)) < 1.9


def test_reads_chinese(engine: OcrEngine) -> None:
    lines = engine.read(
        lettering.page(("今日特价", 48, (40, 40)), ("新鲜面包每天早上供应", 28, (60, 280)), font=lettering.CHINESE)
    )
    assert edit_similarity(full_text(lines), "今日特价新鲜面包每天早上供应") >= 0.9


def test_large_pictures_are_read_from_more_pixels_than_they_are_searched_in(engine: OcrEngine) -> None:
    image = lettering.page(("small print, as on a package", 26, (900, 700)), size=(1500, 1100))
    (line,) = engine.read(image)
    assert edit_similarity(line.text or "", "small print, as on a package") > 0.95
    assert line.corners[0] == pytest.approx([0.6, 0.64], abs=0.02)
    blurred = OcrEngine(read_side=160).read(image)
    assert edit_similarity(full_text(blurred), "small print, as on a package") < 0.9


@pytest.mark.parametrize("picture", [data.astronaut, data.chelsea, data.camera, data.grass])
def test_photographs_have_none(engine: OcrEngine, picture: object) -> None:
    assert callable(picture)
    assert engine.read(Image.fromarray(picture()).convert("RGB")) == []


def test_of_many_lines_the_highest_are_read_in_their_order() -> None:
    image = lettering.page(("small one", 16, (20, 20)), ("BIG ONE", 48, (20, 100)), ("BIG TWO", 44, (20, 220)))
    lines = OcrEngine(max_lines=2).read(image)
    assert [line.text for line in lines] == [None, "BIG ONE", "BIG TWO"]


def test_a_wheel_without_the_models_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(file.is_file() for file in model_files())
    monkeypatch.setattr(ocr, "MODELS", "PP-OCRv9")
    with pytest.raises(ValueError, match=r"PP-OCRv9, found .*PP-OCRv6.*qwenimg-dist\[ocr\]"):
        OcrEngine()


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'qwenimg-dist\[ocr\]'"):
        model_files()
