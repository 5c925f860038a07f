"""Text in pictures against text in captions: which script it is in, what a caption quotes, how much of it is there.

Place in the flow: the `ocr` filter scores pictures with it; a reward on rendered text compares the same way. Pure
functions on strings. Refuses to guess a language below the script: Latin letters count as English, Han without Kana or
Hangul as Chinese, all else as other.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

Language = Literal["en", "zh", "other", "none"]

MAX_QUOTE_CHARACTERS: Final = 400
"""What stands between two marks further apart is not one quoted text: a mark is missing somewhere."""

_MIN_SHARE: Final = 0.5
_KANA_OR_HANGUL_SHARE: Final = 0.1
"""Japanese is mostly Han with some Kana: from this share on, it is not Chinese."""

_ANY: Final = r"((?:(?!{close}).){{0,%d}}?)" % MAX_QUOTE_CHARACTERS
_LATIN: Final = "A-Za-z\\u00c0-\\u024f"
_PAIRS: Final = (("“", "”"), ("「", "」"), ("『", "』"), ("《", "》"))
# A straight mark opens neither after a Latin letter nor after a digit (12" is a measure), and an apostrophe within a word
# closes nothing. Chinese is written without spaces around marks.
_QUOTED: Final = re.compile(
    "|".join(
        [
            f'(?<![0-9{_LATIN}])"' + _ANY.format(close='"') + '"',
            *(opening + _ANY.format(close=closing) + closing for opening, closing in _PAIRS),
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
_SCRIPTS: Final = {
    "LATIN": "latin",
    "CJK": "han",
    "HIRAGANA": "kana_or_hangul",
    "KATAKANA": "kana_or_hangul",
    "HANGUL": "kana_or_hangul",
}


def script_counts(text: str) -> dict[str, int]:
    """Letters by script: `latin`, `han`, `kana_or_hangul`, `other`. Digits, signs and spaces count for none."""
    counts = dict.fromkeys(("latin", "han", "kana_or_hangul", "other"), 0)
    for character in unicodedata.normalize("NFKC", text):
        if unicodedata.category(character).startswith("L"):
            first_word = re.match("[A-Z]*", unicodedata.name(character, ""))
            counts[_SCRIPTS.get(first_word.group() if first_word else "", "other")] += 1
    return counts


def language(text: str) -> Language:
    """The language by scripts: `en` or `zh` if most letters are Latin or Han (a Han character weighs as much as two
    Latin letters, being about half a word), `none` without any letter or digit."""
    counts = script_counts(text)
    weights = {"en": counts["latin"], "zh": 2 * counts["han"], "other": counts["kana_or_hangul"] + counts["other"]}
    total = sum(weights.values())
    if not total:
        return "en" if any(character.isdigit() for character in text) else "none"
    if counts["kana_or_hangul"] > _KANA_OR_HANGUL_SHARE * (counts["han"] + counts["kana_or_hangul"]) > 0:
        weights["other"] += weights["zh"]
        weights["zh"] = 0
    if weights["zh"] >= _MIN_SHARE * total:
        return "zh"
    return "en" if weights["en"] >= _MIN_SHARE * total else "other"


def quoted_texts(caption: str) -> list[str]:
    """What the caption puts between "", '', “”, ‘’, 「」, 『』 or 《》, in order, each text once; outermost marks count."""
    found = (next(group for group in match.groups() if group is not None) for match in _QUOTED.finditer(caption))
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
