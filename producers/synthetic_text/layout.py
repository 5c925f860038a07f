"""Setting text: the largest size at which a text fits a box, its lines, and drawing them.

Place in the flow: `draw.py` and its templates put every text on a picture through a `Page`, which remembers what it
drew. Refuses to draw text that would leave its box: better no picture than one that lacks a word of its caption.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from PIL import Image, ImageDraw

from producers.synthetic_text.fonts import open_font
from producers.synthetic_text.recipe import Language

RGB = tuple[int, int, int]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom; px."""
Align = Literal["left", "centre", "right"]

MIN_SIZE: Final = 9
_NO_LINE_START: Final = frozenset("，。、；：！？”’）》】")


class DoesNotFitError(OSError):
    """A text is too long for the place it should stand in."""


@dataclass
class Page:
    """A picture that is written on."""

    image: Image.Image
    font: str
    language: Language
    drawn: list[str] = field(default_factory=list)
    """Each text that was drawn, put together again from its lines."""

    def __post_init__(self) -> None:
        self.pen = ImageDraw.Draw(self.image)

    def write(
        self,
        text: str,
        box: Box,
        colour: RGB,
        *,
        max_size: float,
        align: Align = "left",
        middle: bool = False,
        spacing: float = 1.3,
        bold: bool = False,
    ) -> float:
        """Write into the box, at the largest size up to `max_size` that fits; returns the lower edge of the text.

        `middle` centres it from top to bottom. Raises `DoesNotFitError`.
        """
        size, lines = fit(text, self.font, self.language, box, max_size, spacing)
        font = open_font(self.font, size)
        height = len(lines) * size * spacing
        top = box[1] + (max(0.0, box[3] - box[1] - height) / 2 if middle else 0.0)
        ascent, descent = font.getmetrics()
        # Small letters would run into each other, and bold fonts need no help.
        stroke = size // 30 if bold and "bold" not in self.font.lower() else 0
        lead = (size * spacing - (ascent + descent)) / 2
        for number, line in enumerate(lines):
            slack = box[2] - box[0] - font.getlength(line)
            left = box[0] + {"left": 0.0, "centre": slack / 2, "right": slack}[align]
            place = (round(left), round(top + number * size * spacing + lead))
            self.pen.text(place, line, fill=colour, font=font, stroke_width=stroke)
        self.drawn.append(("" if self.language == "zh" else " ").join(lines))
        return top + height


def fit(
    text: str, font: str, language: Language, box: Box, max_size: float, spacing: float = 1.3
) -> tuple[int, list[str]]:
    """(size, lines) of the largest size up to `max_size` at which the text fits. Raises `DoesNotFitError`."""
    low, high = MIN_SIZE, max(MIN_SIZE, int(max_size))
    best: tuple[int, list[str]] | None = None
    while low <= high:
        size = (low + high) // 2
        lines = wrap(text, font, size, language, box[2] - box[0])
        if lines is not None and len(lines) * size * spacing <= box[3] - box[1]:
            best, low = (size, lines), size + 1
        else:
            high = size - 1
    if best is None:
        raise DoesNotFitError(f"a text of {len(text)} characters does not fit into {_show(box)} px")
    return best


def wrap(text: str, font: str, size: int, language: Language, width: float) -> list[str] | None:
    """The text in lines no wider than `width`; None if a word is. English breaks at spaces, Chinese anywhere but
    before closing punctuation."""
    opened, glue = open_font(font, size), "" if language == "zh" else " "
    lines: list[str] = []
    line = ""
    for word in _words(text, language):
        longer = f"{line}{glue}{word}" if line else word
        if opened.getlength(longer) <= width:
            line = longer
            continue
        if not line or opened.getlength(word) > width:
            return None
        lines.append(line)
        line = word
    return [*lines, line]


def _words(text: str, language: Language) -> list[str]:
    if language == "en":
        return text.split(" ")
    words: list[str] = []
    for char in text:
        if words and char in _NO_LINE_START:
            words[-1] += char
        else:
            words.append(char)
    return words


def _show(box: Box) -> str:
    return f"{box[2] - box[0]:.0f}x{box[3] - box[1]:.0f}"
