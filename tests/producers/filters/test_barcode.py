"""The filter `barcode` on real photographs and on what was done to them."""

from __future__ import annotations

from typing import Final

import cv2
import numpy as np
import pytest
from photographs import PHOTOGRAPHS, Pixels, noisy, photograph, reason, scores

LEFT: Final = [f"{code:07b}" for code in (13, 25, 19, 61, 35, 49, 47, 59, 55, 11)]
RIGHT: Final = ["".join("10"[int(bit)] for bit in code) for code in LEFT]
MIRRORED: Final = [code[::-1] for code in RIGHT]
PARITY: Final = ["LLLLLL", "LLGLGG", "LLGGLG", "LLGGGL", "LGLLGG", "LGGLLG", "LGGGLL", "LGLGLG", "LGLGGL", "LGGLGL"]


def qr_code(text: str, module_px: int) -> Pixels:
    modules = cv2.QRCodeEncoder_create(cv2.QRCodeEncoder_Params()).encode(text)
    return np.kron(modules, np.ones((module_px, module_px), dtype=np.uint8))


def bar_code(digits: str, width: int, height: int) -> Pixels:
    """EAN-13 with its quiet zone."""
    codes = [
        (LEFT if side == "L" else MIRRORED)[int(digit)]
        for side, digit in zip(PARITY[int(digits[0])], digits[1:7], strict=True)
    ]
    bits = "101" + "".join(codes) + "01010" + "".join(RIGHT[int(digit)] for digit in digits[7:]) + "101"
    row = np.pad([255 * (bit == "0") for bit in bits], 10, constant_values=255).astype(np.uint8)
    drawn = np.tile(np.repeat(row, 8), (8 * height, 1))
    return np.asarray(cv2.resize(drawn, (width, height), interpolation=cv2.INTER_AREA))


def stamped(pixels: Pixels, code: Pixels) -> Pixels:
    result = pixels.copy()
    result[24 : 24 + code.shape[0], 16 : 16 + code.shape[1]] = code[..., None]
    return result


@pytest.mark.parametrize("photo", [name for name in PHOTOGRAPHS if name != "retina"])
def test_a_photograph_with_a_code_on_it_is_rejected(photo: str) -> None:
    pixels = photograph(photo)
    assert scores("barcode", pixels) == {"qr_codes": 0, "barcodes": 0}
    for module_px in (3, 5):
        marked = stamped(pixels, qr_code("https://example.org/pictures/12345", module_px))
        assert scores("barcode", marked) == {"qr_codes": 1, "barcodes": 0}
        assert reason("barcode", marked) == "qr_code"
        assert reason("barcode", cv2.GaussianBlur(marked, (0, 0), 0.8)) == "qr_code"
        assert reason("barcode", marked, max_codes=1) is None
    labelled = stamped(pixels, bar_code("4006381333931", 260, 110))
    assert reason("barcode", cv2.GaussianBlur(labelled, (0, 0), 0.8)) == "barcode"


@pytest.mark.parametrize("photo", ["astronaut", "coffee", "grass", "coins"])
def test_fences_shutters_and_noise_are_no_codes(photo: str) -> None:
    y, x = np.mgrid[:150, :220]
    for period in (3, 5, 8, 14):
        for angle in (0.0, 0.1, 0.7, np.pi / 2):
            wave = np.sign(np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period))
            fence = cv2.GaussianBlur((128 + 100 * wave).astype(np.uint8), (0, 0), 0.7)
            assert reason("barcode", stamped(photograph(photo), fence)) is None
    assert reason("barcode", noisy(photograph(photo), 60)) is None
