"""Fonts: finding them, opening them, and telling which characters they have.

Place in the flow: the source chooses fonts and drops paragraphs that a font cannot write whole; `layout.py` measures
and draws with them. A font is named as `FILE` or `FILE#NUMBER` (inside a collection). Refuses to draw boxes for
letters.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final

from PIL import ImageFont

from producers.synthetic_text.recipe import Language

DEFAULT: Final = "default"
"""The font in Pillow itself: Latin letters without accents."""

_FOLDERS: Final = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
)
_NAMES: Final[dict[Language, tuple[str, ...]]] = {
    "en": (
        "DejaVuSans.ttf",
        "DejaVuSans-Bold.ttf",
        "DejaVuSerif.ttf",
        "LiberationSans-Regular.ttf",
        "LiberationSerif-Regular.ttf",
        "NotoSans-Regular.ttf",
        "NotoSerif-Regular.ttf",
    ),
    "zh": (
        "NotoSansCJK-Regular.ttc",
        "NotoSansCJK-Bold.ttc",
        "NotoSerifCJK-Regular.ttc",
        "NotoSansSC-Regular.otf",
        "NotoSerifSC-Regular.otf",
        "SourceHanSansSC-Regular.otf",
        "SourceHanSerifSC-Regular.otf",
        "wqy-microhei.ttc",
        "wqy-zenhei.ttc",
    ),
}
_PACKAGE: Final = "pylopdf_fonts_zh_cn"
_NOT_THERE: Final = "\uffff"
_PROBE: Final[dict[Language, str]] = {"en": "Aa", "zh": "的。"}


def find_fonts(language: Language, given: Sequence[str]) -> list[str]:
    """The given fonts, else those of the system and of the font package. Raises ValueError if there are none."""
    if given:
        fonts = [_member(os.path.abspath(os.path.expanduser(path)), language) for path in given]
        for font in fonts:
            if not can_write(font, _PROBE[language]):
                raise ValueError(f"{font} has no {'Chinese' if language == 'zh' else 'Latin'} letters")
        return fonts
    fonts = [_member(str(file), language) for file in _system_fonts(_NAMES[language])]
    fonts = [font for font in fonts if can_write(font, _PROBE[language])]
    if not fonts and language == "en":
        return [DEFAULT]
    if not fonts:
        raise ValueError(
            "there is no Chinese font: install one (Debian: fonts-noto-cjk; pip: qwenimg-dist[chinese]), name files in "
            "source.chinese_fonts, or set source.chinese=0"
        )
    return fonts


def _system_fonts(names: Sequence[str]) -> list[Path]:
    """In the order of `names`, each once."""
    wanted, found = set(names), dict[str, Path]()
    folders = [Path(folder).expanduser() for folder in _FOLDERS]
    package = importlib.util.find_spec(_PACKAGE)
    if package is not None and package.origin is not None:
        folders.append(Path(package.origin).parent)
    for top in folders:
        for folder, _, files in os.walk(top):
            for name in wanted.intersection(files):
                found.setdefault(name, Path(folder) / name)
    return [found[name] for name in names if name in found]


def _member(path: str, language: Language) -> str:
    """The font of a collection that has the simplified forms, if it says so; the first one otherwise."""
    file, _, number = path.partition("#")
    if not Path(file).is_file():
        raise ValueError(f"source: {file} is no font file")
    if number or language == "en" or not file.lower().endswith((".ttc", ".otc")):
        return path
    for index in range(64):
        try:
            if " SC" in str(open_font(f"{file}#{index}", 16).getname()[0]):
                return f"{file}#{index}"
        except OSError:
            break
    return file


@lru_cache(maxsize=256)
def open_font(font: str, size: int) -> ImageFont.FreeTypeFont:
    """Raises FileNotFoundError if the file is gone, OSError if it is no font."""
    if font == DEFAULT:
        built_in = ImageFont.load_default(size)
        if not isinstance(built_in, ImageFont.FreeTypeFont):
            raise OSError("Pillow was built without FreeType")
        return built_in
    file, _, number = font.partition("#")
    if not os.path.isfile(file):
        raise FileNotFoundError(f"the font {file} is gone")
    # The basic engine: what the other one gives depends on the machine's libraries.
    return ImageFont.truetype(file, size, index=int(number or 0), layout_engine=ImageFont.Layout.BASIC)


def can_write(font: str, text: Iterable[str]) -> bool:
    """Whether the font has every character of the text."""
    return all(_has(font, char) for char in set(text))


@lru_cache(maxsize=1 << 16)
def _has(font: str, char: str) -> bool:
    if char == " ":
        return True
    opened = open_font(font, 24)
    glyph = opened.getmask(char)
    return glyph.getbbox() is not None and bytes(glyph) != _missing(font)


@lru_cache(maxsize=64)
def _missing(font: str) -> bytes:
    """How the font draws what it lacks."""
    return bytes(open_font(font, 24).getmask(_NOT_THERE))
