"""Flat pictures: pure pages (paragraphs on clean backgrounds) and complex ones (slides, app windows, menus).

Place in the flow: `draw.py` calls these by template. Positions follow from the size of the page, variations from
the seed.
"""

from __future__ import annotations

from random import Random
from typing import Final

import numpy as np
from PIL import Image

from producers.synthetic_text.layout import RGB, Align, Page
from producers.synthetic_text.recipe import Recipe

_LIGHT: Final[tuple[RGB, ...]] = ((255, 255, 255), (250, 246, 236), (236, 243, 250), (238, 246, 238), (250, 238, 240))
_DARK: Final[tuple[RGB, ...]] = ((24, 26, 32), (20, 36, 58), (28, 48, 42), (58, 26, 36), (44, 34, 62))
_ACCENTS: Final[tuple[RGB, ...]] = ((36, 98, 190), (196, 62, 48), (26, 128, 96), (140, 72, 170), (206, 118, 20))
_WHITE: Final[RGB] = (255, 255, 255)


def paragraph(recipe: Recipe, random: Random) -> tuple[Image.Image, list[str]]:
    """A paragraph, perhaps under a title: margins, alignment and colours vary."""
    width, height = recipe.width, recipe.height
    paper, ink = random.choice(_LIGHT), random.choice(_DARK)
    if random.random() < 0.3:
        paper, ink = ink, paper
    image = _shaded(width, height, paper) if random.random() < 0.4 else Image.new("RGB", (width, height), paper)
    page = Page(image, recipe.font, recipe.language)
    edge = random.uniform(0.07, 0.16) * min(width, height)
    align: Align = random.choice(["left", "left", "centre"])
    spacing = random.uniform(1.25, 1.6)
    if random.random() < 0.3:
        page.pen.rectangle((edge / 2, edge / 2, width - edge / 2, height - edge / 2), outline=ink, width=2)
    top = edge
    if len(recipe.texts) > 1:
        heading = (edge, edge, width - edge, edge + height * 0.24)
        top = page.write(recipe.texts[0], heading, ink, max_size=height / 9, align=align, bold=True) + height * 0.03
    largest = random.uniform(0.045, 0.1) * min(width, height)
    body = (edge, top, width - edge, height - edge)
    page.write(
        recipe.texts[-1], body, ink, max_size=largest, align=align, middle=random.random() < 0.5, spacing=spacing
    )
    return image, page.drawn


