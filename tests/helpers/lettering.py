"""Draws text with fonts that packages carry: DejaVu (matplotlib's) and Noto Sans SC."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pylopdf_fonts_zh_cn
from PIL import Image, ImageDraw, ImageFont

LATIN = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
"""Latin, Cyrillic, Greek and Arabic."""
CHINESE = Path(pylopdf_fonts_zh_cn.__file__).parent / "NotoSansSC-Regular.otf"


def write(
    image: Image.Image, text: str, size: int, at: tuple[int, int], font: Path = LATIN, fill: str = "black"
) -> None:
    """Put text on the picture, its top left corner at (x, y)."""
    ImageDraw.Draw(image).text(at, text, font=ImageFont.truetype(str(font), size), fill=fill)


def page(
    *texts: tuple[str, int, tuple[int, int]], font: Path = LATIN, size: tuple[int, int] = (512, 384)
) -> Image.Image:
    """White, with each text at its size and place."""
    image = Image.new("RGB", size, "white")
    for text, text_size, at in texts:
        write(image, text, text_size, at, font)
    return image
