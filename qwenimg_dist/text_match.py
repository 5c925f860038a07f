"""Text in pictures against text in captions: which script it is in, what a caption quotes, how much of it is there.

Place in the flow: the `ocr` filter scores pictures with it; a reward on rendered text compares the same way. Pure
functions on strings. Refuses to guess a language below the script: Latin letters count as English, Han without Kana or
Hangul as Chinese, all else as other.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

Language = Literal["en", "zh", "other", "none"]

MAX_QUOTE_CHARACTERS: Final = 400
"""What stands between two marks further apart is not one quoted text: a mark is missing somewhere."""

_MIN_SHARE: Final = 0.5
_KANA_OR_HANGUL_SHARE: Final = 0.1
"""Japanese is mostly Han with some Kana: from this share on, it is not Chinese."""

_ANY: Final = rf"((?:(?!{{}}).){{{{0,{MAX_QUOTE_CHARACTERS}}}}}?)"
_LATIN: Final = "A-Za-z\\u00c0-\\u024f"
_PAIRS: Final = (("“", "”"), ("「", "」"), ("『", "』"), ("《", "》"))
# A straight mark opens neither after a Latin letter nor after a digit (12" is a measure), and an apostrophe within a
# word closes nothing. Chinese is written without spaces around marks.
QUOTED: Final = re.compile(
    "|".join(
        [
            f'(?<![0-9{_LATIN}])"' + _ANY.format('"') + '"',
            *(opening + _ANY.format(closing) + closing for opening, closing in _PAIRS),
            *(
                rf"(?<![0-9{_LATIN}]){opening}"
                rf"((?:[^{closing}]|(?<=[{_LATIN}]){closing}(?=[{_LATIN}])){{0,{MAX_QUOTE_CHARACTERS}}}?)"
                rf"{closing}(?![{_LATIN}])"
                for opening, closing in (("'", "'"), ("‘", "’"))
            ),
        ]
    ),
    re.DOTALL,
)
"""One quoted text with its marks."""
_NAMES: Final = {"CJK": "han", "IDEOGRAPHIC": "han", "HIRAGANA": "kana", "KATAKANA": "kana"}


@lru_cache(maxsize=1 << 16)
def script_of(character: str) -> str:
    """The letter's script by its Unicode name: `latin`, `han`, `kana`, `hangul`, `cyrillic`, `arabic`, ..."""
    first = unicodedata.name(character, "OTHER").split(" ")[0].split("-")[0]
    if first in ("FULLWIDTH", "HALFWIDTH", "MODIFIER", "MATHEMATICAL", "FEMININE", "MASCULINE", "MICRO"):
        return "latin"
    return _NAMES.get(first, first.lower())


def script_counts(text: str) -> Counter[str]:
    """Letters by script. Digits, signs and spaces count for none."""
    return Counter(script_of(character) for character in unicodedata.normalize("NFKC", text) if character.isalpha())


def language(text: str) -> Language:
    """The language by scripts: `en` or `zh` if most letters are Latin or Han (a Han character weighs as much as two
    Latin letters, being about half a word), `none` without any letter or digit."""
    counts = script_counts(text)
    foreign = counts["kana"] + counts["hangul"]
    weights = {"en": counts["latin"], "zh": 2 * counts["han"]}
    weights["other"] = counts.total() - counts["latin"] - counts["han"]
    total = sum(weights.values())
    if not total:
        return "en" if any(character.isdigit() for character in text) else "none"
    if foreign > _KANA_OR_HANGUL_SHARE * (counts["han"] + foreign):
        weights["other"] += weights.pop("zh")
    if weights.get("zh", 0) >= _MIN_SHARE * total:
        return "zh"
    return "en" if weights["en"] >= _MIN_SHARE * total else "other"


def quoted_texts(caption: str) -> list[str]:
    """What stands between "", '', “”, ‘’, 「」, 『』 or 《》: the text that the picture is to show. In order, each
    once; the outermost marks count."""
    found = (next(group for group in match.groups() if group is not None) for match in QUOTED.finditer(caption))
    return list(dict.fromkeys(text.strip() for text in found if normalise(text)))


def normalise(text: str) -> str:
    """Letters and digits alone, width and case folded: what reading a picture can be held to. OCR loses spaces and
    confuses punctuation."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(character for character in folded if unicodedata.category(character)[0] in "LMN")


def edit_similarity(a: str, b: str) -> float:
    """1 - Levenshtein distance / length of the longer, of the normalised texts; 1.0 for two empty ones."""
    a, b = normalise(a), normalise(b)
    longer = max(len(a), len(b))
    return 1.0 - float(_last_row(a, b, anywhere=False)[-1]) / longer if longer else 1.0


def found_similarity(quote: str, text: str) -> float:
    """How well `quote` is found somewhere in `text`, 0 to 1: 1 - smallest edit distance to any part of it / length of
    the quote, both normalised (Sellers' alignment). What else stands in `text` costs nothing."""
    quote, text = normalise(quote), normalise(text)
    if not quote:
        return 1.0
    return max(0.0, 1.0 - float(_last_row(quote, text, anywhere=True).min()) / len(quote))


def quotes_found(quotes: Iterable[str], text: str) -> float:
    """Mean of `found_similarity` over the quotes, each weighing as many characters as it has; 1.0 if there are none."""
    weighed = [(len(normalise(quote)), found_similarity(quote, text)) for quote in quotes]
    total = sum(weight for weight, _ in weighed)
    return sum(weight * similarity for weight, similarity in weighed) / total if total else 1.0


def in_order_of(quotes: Iterable[str], text: str) -> list[str]:
    """The quotes in the order in which they are best found in `text`: a picture may show them in another than the
    caption names them in."""
    whole = normalise(text)

    def end(quote: str) -> int:
        return int(_last_row(normalise(quote), whole, anywhere=True).argmin())

    return sorted(quotes, key=end)


def _last_row(pattern: str, text: str, *, anywhere: bool) -> npt.NDArray[np.int64]:
    """Edit distances of the whole pattern to `text[:j]`, (len(text) + 1,); with `anywhere` to the best part of the text
    that ends at j."""
    codes = np.array([ord(character) for character in text], dtype=np.int64)
    steps = np.arange(len(text) + 1, dtype=np.int64)
    row = np.zeros_like(steps) if anywhere else steps.copy()
    for number, character in enumerate(pattern, start=1):
        best = np.empty_like(row)
        best[0] = number
        best[1:] = np.minimum(row[:-1] + (codes != ord(character)), row[1:] + 1)
        # Insertions run along the row: min over k <= j of best[k] + (j - k).
        row = np.minimum.accumulate(best - steps) + steps
    return row
