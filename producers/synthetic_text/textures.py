"""Materials and scenes made by rule: wood, paper, plaster, brick, sky; (H, W, 3) float32 arrays in 0..255.

Place in the flow: `compositional.py` puts written things into them. All from one numpy generator, so a seed gives the
same pixels.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.float32]
Rng = np.random.Generator
RGB = tuple[int, int, int]

_WOODS: tuple[RGB, ...] = ((150, 104, 62), (112, 74, 44), (186, 142, 94), (92, 62, 42))
_PLASTERS: tuple[RGB, ...] = ((214, 206, 190), (186, 196, 200), (222, 200, 176), (170, 178, 160))


def clouds(rng: Rng, height: int, width: int, cells: tuple[int, int]) -> Pixels:
    """Soft noise in -1..1, with about `cells` (rows, columns) bumps."""
    coarse = rng.uniform(-1, 1, (cells[0] + 1, cells[1] + 1)).astype(np.float32)
    image = Image.fromarray(coarse, mode="F").resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.float32)


def wood(rng: Rng, height: int, width: int, *, colour: RGB | None = None, planks: int = 0) -> Pixels:
    """Grain along the width; with `planks`, that many boards with dark joints."""
    base = np.array(colour or _WOODS[rng.integers(len(_WOODS))], dtype=np.float32)
    rows = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    bend = 0.05 * clouds(rng, height, width, (3, 4))
    rings = np.sin((rows + bend) * rng.uniform(60, 110)) * 0.5 + np.sin((rows + 2 * bend) * 23) * 0.5
    fibre = clouds(rng, height, width, (max(2, height // 2), max(2, width // 60)))
    tone = 1 + 0.09 * rings + 0.10 * fibre + 0.10 * clouds(rng, height, width, (2, 2))
    if planks:
        edges = np.linspace(0, height, planks + 1).astype(int)
        for top, bottom in pairwise(edges):
            tone[top:bottom] *= rng.uniform(0.86, 1.1)
            tone[bottom - max(1, height // 220) : bottom] *= 0.45
    return _clip(base * tone[..., None])


def paper(rng: Rng, height: int, width: int) -> Pixels:
    """Off-white, with fibres and a slight stain."""
    base = np.array((250, 247, 238), dtype=np.float32) - rng.uniform(0, 14)
    tone = 1 + 0.012 * rng.standard_normal((height, width)).astype(np.float32)
    tone += 0.03 * clouds(rng, height, width, (3, 3))
    return _clip(base * tone[..., None])


def plaster(rng: Rng, height: int, width: int) -> Pixels:
    """A painted wall."""
    base = np.array(_PLASTERS[rng.integers(len(_PLASTERS))], dtype=np.float32)
    tone = 1 + 0.06 * clouds(rng, height, width, (4, 4)) + 0.04 * clouds(rng, height, width, (height // 6, width // 6))
    return _clip(base * tone[..., None])


def brick(rng: Rng, height: int, width: int) -> Pixels:
    """Rows of bricks, every other one shifted by half a brick."""
    tall = max(14, height // 14)
    long = tall * 3
    rows, columns = np.mgrid[0:height, 0:width]
    course = rows // tall
    shifted = columns + (course % 2) * (long // 2)
    joint = (rows % tall < max(2, tall // 9)) | (shifted % long < max(2, tall // 9))
    shades = rng.uniform(0.82, 1.14, (height // tall + 2, width // long + 3)).astype(np.float32)
    tone = shades[course, shifted // long] * (1 + 0.05 * clouds(rng, height, width, (height // 4, width // 4)))
    wall = np.array((158, 78, 60), dtype=np.float32) * tone[..., None]
    wall[joint] = np.array((176, 168, 158), dtype=np.float32)
    return _clip(wall)


def outdoors(rng: Rng, height: int, width: int) -> Pixels:
    """A sky with clouds above a strip of hills and a road."""
    down = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    sky = np.array((96, 156, 222), np.float32) * (1 - down) + np.array((214, 232, 246), np.float32) * down
    white = np.clip(clouds(rng, height, width, (5, 4)) + 0.4 * clouds(rng, height, width, (14, 12)), 0, 1)
    scene = sky + (250 - sky) * (0.8 * white[..., None])
    line = height * (0.72 + 0.05 * clouds(rng, 1, width, (1, 5))[0])
    rows = np.arange(height, dtype=np.float32)[:, None]
    hills = rows > line[None, :]
    grass = np.array((92, 134, 72), np.float32) * (
        1 + 0.12 * clouds(rng, height, width, (height // 5, width // 5))[..., None]
    )
    scene[hills] = grass[hills]
    road = rows > height * 0.9
    scene[np.broadcast_to(road, hills.shape)] = (104, 104, 108)
    return _clip(scene)


def picture(pixels: Pixels) -> Image.Image:
    """As an RGB picture."""
    return Image.fromarray(pixels.astype(np.uint8))


def _clip(pixels: npt.NDArray[np.floating]) -> Pixels:
    clipped: Pixels = np.clip(pixels, 0, 255).astype(np.float32)
    return clipped
