"""Compositional pictures: text on a sheet, a board or a sign, which stands in a scene.

Place in the flow: `draw.py` calls these by template. The thing is written on at twice its size, turned a little, and
laid into the scene with a shadow, so that letters stay sharp. The scene is drawn by rule, or a picture of the user's.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from producers.synthetic_text import textures
from producers.synthetic_text.layout import RGB, Page
from producers.synthetic_text.recipe import Recipe

_SCALE: Final = 2
_INKS: Final[tuple[RGB, ...]] = ((26, 26, 30), (34, 44, 92), (110, 28, 32), (28, 70, 48))
_PAINTS: Final[tuple[RGB, ...]] = ((248, 238, 214), (255, 250, 240), (250, 214, 120))
_SIGNS: Final[tuple[RGB, ...]] = ((22, 94, 62), (24, 66, 140), (150, 28, 34), (52, 56, 62))


def paper(recipe: Recipe, random: Random, rng: np.random.Generator) -> tuple[Image.Image, list[str]]:
    """A sheet on a wooden table, or on the given picture."""
    width, height = recipe.width, recipe.height
    scene = _scene(recipe, rng, lambda: textures.wood(rng, height, width, planks=random.randint(3, 5)))
    size = (int(width * random.uniform(0.62, 0.74)) * _SCALE, int(height * random.uniform(0.6, 0.72)) * _SCALE)
    sheet = textures.picture(textures.paper(rng, size[1], size[0]))
    page = Page(sheet, recipe.font, recipe.language)
    edge = size[0] * 0.09
    ink = random.choice(_INKS)
    top = edge
    if len(recipe.texts) > 1:
        heading = (edge, edge, size[0] - edge, edge + size[1] * 0.22)
        top = page.write(recipe.texts[0], heading, ink, max_size=size[0] / 12, align="centre", bold=True) + edge * 0.4
    page.write(recipe.texts[-1], (edge, top, size[0] - edge, size[1] - edge), ink, max_size=size[0] / 15, spacing=1.4)
    return _lay(scene, sheet, Image.new("L", size, 255), random, turn=5.0), page.drawn


def board(recipe: Recipe, random: Random, rng: np.random.Generator) -> tuple[Image.Image, list[str]]:
    """A painted wooden board on a wall."""
    width, height = recipe.width, recipe.height
    wall = random.choice([textures.brick, textures.plaster])
    scene = _scene(recipe, rng, lambda: wall(rng, height, width))
    size = (int(width * random.uniform(0.6, 0.76)) * _SCALE, int(height * random.uniform(0.3, 0.42)) * _SCALE)
    wood = textures.wood(rng, size[1], size[0], colour=random.choice([(96, 64, 42), (78, 56, 44), (58, 70, 66)]))
    plank = textures.picture(wood)
    page = Page(plank, recipe.font, recipe.language)
    radius = size[1] // 12
    page.pen.rounded_rectangle(
        (radius, radius, size[0] - radius, size[1] - radius),
        radius,
        outline=_darker(random.choice(_PAINTS)),
        width=size[1] // 60 + 1,
    )
    inner = (size[0] * 0.1, size[1] * 0.18, size[0] * 0.9, size[1] * 0.82)
    page.write(
        recipe.texts[0], inner, random.choice(_PAINTS), max_size=size[1] * 0.4, align="centre", middle=True, bold=True
    )
    return _lay(scene, plank, _rounded(size, radius), random, turn=2.0), page.drawn


def street(recipe: Recipe, random: Random, rng: np.random.Generator) -> tuple[Image.Image, list[str]]:
    """A metal sign on a pole, outdoors."""
    width, height = recipe.width, recipe.height
    scene = _scene(recipe, rng, lambda: textures.outdoors(rng, height, width))
    size = (int(width * random.uniform(0.56, 0.7)) * _SCALE, int(height * random.uniform(0.2, 0.28)) * _SCALE)
    colour = random.choice(_SIGNS)
    plate = Image.new("RGB", size, colour)
    page = Page(plate, recipe.font, recipe.language)
    radius = size[1] // 8
    page.pen.rounded_rectangle(
        (radius // 2, radius // 2, size[0] - radius // 2, size[1] - radius // 2),
        radius,
        outline=(240, 240, 240),
        width=size[1] // 26 + 1,
    )
    inner = (size[0] * 0.09, size[1] * 0.16, size[0] * 0.91, size[1] * 0.84)
    page.write(recipe.texts[0], inner, (250, 250, 250), max_size=size[1] * 0.5, align="centre", middle=True, bold=True)
    left, top = (width - size[0] // _SCALE) // 2, int(height * random.uniform(0.14, 0.3))
    pen, thick = ImageDraw.Draw(scene), max(4, width // 50)
    middle = width // 2
    pen.rectangle((middle - thick // 2, top, middle + thick // 2, height), fill=(120, 122, 126))
    pen.line((middle - thick // 4, top, middle - thick // 4, height), fill=(164, 166, 170), width=max(1, thick // 4))
    return _lay(scene, plate, _rounded(size, radius), random, turn=0.6, at=(left, top)), page.drawn


def _scene(recipe: Recipe, rng: np.random.Generator, make: Callable[[], textures.Pixels]) -> Image.Image:
    if not recipe.background:
        return textures.picture(make())
    with Image.open(recipe.background) as opened:
        upright = ImageOps.exif_transpose(opened).convert("RGB")
    return ImageOps.fit(upright, (recipe.width, recipe.height), Image.Resampling.LANCZOS)


def _lay(
    scene: Image.Image,
    thing: Image.Image,
    shape: Image.Image,
    random: Random,
    *,
    turn: float,
    at: tuple[int, int] | None = None,
) -> Image.Image:
    """Lay the thing into the scene (at its middle, or its corner `at`), turned up to `turn` degrees, with a shadow."""
    angle = random.uniform(-turn, turn)
    turned = thing.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    mask = shape.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    size = (turned.width // _SCALE, turned.height // _SCALE)
    turned, mask = turned.resize(size, Image.Resampling.LANCZOS), mask.resize(size, Image.Resampling.LANCZOS)
    if at is None:
        spare = (scene.width - size[0], scene.height - size[1])
        at = tuple(int(room * random.uniform(0.4, 0.6)) for room in spare)  # type: ignore[assignment]
        assert at is not None
    blur = max(2, scene.width // 90)
    shade = Image.new("L", scene.size, 0)
    shade.paste(mask.point(lambda value: value * 0.5), (at[0] + blur // 2, at[1] + blur))
    scene.paste((12, 10, 8), (0, 0), shade.filter(ImageFilter.GaussianBlur(blur)))
    scene.paste(turned, at, mask)
    return scene


def _rounded(size: tuple[int, int], radius: int) -> Image.Image:
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, size[0] - 1, size[1] - 1), radius, fill=255)
    return mask


def _darker(colour: RGB) -> RGB:
    red, green, blue = (int(value * 0.8) for value in colour)
    return red, green, blue
