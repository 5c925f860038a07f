"""From a recipe to the bytes of its picture: the same bytes each time, since scan and encoding both read them.

Place in the flow: `sources/base.py` calls `draw_bytes` for `synthetic:` uris, wherever it would read a file. PNG with
fixed settings; another version of Pillow, zlib or the font may give other bytes, which the sha256 of the scan shows.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from random import Random
from typing import Final

import numpy as np
from PIL import Image

from producers.synthetic_text import compositional, flat
from producers.synthetic_text.recipe import Recipe, Style, parse

_FLAT: Final[dict[str, Callable[[Recipe, Random], tuple[Image.Image, list[str]]]]] = {
    "paragraph": flat.paragraph,
    "slide": flat.slide,
    "app": flat.app,
    "menu": flat.menu,
}
_SCENES: Final[dict[str, Callable[[Recipe, Random, np.random.Generator], tuple[Image.Image, list[str]]]]] = {
    "paper": compositional.paper,
    "board": compositional.board,
    "street": compositional.street,
}
TEMPLATES: Final[dict[Style, tuple[str, ...]]] = {
    "pure": ("paragraph",),
    "compositional": tuple(_SCENES),
    "complex": ("slide", "app", "menu"),
}


def draw(recipe: Recipe) -> tuple[Image.Image, list[str]]:
    """The picture, and each text that was drawn. Raises OSError if a font or background is gone, `DoesNotFitError` (one
    too) if a text is too long for its place, ValueError for an unknown template."""
    random = Random(recipe.seed)
    if recipe.template in _FLAT:
        return _FLAT[recipe.template](recipe, random)
    if recipe.template in _SCENES:
        return _SCENES[recipe.template](recipe, random, np.random.default_rng(recipe.seed))
    raise ValueError(f"no template {recipe.template!a}")


def draw_bytes(uri: str) -> bytes:
    """PNG of the recipe in the uri."""
    buffer = io.BytesIO()
    draw(parse(uri))[0].save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
