"""Takes away captions that say nothing of the picture: empty, data, refusals, URLs, file names, boilerplate, repeats.

The label is the first fault by pattern; scripts and repetition are shares with thresholds. A URL inside quotation marks
is text that the picture shows, and no fault. Scripts go by the Unicode names of the letters, so that an allow-list may
name any (`latin`, `han`, `kana`, `hangul`, `cyrillic`, `arabic`, ...).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Final, Literal

from pydantic import Field, field_validator

from producers.filters.base import Facts, Filter, FilterParams, Rejection, Resources, Scorer, Value, Values, number
from qwenimg_dist.text_match import quoted_texts, script_of

Fault = Literal["empty", "not_text", "refusal", "url", "file_name", "boilerplate"]

_URL: Final = re.compile(
    r"\b(?:https?://|www\.)\S+|\b[\w-]+\.(?:com|net|org|cn|io|de|co\.uk)(?:/\S*)?\b", re.IGNORECASE
)
_FILE_NAME: Final = re.compile(
    r"(?:[\w~.-]+(?: ?\(\d+\)| \d+)?\.(?:jpe?g|png|gif|webp|bmp|tiff?|heic|avif|svg|psd|raw|cr2|nef|mp4|mov|pdf))"
    r"|(?:(?:IMG|DSC[NF]?|DSC_|PXL|MVIMG|VID|GOPR|DJI|WP|Screenshot|Screen Shot|image|photo|pic|picture|untitled|"
    r"scan|thumb|图片|照片|截图|未命名)[ _-]?\(?[\d_.: -]{2,}\)?(?:at [\d.: -]+)?\w{0,3})"
    r"|(?:[0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}|[0-9a-f]{16,64}|[\d_.x -]{4,})",
    re.IGNORECASE,
)
"""The whole caption is one."""
_BOILERPLATE: Final = re.compile(
    r"\b(?:(?:image|photo|picture) may contain|may be an image of|no (?:photo )?description available|"
    r"click (?:here|to|on) (?:enlarge|view|zoom|the image|for)|(?:image|photo|picture) not (?:available|found)|"
    r"(?:free|royalty[- ]free) (?:stock )?(?:photos?|images?|vectors?|download)|"
    r"stock (?:photo|image|vector|illustration)s?|"
    r"(?:getty images|shutterstock|alamy|dreamstime|istock(?:photo)?|depositphotos)|all rights reserved|"
    r"(?:add|save) to (?:cart|wishlist|collection)|(?:view|see) (?:larger|full size|more) (?:image|photo)?|"
    r"placeholder (?:image|text)|lorem ipsum|default (?:image|alt)|loading\.{3})"
    r"|<(?:/?(?:a|br|div|img|p|span|b|i|strong|em|td|tr|ul|li|script)\b[^>]*)>|&(?:nbsp|quot|amp|lt|gt|#\d+);"
    r"|(?:点击(?:查看|放大|下载)|图片来源|版权所有|侵权(?:必究|删除)|暂无图片|图片加载|未经授权)",
    re.IGNORECASE,
)
_REFUSAL: Final = re.compile(
    r"\b(?:(?:i(?:['’]m| am) (?:very |so )?)?sorry\b[^.!?]{0,40}\b(?:can(?:['’]?t|not)|unable|not able|won['’]t)\b|"
    r"i(?:['’]m| am) (?:unable|not able) to|"
    r"i (?:can(?:['’]t|not)|won['’]t) "
    r"(?:help|assist|provide|describe|identify|view|see|create|comply|fulfill|process|generate)|"
    r"as an ai(?: language)? (?:model|assistant)|i (?:do not|don['’]t) (?:have the ability|see (?:any|an) image)|"
    r"(?:please|kindly) (?:provide|upload) (?:an?|the) (?:image|picture|photo))"
    r"|(?:抱歉|对不起)，?我|作为(?:一个|一名)?(?:人工智能|AI)|我无法(?:提供|描述|查看|识别|协助|满足)|请(?:提供|上传)(?:一张)?图片",
    re.IGNORECASE,
)
_RUN: Final = 3


class Params(FilterParams):
    reject: tuple[Fault, ...] = ("empty", "not_text", "refusal", "url", "file_name", "boilerplate")
    patterns: tuple[str, ...] = ()
    """Further boilerplate: regular expressions, searched whatever their case."""
    scripts: tuple[str, ...] = ("latin", "han")
    """Scripts that a caption may be written in; none named admits all."""
    max_other_script: float = Field(default=0.3, ge=0, le=1)
    max_repetition: float = Field(default=0.5, ge=0, le=1)

    @field_validator("patterns")
    @classmethod
    def _compile(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return patterns


def load(params: Params, resources: Resources) -> Scorer:
    """Nothing is loaded; the parameters decide the scores."""
    patterns = [re.compile(pattern, re.IGNORECASE) for pattern in params.patterns]

    def one(caption: str) -> dict[str, Value]:
        text = clean(caption)
        fault = fault_of(text) or ("boilerplate" if any(pattern.search(text) for pattern in patterns) else "")
        return {
            "caption_fault": fault,
            "caption_other_script": other_script(text, params.scripts) if params.scripts else 0.0,
            "caption_repetition": repetition(text),
        }

    def score(facts: Sequence[Facts]) -> list[dict[str, Value]]:
        return [one(each.captions[0]) for each in facts]

    return score


def clean(caption: str) -> str:
    """Without control and formatting characters (direction marks, zero widths, variation selectors), spaces single."""
    if caption.isascii() and caption.isprintable():
        return " ".join(caption.split())
    text = unicodedata.normalize("NFC", caption)
    return " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Co", "Cn") else c for c in text).split())


def fault_of(text: str) -> Fault | Literal[""]:
    """The first fault of a cleaned caption, by pattern."""
    if not any(char.isalnum() for char in text):
        return "empty"
    if text[0] in "{[" and _is_json(text):
        return "not_text"
    if _REFUSAL.search(text):
        return "refusal"
    plain = text
    for quoted in quoted_texts(text):
        plain = plain.replace(quoted, "")
    if _FILE_NAME.fullmatch(text):
        return "file_name"
    if _URL.search(plain):
        return "url"
    return "boilerplate" if _BOILERPLATE.search(plain) else ""


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def other_script(text: str, scripts: Sequence[str]) -> float:
    """Share of the letters that are written in none of these scripts."""
    letters = [char for char in text if char.isalpha()]
    return sum(script_of(char) not in scripts for char in letters) / len(letters) if letters else 0.0


def repetition(text: str) -> float:
    """Share of the runs of three words (Han: characters) that occurred before in the caption."""
    words = re.findall(r"[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7a3]|\w+", text.casefold())
    runs = [tuple(words[start : start + _RUN]) for start in range(len(words) - _RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if len(runs) > 1 else 0.0


def admit(values: Values, params: Params) -> Rejection | None:
    fault = values["caption_fault"]
    if fault in params.reject:
        return Rejection(reason=f"caption_{fault}", detail=f"the caption is {fault}, one of reject")
    other = number(values, "caption_other_script")
    if other > params.max_other_script:
        detail = f"{other:.2f} of its letters are not {', '.join(params.scripts)} > max_other_script"
        return Rejection(reason="caption_script", detail=f"{detail}={params.max_other_script}")
    repeated = number(values, "caption_repetition")
    if repeated > params.max_repetition:
        return Rejection(
            reason="caption_repetition", detail=f"{repeated:.2f} repeated > max_repetition={params.max_repetition}"
        )
    return None


FILTER = Filter(
    params=Params,
    stage=3,
    looks_at="captions",
    scores=("caption_other_script", "caption_repetition"),
    labels=("caption_fault",),
    load=load,
    scored_by=("patterns", "scripts"),
    per_caption=True,
    admit=admit,
)