def slide(recipe: Recipe, random: Random) -> tuple[Image.Image, list[str]]:
    """A title and points, with a bar or a column of colour and perhaps a chart."""
    width, height = recipe.width, recipe.height
    accent, ink = random.choice(_ACCENTS), random.choice(_DARK)
    image = Image.new("RGB", (width, height), _WHITE)
    page = Page(image, recipe.font, recipe.language)
    left, right = width * 0.08, width * 0.92
    if random.random() < 0.5:
        page.pen.rectangle((0, 0, width, height * 0.22), fill=accent)
        page.write(
            recipe.texts[0],
            (left, height * 0.05, right, height * 0.18),
            _WHITE,
            max_size=height / 9,
            middle=True,
            bold=True,
        )
    else:
        page.pen.rectangle((0, 0, width * 0.03, height), fill=accent)
        page.write(
            recipe.texts[0],
            (left, height * 0.05, right, height * 0.19),
            ink,
            max_size=height / 9,
            middle=True,
            bold=True,
        )
        page.pen.line((left, height * 0.21, right, height * 0.21), fill=accent, width=max(2, height // 200))
    chart = random.random() < 0.5 and width > height
    points, end = recipe.texts[1:], width * 0.6 if chart else right
    step = height * 0.66 / len(points)
    for number, text in enumerate(points):
        top = height * 0.28 + number * step
        dot = height * 0.014
        page.pen.ellipse((left, top + step * 0.4 - dot, left + 2 * dot, top + step * 0.4 + dot), fill=accent)
        page.write(text, (left + width * 0.04, top, end, top + step * 0.8), ink, max_size=height / 16, middle=True)
    if chart:
        _bars(page, random, (width * 0.66, height * 0.34, right, height * 0.88), accent)
    page.pen.rectangle((0, height * 0.97, width, height), fill=accent)
    return image, page.drawn


def app(recipe: Recipe, random: Random) -> tuple[Image.Image, list[str]]:
    """A window with a title, a menu of four entries, a text and a button: texts in this order."""
    width, height = recipe.width, recipe.height
    accent, dark = random.choice(_ACCENTS), random.random() < 0.35
    ground, panel, ink = (
        ((34, 37, 44), (46, 50, 58), (232, 234, 238)) if dark else ((246, 247, 250), _WHITE, (36, 40, 48))
    )
    image = Image.new("RGB", (width, height), ground)
    page = Page(image, recipe.font, recipe.language)
    bar, side, gap = height * 0.1, width * 0.28, width * 0.03
    page.pen.rectangle((0, 0, width, bar), fill=accent)
    for number, colour in enumerate(((236, 106, 94), (244, 191, 79), (97, 197, 84))):
        x = width - gap - (2 - number) * bar * 0.42
        page.pen.ellipse((x - bar * 0.14, bar * 0.36, x + bar * 0.14, bar * 0.64), fill=colour)
    title, *entries = recipe.texts[:5]
    text, button = recipe.texts[5:]
    page.write(title, (gap, bar * 0.15, width * 0.78, bar * 0.85), _WHITE, max_size=bar * 0.5, middle=True, bold=True)
    page.pen.rectangle((0, bar, side, height), fill=panel)
    chosen = random.randrange(len(entries))
    for number, entry in enumerate(entries):
        top = bar + gap + number * height * 0.11
        if number == chosen:
            page.pen.rounded_rectangle((gap / 2, top, side - gap / 2, top + height * 0.09), 6, fill=accent)
        place = (gap * 1.4, top, side - gap, top + height * 0.09)
        page.write(entry, place, _WHITE if number == chosen else ink, max_size=height * 0.042, middle=True)
    card = (side + gap, bar + gap, width - gap, height - gap)
    page.pen.rounded_rectangle(card, 10, fill=panel, outline=(128, 134, 144), width=1)
    body = (card[0] + gap, card[1] + gap, card[2] - gap, card[3] - height * 0.16)
    page.write(text, body, ink, max_size=height * 0.048, spacing=1.45)
    key = (card[2] - gap - width * 0.24, card[3] - height * 0.13, card[2] - gap, card[3] - height * 0.03)
    page.pen.rounded_rectangle(key, 8, fill=accent)
    inner = (key[0] + 6, key[1] + 4, key[2] - 6, key[3] - 4)
    page.write(button, inner, _WHITE, max_size=height * 0.042, align="centre", middle=True, spacing=1.1, bold=True)
    return image, page.drawn


def menu(recipe: Recipe, random: Random) -> tuple[Image.Image, list[str]]:
    """A title, then lines of a dish and its price, which alternate in the texts."""
    width, height = recipe.width, recipe.height
    paper, ink, accent = random.choice(_LIGHT), random.choice(_DARK), random.choice(_ACCENTS)
    image = Image.new("RGB", (width, height), paper)
    page = Page(image, recipe.font, recipe.language)
    edge = min(width, height) * 0.05
    page.pen.rectangle((edge, edge, width - edge, height - edge), outline=accent, width=max(2, width // 160))
    left, right = edge * 3, width - edge * 3
    heading = (left, edge * 2, right, height * 0.26)
    page.write(recipe.texts[0], heading, accent, max_size=height / 10, align="centre", middle=True, bold=True)
    page.pen.line((left, height * 0.28, right, height * 0.28), fill=accent, width=2)
    dishes, prices = recipe.texts[1::2], recipe.texts[2::2]
    step = min((height * 0.94 - edge - height * 0.32) / len(dishes), height * 0.14)
    for number, (dish, price) in enumerate(zip(dishes, prices)):
        top = height * 0.32 + number * step
        split = left + (right - left) * 0.72
        page.write(dish, (left, top, split, top + step * 0.9), ink, max_size=height / 18, middle=True)
        page.write(price, (split, top, right, top + step * 0.9), ink, max_size=height / 18, align="right", middle=True)
        page.pen.line((left, top + step * 0.95, right, top + step * 0.95), fill=(170, 170, 170), width=1)
    return image, page.drawn


def _shaded(width: int, height: int, colour: RGB) -> Image.Image:
    """A soft change of tone from top to bottom."""
    tone = np.linspace(1.0, 0.93, height)[:, None, None] * np.array(colour, dtype=np.float64)
    return Image.fromarray(np.broadcast_to(tone, (height, width, 3)).round().astype(np.uint8))


def _bars(page: Page, random: Random, box: tuple[float, float, float, float], colour: RGB) -> None:
    left, top, right, bottom = box
    step = (right - left) / 5
    for number in range(5):
        high = random.uniform(0.25, 1.0) * (bottom - top)
        page.pen.rectangle((left + number * step, bottom - high, left + (number + 0.7) * step, bottom), fill=colour)
    page.pen.line((left, bottom, right, bottom), fill=(90, 94, 100), width=2)
