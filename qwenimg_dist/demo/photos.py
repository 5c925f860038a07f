"""Synthetic stand-ins for photographs: gradients, overlapping shapes of all sizes, pink noise.

Place in the flow: what the tiny VAE is trained on besides the demo's shapes, and material for tests that need
"other people's photos" without shipping any. "Dead leaves" (occluding shapes with many small ones) plus noise of equal
power per octave have about the statistics of natural images. Left out: real photographs, and any meaning.
"""

import numpy as np
from PIL import Image

from qwenimg_dist.demo.shapes import SHAPES, FloatArray


def _natural_colour(rng: np.random.Generator) -> FloatArray:
    """Any lightness, mostly little saturation: photographs are greyer than uniform colours."""
    grey, chroma = rng.uniform(0, 255), rng.normal(0.0, 1.0, size=3) * rng.uniform(0.0, 80.0)
    return np.clip(grey + chroma, 0, 255)


def _pink_noise(rng: np.random.Generator, side_px: int) -> FloatArray:
    """(side, side, 3): equal power per octave, nearly the spectrum of photographs; partly colourless."""
    noise = np.zeros((side_px, side_px, 3))
    for cells in (4, 8, 16, 32, 64, side_px):
        grid = rng.normal(0.0, 40.0, size=(cells, cells, 1)) + rng.normal(0.0, 12.0, size=(cells, cells, 3))
        tile = Image.fromarray(np.clip(grid + 128, 0, 255).astype(np.uint8))
        noise += np.asarray(tile.resize((side_px, side_px), Image.Resampling.BICUBIC)) - 128.0
    return noise


def _add_leaf(pixels: FloatArray, rng: np.random.Generator) -> None:
    """Paint one turned and stretched shape over `pixels`, in place; small ones are the most frequent."""
    side_px = len(pixels)
    radius = side_px * 0.03 * (0.6 / 0.03) ** (rng.random() ** 1.5)
    centre = rng.uniform(0, side_px, size=2)
    low = np.maximum(centre - 2 * radius, 0).astype(int)
    high = np.minimum(centre + 2 * radius + 1, side_px).astype(int)
    x, y = np.meshgrid(np.arange(low[0], high[0]) - centre[0], np.arange(low[1], high[1]) - centre[1])
    angle, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.0)
    turned_x = (np.cos(angle) * x + np.sin(angle) * y) / radius
    turned_y = (np.cos(angle) * y - np.sin(angle) * x) / (radius * stretch)
    inside = SHAPES[list(SHAPES)[rng.integers(len(SHAPES))]](turned_x, turned_y)
    shading = 1.0 + rng.uniform(0.0, 0.4) * turned_x[..., None]
    leaf = np.clip(_natural_colour(rng) * shading, 0, 255)
    region = pixels[low[1] : high[1], low[0] : high[0]]
    region[inside] = leaf[inside]


def generic_picture(rng: np.random.Generator, side_px: int) -> Image.Image:
    """A stand-in for photographs: gradient, overlapping leaves of all sizes ("dead leaves"), pink noise.

    Each part is there or not; drawn at twice the side and halved, so edges are antialiased.
    """
    drawn_px = 2 * side_px
    corners = np.stack([_natural_colour(rng) for _ in range(4)]).reshape(2, 2, 3).astype(np.uint8)
    canvas = Image.fromarray(corners).resize((drawn_px, drawn_px), Image.Resampling.BICUBIC)
    pixels = np.array(canvas, dtype=np.float64)
    if rng.random() < 0.8:
        for _ in range(int(rng.integers(2, 60))):
            _add_leaf(pixels, rng)
    if rng.random() < 0.6:
        pixels += rng.uniform(0.05, 0.5) * _pink_noise(rng, drawn_px)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return image.resize((side_px, side_px), Image.Resampling.BICUBIC)
