"""A recipe: everything that one synthetic picture is made of, and its uri, which holds all of it.

Place in the flow: `sources/synthetic_text.py` writes recipes into the listing; `draw.py` makes the picture whenever its
bytes are read. The seed decides layout and colours, the texts are there letter by letter. Refuses uris that were made
by another version of the drawing: its pictures would be others.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final, Literal, cast, get_args
from urllib.parse import parse_qsl, urlencode

SCHEME: Final = "synthetic:"
VERSION: Final = "1"
"""Counted up whenever the same recipe gives another picture."""

Style = Literal["pure", "compositional", "complex"]
Language = Literal["en", "zh"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One picture."""

    style: Style
    template: str
    """Of the style: what kind of page or scene."""
    language: Language
    seed: int
    width: int
    height: int
    font: str
    """File of the font, `#` and its number inside a collection; `default` is Pillow's own."""
    texts: tuple[str, ...]
    """What is written, in the template's order."""
    background: str = ""
    """Picture that the scene stands in; empty for one that is drawn."""

    @property
    def uri(self) -> str:
        """Injective; read back by `parse`."""
        fields = {
            "style": self.style,
            "template": self.template,
            "language": self.language,
            "seed": self.seed,
            "width": self.width,
            "height": self.height,
            "font": self.font,
            "background": self.background,
            "texts": json.dumps(self.texts, ensure_ascii=False),
        }
        return f"{SCHEME}{VERSION}?{urlencode(fields)}"


def parse(uri: str) -> Recipe:
    """Raises ValueError for what is no recipe of this version."""
    version, _, query = uri.removeprefix(SCHEME).partition("?")
    if version != VERSION:
        raise ValueError(f"recipe of version {version!a}, this program draws version {VERSION}: list the source anew")
    fields = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=True))
    try:
        style, language = fields["style"], fields["language"]
        texts = tuple(json.loads(fields["texts"]))
        if style not in get_args(Style) or language not in get_args(Language):
            raise ValueError(f"no style {style!a} in {language!a}")
        return Recipe(
            style=cast(Style, style),
            template=fields["template"],
            language=cast(Language, language),
            seed=int(fields["seed"]),
            width=int(fields["width"]),
            height=int(fields["height"]),
            font=fields["font"],
            texts=texts,
            background=fields["background"],
        )
    except KeyError as error:
        raise ValueError(f"a recipe without {error.args[0]}") from error
