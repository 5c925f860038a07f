"""Prompt enhancement without a language model: language, category, quotes around rendered text, a quality suffix.

Place in the flow: `sample.enhance=true` rewrites prompts with it, producers may caption with it (`captions.enhance`),
the filter `category` sorts captions by its words. Pure functions of the text; `enhance` is idempotent. Suffixes
are those of the Qwen-Image prompting guide (the seed reference), which tells three kinds of prompts apart; `design` is
the report's fourth. Deliberately left out: describing a person or a scene in more detail, which takes a language model.
"""

from __future__ import annotations

import re
from typing import Final, Literal

from qwenimg_dist.text_match import QUOTED, quoted_texts

Language = Literal["en", "zh"]
Category = Literal["general", "portrait", "text", "design"]

SUFFIXES: Final[dict[Language, str]] = {
    "en": "Ultra HD, 4K, cinematic composition",
    "zh": "超清，4K，电影级构图",
}
NEGATIVE_PROMPT: Final = "低分辨率，低画质，肢体畸形，手指畸形，画面过饱和，蜡像感"
"""Recommended for a model of full size; the tiny model knows only the empty prompt."""

_HAN: Final = re.compile("[\u4e00-\u9fff]")


def _words(*words: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(words)})\b", re.IGNORECASE)


# Of equal counts the earlier category wins; none at all is `general`.
_EN: Final[dict[Category, re.Pattern[str]]] = {
    "text": _words(
        "text", "texts", "words?", "letters?", "lettering", "captions?", "subtitles?", "signs?", "signboards?",
        "signage", "labels?", "labell?ed", "billboards?", "handwrit(?:ing|ten)", "calligraphy", "typography",
        "inscriptions?", "inscribed", "written", "says", "saying", "reads", "chalkboards?", "blackboards?",
        "newspapers?", "book cover", "graffiti",
    ),
    "design": _words(
        "posters?", "logos?", "banners?", "flyers?", "brochures?", "infographics?", "slides?", "powerpoint", "ppt",
        "ui", "user interface", "web ?pages?", "websites?", "app screens?", "screenshots?", "icons?", "mock-?ups?",
        "business cards?", "diagrams?", "charts?", "layouts?", "wireframes?", "packaging", "graphic design",
        "advert(?:isement)?s?", "invitations?", "menus?", "vector (?:art|graphics?)", "clip ?art", "wallpapers?",
    ),
    "portrait": _words(
        "portraits?", "selfies?", "headshots?", "wom[ae]n", "m[ae]n", "girls?", "boys?", "persons?", "people", "lady",
        "ladies", "gentlem[ae]n", "guys?", "child(?:ren)?", "kids?", "bab(?:y|ies)", "toddlers?", "teenagers?",
        "couples?", "brides?", "grooms?", "fashion models?", "faces?", "actors?", "actress(?:es)?", "singers?",
        "dancers?", "soldiers?", "mothers?", "fathers?", "grandmothers?", "grandfathers?", "elderly",
    ),
}  # fmt: skip
_ZH: Final[dict[Category, re.Pattern[str]]] = {
    "text": re.compile("文字|字样|写着|写有|标语|招牌|标牌|字幕|书法|题字|手写|对联|牌匾|标签|黑板"),
    "design": re.compile(
        "海报|标志设计|徽标|横幅|传单|宣传册|信息图|幻灯片|界面|网页|图标|名片|"
        "图表|流程图|排版|包装设计|平面设计|广告|请柬|菜单|截图"
    ),
    "portrait": re.compile(
        "肖像|人像|自拍|女人|男人|女子|男子|女性|男性|女孩|男孩|少女|少年|美女|帅哥|"
        "人物|老人|儿童|小孩|婴儿|孩子|新娘|新郎|情侣|模特|面部|脸"
    ),
}
"""Han is not cut into words: a word counts wherever its characters stand."""

# What is said to be written: a cue, then the words, up to the end of the clause.
_EN_CUE: Final = re.compile(
    r"\b(?:that (?:says|reads)|which (?:says|reads)|saying|reading|says|reads|"
    r"with the (?:text|words?|title|slogan|caption)|(?:labell?ed|titled|captioned))\b:?\s+"
    r"(?P<text>(?:[A-Z0-9][\w&'’!?-]*)(?:\s+(?:[A-Z0-9&][\w&'’!?-]*))*)"
)
_ZH_CUE: Final = re.compile(
    "(?:写着|写有|上书|印着|印有|标题为|标题是|文字为|内容为)[:：]?(?P<text>[^\\s，。；、,.;!?！？\"“”「」『』‘’']{1,40})"
)


def language_of(text: str) -> Language:
    """`zh` if there is one Han character, else `en`: which suffix fits."""
    return "zh" if _HAN.search(text) else "en"


def category_of(text: str) -> Category:
    """The category whose words occur most often; quoted text speaks for `text` as two words do."""
    plain = QUOTED.sub(" ", text)
    counts = {name: len(_EN[name].findall(plain)) + len(_ZH[name].findall(plain)) for name in _EN}
    counts["text"] += 2 * bool(quoted_texts(text))
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] else "general"


def quote_text(text: str) -> str:
    """Put quotation marks around rendered text that has none: `a sign that says OPEN` -> `a sign that says "OPEN"`.

    In English only capitalised words and numbers after the cue are taken for what is written.
    """

    def marked(found: re.Match[str]) -> str:
        start, end = (at - found.start() for at in found.span("text"))
        whole = found.group(0)
        return f'{whole[:start]}"{whole[start:end]}"{whole[end:]}'

    pieces, last = [], 0
    for quoted in (*QUOTED.finditer(text), None):  # what is quoted already stays
        end = quoted.start() if quoted else len(text)
        pieces.append(_ZH_CUE.sub(marked, _EN_CUE.sub(marked, text[last:end])))
        if quoted:
            pieces.append(quoted.group(0))
            last = quoted.end()
    return "".join(pieces)


def enhance(prompt: str) -> str:
    """Quote rendered text and end with the suffix of the prompt's language. The empty prompt stays empty."""
    text = quote_text(prompt.strip())
    language = language_of(text)
    suffix = SUFFIXES[language]
    if not text or suffix.casefold() in text.casefold():
        return text
    text = text.rstrip(" .,;。，；")
    return f"{text}，{suffix}" if language == "zh" else f"{text}, {suffix}"
