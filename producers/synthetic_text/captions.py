"""The caption of a recipe: what kind of page it is, and every text on it, quoted to the letter.

Place in the flow: `sources/synthetic_text.py` lists it beside the recipe's uri. English texts stand between straight
quotes, Chinese ones between “”; the source drops texts that hold these marks themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from producers.synthetic_text.recipe import Language, Recipe

MARKS: Final[dict[Language, tuple[str, str]]] = {"en": ('"', '"'), "zh": ("“", "”")}


def caption(recipe: Recipe) -> str:
    """One or two sentences."""
    english, chinese = _CAPTIONS[recipe.template]
    opening, closing = MARKS[recipe.language]
    quoted = [f"{opening}{text}{closing}" for text in recipe.texts]
    return (chinese if recipe.language == "zh" else english)(quoted)


def _and(items: Sequence[str], word: str, comma: str) -> str:
    return items[0] if len(items) == 1 else comma.join(items[:-1]) + word + items[-1]


def _en(items: Sequence[str]) -> str:
    return _and(items, " and ", ", ")


def _zh(items: Sequence[str]) -> str:
    return _and(items, "和", "、")


def _titled(first: str, titled: str, plain: str) -> Callable[[Sequence[str]], str]:
    def say(quoted: Sequence[str]) -> str:
        return first + (titled if len(quoted) > 1 else plain).format(*quoted)

    return say


def _prices(quoted: Sequence[str], between: str) -> list[str]:
    return [f"{dish}{between}{price}" for dish, price in zip(quoted[1::2], quoted[2::2])]


_CAPTIONS: Final[dict[str, tuple[Callable[[Sequence[str]], str], Callable[[Sequence[str]], str]]]] = {
    "paragraph": (
        _titled("A clean page of text", " with the title {0} above the paragraph {1}", " that reads {0}"),
        _titled("一张干净的文字页面，", "标题是{0}，正文写着{1}", "上面写着{0}"),
    ),
    "paper": (
        _titled("A sheet of paper", " headed {0}, on which is printed {1}", " on which is printed {0}"),
        _titled("一张纸，", "标题是{0}，上面印着{1}", "上面印着{0}"),
    ),
    "board": (
        lambda quoted: f"A painted wooden board with the words {quoted[0]}",
        lambda quoted: f"一块刷了漆的木牌，上面写着{quoted[0]}",
    ),
    "street": (
        lambda quoted: f"A metal sign on a pole that says {quoted[0]}",
        lambda quoted: f"立在杆子上的金属标牌，写着{quoted[0]}",
    ),
    "slide": (
        lambda quoted: f"A presentation slide titled {quoted[0]} with the points {_en(quoted[1:])}",
        lambda quoted: f"一页演示文稿，标题是{quoted[0]}，要点有{_zh(quoted[1:])}",
    ),
    "app": (
        lambda quoted: (
            f"An app window titled {quoted[0]} with the menu entries {_en(quoted[1:5])}, the text {quoted[5]} and a "
            f"button labelled {quoted[6]}"
        ),
        lambda quoted: (
            f"一个应用窗口，标题是{quoted[0]}，菜单有{_zh(quoted[1:5])}，正文写着{quoted[5]}，按钮是{quoted[6]}"
        ),
    ),
    "menu": (
        lambda quoted: f"A menu headed {quoted[0]} that lists {_en(_prices(quoted, ' for '))}",
        lambda quoted: f"一份菜单，标题是{quoted[0]}，列有{_zh(_prices(quoted, '，价格'))}",
    ),
}
