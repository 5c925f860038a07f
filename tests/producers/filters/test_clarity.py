"""The filter `clarity` on real photographs and on what was done to them."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from photographs import PHOTOGRAPHS, photograph, reason, resized, scaled, scores


@pytest.mark.parametrize("photo", PHOTOGRAPHS)
def test_sharp_photographs_pass_and_blurred_ones_do_not(photo: str) -> None:
    pixels = resized(photograph(photo), 512 / max(photograph(photo).shape))
    assert reason("clarity", pixels) is None
    for sigma in (2, 4, 8):
        assert reason("clarity", cv2.GaussianBlur(pixels, (0, 0), sigma)) == "blurred", sigma


@pytest.mark.parametrize("photo", ["astronaut", "coffee", "chelsea", "rocket", "camera", "coins"])
def test_a_sharp_subject_before_a_soft_background_passes(photo: str) -> None:
    pixels = photograph(photo)
    height, width = pixels.shape[:2]
    soft = cv2.GaussianBlur(pixels, (0, 0), 5)
    middle = np.s_[height // 3 : 2 * height // 3, width // 3 : 2 * width // 3]
    soft[middle] = pixels[middle]
    assert reason("clarity", soft) is None


@pytest.mark.parametrize("sigma", [1.5, 2.0, 3.0])
@pytest.mark.parametrize("height", [60, 200])
def test_an_edge_gives_its_own_width_whatever_its_height(sigma: float, height: float) -> None:
    """1 / (2 s^2), within what the floor of the gradient and the discrete differences take away."""
    step = (np.arange(128) >= 48) * height + 20.0
    edge = cv2.GaussianBlur(np.tile(step, (128, 1)).astype(np.float32), (0, 0), sigma).round().astype(np.uint8)
    clarity = scores("clarity", np.repeat(edge[..., None], 3, axis=2))["clarity"]
    assert clarity == pytest.approx(1 / (2 * sigma**2), rel=0.35)


@pytest.mark.parametrize("photo", ["astronaut", "coffee", "chelsea", "rocket", "camera"])
def test_dark_is_not_blurred(photo: str) -> None:
    assert reason("clarity", scaled(photograph(photo), 0.25)) is None
