"""The filter `saturation` on real photographs and on what was done to them."""

from __future__ import annotations

import numpy as np
import pytest
from photographs import Pixels, photograph, reason, scores


def saturated(pixels: Pixels, factor: float) -> Pixels:
    grey = pixels.mean(axis=2, keepdims=True)
    return np.clip(grey + factor * (pixels - grey), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("photo", ["coffee", "rocket", "retina", "chelsea"])
def test_photographs_pass_and_absurdly_vivid_ones_do_not(photo: str) -> None:
    assert reason("saturation", saturated(photograph(photo), 1.3)) is None
    assert reason("saturation", saturated(photograph(photo), 6)) == "oversaturated"


@pytest.mark.parametrize("photo", ["astronaut", "coffee", "rocket", "retina", "chelsea"])
def test_black_and_white_is_rejected_on_request_alone(photo: str) -> None:
    grey = saturated(photograph(photo), 0)
    assert reason("saturation", grey) is None
    assert reason("saturation", grey, min_colourfulness=3) == "too_pale"
    assert reason("saturation", photograph(photo), min_colourfulness=3) is None


def test_the_score_is_hasler_and_suesstrunks_m3() -> None:
    pixels = photograph("coffee").astype(np.float64)
    red, green, blue = pixels[:380, :500, 0], pixels[:380, :500, 1], pixels[:380, :500, 2]
    rg, yb = red - green, (red + green) / 2 - blue
    wanted = np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())
    assert scores("saturation", photograph("coffee")[:380, :500])["colourfulness"] == pytest.approx(wanted, rel=1e-4)
    assert scores("saturation", saturated(photograph("coffee"), 0))["colourfulness"] == pytest.approx(0, abs=1e-3)


def test_vivid_counts_pixels() -> None:
    quarter = np.full((8, 8, 3), 128, dtype=np.uint8)
    quarter[:4, :4] = (255, 20, 60)
    quarter[:4, 4:] = (255, 60, 60)
    assert scores("saturation", quarter)["vivid"] == 0.25
    assert reason("saturation", quarter, max_vivid=0.2) == "oversaturated"
