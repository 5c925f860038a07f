"""The filter `texture` on real photographs and on what was done to them."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from photographs import PHOTOGRAPHS, Pixels, noisy, photograph, reason, resized, scores


@pytest.mark.parametrize("photo", PHOTOGRAPHS)
def test_noise_on_a_photograph_is_rejected_and_its_own_grain_is_not(photo: str) -> None:
    pixels = resized(photograph(photo), min(1.0, 512 / max(photograph(photo).shape)))
    assert reason("texture", pixels) is None
    assert reason("texture", noisy(pixels, 3)) is None
    assert reason("texture", noisy(pixels, 40)) == "noisy"


def test_pure_noise_and_plain_colour() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    assert reason("texture", noise) == "noisy"
    plain = np.full((200, 300, 3), 130, dtype=np.uint8)
    assert reason("texture", plain) == "flat"
    speck = plain.copy()
    speck[100:110, 100:110] = 20
    assert reason("texture", speck) == "flat"
    speck[50:150, 50:150] = photograph("astronaut")[:100, 200:300]
    assert reason("texture", speck) is None


def by_definition(grey: Pixels) -> float:
    """Non-uniform local binary patterns, pixel by pixel."""
    padded = np.pad(grey.astype(int), 1, mode="edge")
    count = 0
    for y in range(grey.shape[0]):
        for x in range(grey.shape[1]):
            ring = [(0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0)]
            bits = [padded[y + dy, x + dx] > padded[y + 1, x + 1] + 8 for dy, dx in ring]
            count += sum(a != b for a, b in zip(bits, bits[1:] + bits[:1], strict=True)) > 2
    return count / grey.size


def test_complexity_is_what_its_definition_says() -> None:
    crop = np.ascontiguousarray(photograph("grass")[:40, :56])
    crop[:8, :8] = 255  # white has no brighter neighbour
    wanted = by_definition(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY))
    assert 0.1 < wanted < 0.4
    assert scores("texture", crop)["complexity"] == pytest.approx(wanted)


def test_flatness_counts_blocks() -> None:
    half = np.full((64, 64, 3), 100, dtype=np.uint8)
    half[:, 32:] = noisy(half[:, 32:], 10)
    assert scores("texture", half)["flatness"] == 0.5
