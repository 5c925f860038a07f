"""Pictures of text made from a seed: pure, compositional and complex, English and Chinese, with captions that quote it.

Row number i is a pure function of (seed, i, the corpus, the fonts and backgrounds there are): asking for more rows
appends to those there were. A uri holds the whole recipe, and the picture is drawn whenever its bytes are read. Texts
come from `source.path` (one paragraph per line) or from a few built-in sentences; a paragraph with a single character
that the row's font lacks is dropped, and so is one that holds quotation marks or is too long for its page.
Deliberately left out: right-to-left and vertical text.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Final

from producers.sources.base import Found, SourceRow
from producers.sources.folder import EXTENSIONS
from producers.synthetic_text import words
from producers.synthetic_text.captions import MARKS, caption
from producers.synthetic_text.draw import TEMPLATES
from producers.synthetic_text.fonts import can_write, find_fonts
from producers.synthetic_text.recipe import Language, Recipe, Style
from qwenimg_dist.config import SyntheticTextSource

_ASPECTS: Final = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3))
_WIDE: Final = ((4, 3), (3, 2), (16, 9))
_LONGEST: Final[dict[Language, int]] = {"en": 320, "zh": 120}
"""Characters of a paragraph; more would have to be set too small to read at 256 px."""
_FULL_SIZE: Final = 400
"""Smaller pictures hold less, by their area."""
_LONGEST_WORD: Final = 18
_TRIES: Final = 50


class SyntheticText:
    """`source=synthetic_text`."""

    def __init__(self, config: SyntheticTextSource) -> None:
        self._config = config
        languages: list[tuple[Language, float, Sequence[str]]] = [
            ("en", config.english, config.fonts),
            ("zh", config.chinese, config.chinese_fonts),
        ]
        self._languages = {language: weight for language, weight, _ in languages if weight > 0}
        self._styles: dict[Style, float] = {
            "pure": config.pure,
            "compositional": config.compositional,
            "complex": config.complex,
        }
        if not self._languages or not any(self._styles.values()):
            raise ValueError("set one of source.english and source.chinese, and one of the styles, above 0")
        share = min(1.0, (config.size / _FULL_SIZE) ** 2)
        self._longest: dict[Language, int] = {one: int(count * share) for one, count in _LONGEST.items()}
        self._fonts = {one: find_fonts(one, given) for one, weight, given in languages if weight > 0}

    @property
    def root(self) -> str:
        return "/"

    def find(self, *, min_age_s: float = 0.0) -> Found:
        """See `Source.find`; `min_age_s` does not apply."""
        backgrounds = _pictures(self._config.backgrounds) if self._config.backgrounds else []
        corpus = self._corpus(Path(self._config.path)) if self._config.path else {}
        for language in self._languages:
            if self._config.path and not corpus[language]:
                name = {"en": "english", "zh": "chinese"}[language]
                raise ValueError(
                    f"{self._config.path} has no paragraph in this language that can be used: set source.{name}=0, or "
                    f"add lines of at most {self._longest[language]} characters without quotation marks"
                )
        dropped: Counter[str] = Counter()
        return Found(rows=self._rows(corpus, backgrounds, dropped), dropped=dropped)

    def _rows(
        self, corpus: dict[Language, list[str]], backgrounds: Sequence[str], dropped: Counter[str]
    ) -> Iterator[SourceRow]:
        for index in range(self._config.num_rows):
            recipe = self._recipe(index, corpus, backgrounds, dropped)
            yield SourceRow(uri=recipe.uri, captions=(caption(recipe),))

    def _recipe(
        self, index: int, corpus: dict[Language, list[str]], backgrounds: Sequence[str], dropped: Counter[str]
    ) -> Recipe:
        random = Random(f"{self._config.seed} {index}")
        language = random.choices(list(self._languages), list(self._languages.values()))[0]
        style = random.choices(list(self._styles), list(self._styles.values()))[0]
        template = random.choice(TEMPLATES[style])
        font = random.choice(self._fonts[language])
        for _ in range(_TRIES):
            texts = self._texts(random, template, language, corpus.get(language, []))
            if all(can_write(font, text) for text in texts):
                break
            dropped["paragraphs with characters that the font lacks"] += 1
        else:
            raise ValueError(
                f"{font} lacks letters of nearly every paragraph of {self._config.path}: name other fonts in "
                f"source.{'chinese_fonts' if language == 'zh' else 'fonts'}"
            )
        wide, tall = random.choice(_WIDE if style == "complex" else _ASPECTS)
        side = self._config.size / (wide * tall) ** 0.5
        return Recipe(
            style=style,
            template=template,
            language=language,
            seed=random.randrange(2**32),
            width=round(wide * side / 16) * 16,
            height=round(tall * side / 16) * 16,
            font=font,
            texts=tuple(texts),
            background=random.choice(backgrounds) if backgrounds and style == "compositional" else "",
        )

    def _texts(self, random: Random, template: str, language: Language, corpus: Sequence[str]) -> list[str]:
        """What is written on one picture, in the template's order."""

        def paragraph() -> str:
            return random.choice(corpus) if corpus else words.paragraph(random, language, self._longest[language])

        if template in ("paragraph", "paper"):
            return [*([words.title(random, language)] if random.random() < 0.5 else []), paragraph()]
        if template in ("board", "street"):
            return [words.sign(random, language)]
        if template == "slide":
            points = list(dict.fromkeys(words.phrase(random, language) for _ in range(random.randint(2, 4))))
            return [words.title(random, language), *points]
        if template == "app":
            entries = words.labels(random, language, 5)
            return [words.title(random, language), *entries[:4], paragraph(), entries[4]]
        texts = [words.title(random, language)]
        for dish in words.dishes(random, language, random.randint(3, 5)):
            price = random.randint(6, 96)
            texts += [dish, f"{price}元" if language == "zh" else f"${price}.{random.choice(['00', '50', '90'])}"]
        return texts

    def _corpus(self, file: Path) -> dict[Language, list[str]]:
        """Language -> paragraphs. Raises ValueError if the file cannot be read."""
        found: dict[Language, list[str]] = {"en": [], "zh": []}
        try:
            with open(file, encoding="utf-8-sig") as lines:
                for line in lines:
                    text = " ".join(line.split())
                    language: Language = "zh" if _is_chinese(text) else "en"
                    if text and len(text) <= self._longest[language] and _usable(text, language):
                        found[language].append(text)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"source.path={file} cannot be read as UTF-8 text ({error})") from error
        return found


def _is_chinese(text: str) -> bool:
    return sum("\u4e00" <= char <= "\u9fff" for char in text) * 3 > len(text)


def _usable(text: str, language: Language) -> bool:
    if any(mark in text for mark in (*MARKS["en"], *MARKS["zh"])):
        return False
    return language == "zh" or max(map(len, text.split(" "))) <= _LONGEST_WORD


def _pictures(folder: str) -> list[str]:
    """Absolute paths of a folder's pictures. Raises ValueError if there are none."""
    found = [
        os.path.abspath(os.path.join(top, name))
        for top, _, names in os.walk(os.path.expanduser(folder))
        for name in names
        if os.path.splitext(name)[1].lower() in EXTENSIONS
    ]
    if not found:
        raise ValueError(f"source.backgrounds={folder} holds no pictures; is it right?")
    return sorted(found)
