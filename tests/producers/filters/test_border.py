"""The filter `border` on real photographs and on what was done to them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import skimage.data
from photographs import PHOTOGRAPHS, Pixels, photograph, reason, scores
from PIL import Image

Colour = int | tuple[int, int, int]


def with_bars(pixels: Pixels, rows: float, columns: float, colour: Colour) -> Pixels:
    """Bars of this share of the height above and below, of the width left and right."""
    height, width = pixels.shape[:2]
    tall, wide = round(height * rows), round(width * columns)
    boxed = np.full((height + 2 * tall, width + 2 * wide, 3), colour, dtype=np.uint8)
    boxed[tall : tall + height, wide : wide + width] = pixels
    return boxed


def as_jpeg(pixels: Pixels) -> Pixels:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "JPEG", quality=75)
    return np.asarray(Image.open(sink).convert("RGB"))


BRIGHT = [name for name in PHOTOGRAPHS if name not in ("rocket", "retina")]  # whose own edges are black


@pytest.mark.parametrize("photo", BRIGHT)
@pytest.mark.parametrize(
    ("rows", "columns", "colour"), [(0.15, 0, 0), (0, 0.2, 0), (0.08, 0.08, 255), (0.05, 0.05, (20, 140, 60))]
)
def test_letterbox_pillarbox_and_frame_are_rejected(photo: str, rows: float, columns: float, colour: Colour) -> None:
    boxed = as_jpeg(with_bars(photograph(photo), rows, columns, colour))
    assert reason("border", boxed) == "border"
    share = 1 - photograph(photo)[..., 0].size / boxed[..., 0].size
    assert scores("border", boxed)["border"] == pytest.approx(share, abs=0.35 * share)


@pytest.mark.parametrize("photo", BRIGHT)
def test_a_large_file_is_measured_the_same(photo: str) -> None:
    boxed = Image.fromarray(with_bars(photograph(photo), 0.15, 0, 0))
    large = np.asarray(boxed.resize((boxed.width * 3, boxed.height * 3), Image.Resampling.BICUBIC))
    assert reason("border", large) == "border"


def test_plain_ground_is_no_border() -> None:
    paper = np.full((400, 400, 3), 250, dtype=np.uint8)
    y, x = np.mgrid[:400, :400]
    paper[(x - 200) ** 2 + (y - 200) ** 2 < 120**2] = (200, 30, 30)
    assert scores("border", paper)["border"] == 0
    for page in (skimage.data.page(), skimage.data.text()):
        assert reason("border", np.repeat(page[..., None], 3, axis=2)) is None
    assert reason("border", np.full((90, 90, 3), 9, dtype=np.uint8)) is None
    sky = photograph("astronaut").copy()
    sky[:150] = np.linspace(180, 230, 150).astype(np.uint8)[:, None, None]  # a gradient that ends at a horizon
    assert reason("border", sky) is None


def test_the_threshold_is_a_share_of_the_area() -> None:
    framed = with_bars(photograph("chelsea"), 0.05, 0.05, 0)
    assert reason("border", framed, max_border=0.25) is None
    assert reason("border", framed, max_border=0.1) == "border"
