"""The filter `luma` on real photographs and on what was done to them."""

from __future__ import annotations

import numpy as np
import pytest
from photographs import PHOTOGRAPHS, photograph, reason, scaled, scores


@pytest.mark.parametrize("photo", PHOTOGRAPHS)
def test_underexposed_and_blown_out_photographs_are_rejected_as_such(photo: str) -> None:
    pixels = photograph(photo)
    assert reason("luma", pixels) is None
    assert reason("luma", scaled(pixels, 0.5)) is None
    assert reason("luma", scaled(pixels, 0.1)) in ("too_dark", "low_contrast")
    assert reason("luma", scaled(pixels, 0.05)) == "too_dark"
    assert reason("luma", np.clip(pixels + 245.0, 0, 255).astype(np.uint8)) == "too_bright"
    veiled = (128 + (pixels - 128.0) * 0.04).astype(np.uint8)
    assert reason("luma", veiled) == "low_contrast"


def test_scores_are_mean_and_deviation() -> None:
    halves = np.zeros((10, 10, 3), dtype=np.uint8)
    halves[5:] = 255
    assert scores("luma", halves) == pytest.approx({"luma": 0.5, "contrast": 0.5})
    green = np.zeros((4, 4, 3), dtype=np.uint8)
    green[..., 1] = 255
    assert scores("luma", green)["luma"] == pytest.approx(0.587, abs=0.003)


def test_a_thing_on_white_paper_is_not_too_bright() -> None:
    paper = np.full((400, 400, 3), 255, dtype=np.uint8)
    paper[140:260, 140:260] = photograph("astronaut")[:120, 200:320]
    assert reason("luma", paper) is None
