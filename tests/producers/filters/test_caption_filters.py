"""Captions that say nothing are told from those that do; tokens are the pipeline's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from producer_world import SCORERS
from transformers import Qwen2Tokenizer

from producers.filters import FILTERS, validate_filters
from producers.filters.base import Facts, Rejection, Resources, Scorers, Values
from qwenimg_dist.compose import ConfigError


def ask(name: str, caption: str, **params: Any) -> tuple[Values, Rejection | None]:
    (bound,) = validate_filters({name: params})
    facts = Facts(num_bytes=1, width=1, height=1, captions=(caption,))
    (values,) = SCORERS.score(bound, [facts]) if bound.filter.load else [bound.score(facts)]
    assert set(values) == set(bound.filter.names)
    return values, bound.admit(values)


FIT = [
    "a red circle on a white background",
    "一只橘猫坐在窗台上，阳光从左侧照进来",
    'A neon sign that reads "www.example.com" above a door',
    "Café façade in Zürich, naïve art",
    "an image of 3 dogs",
    "a screenshot of logo.png in a folder",
    "scan of beach.jpg",
    "Portrait of a woman, 85mm, f/1.8",
    "I'm sorry for the mess: a child's note on a fridge",
    "{curly} braces around a word",
    "a shelf with red, green, blue, red, green, yellow and black books",
    "no",
    "B-17",
    "a photo taken in 2019",
    "happy birthday 🎂 cake with candles",
    "mirror ball, mirror ball, disco lights over the dance floor",
]


@pytest.mark.parametrize("caption", FIT)
def test_captions_that_speak_of_a_picture_stay(caption: str) -> None:
    values, rejection = ask("caption_validity", caption)
    assert rejection is None, rejection
    assert values["caption_fault"] == ""


FAULTY = [
    ("🎉🎉🎉", "caption_empty"),
    ("\u200b\u202e\u0007", "caption_empty"),
    ("... --- !!!", "caption_empty"),
    ('{"caption": "a cat", "score": 1}', "caption_not_text"),
    ('["a", "b"]', "caption_not_text"),
    ("I'm sorry, but I can't help with that request.", "caption_refusal"),
    ("I\u2019m sorry, I can\u2019t describe people.", "caption_refusal"),
    ("Sorry, I cannot identify the person.", "caption_refusal"),
    ("As an AI language model, I have no eyes.", "caption_refusal"),
    ("抱歉，我无法描述这张图片。", "caption_refusal"),
    ("Buy it now at https://shop.example.org/x?y=1", "caption_url"),
    ("photos by janedoe.com", "caption_url"),
    ("IMG_1234", "caption_file_name"),
    ("DSC00017.JPG", "caption_file_name"),
    ("holiday (3).jpeg", "caption_file_name"),
    ("Screenshot 2021-03-04 at 10.11.12", "caption_file_name"),
    ("8f14e45fceea167a5a36dedd4bea2543", "caption_file_name"),
    ("20190704_173000", "caption_file_name"),
    ("Image may contain: 2 people, people smiling", "caption_boilerplate"),
    ("Click to enlarge the image", "caption_boilerplate"),
    ("red car royalty-free stock photo", "caption_boilerplate"),
    ("a cat<br>on a mat", "caption_boilerplate"),
    ("暂无图片", "caption_boilerplate"),
    ("buy cheap shoes " * 20, "caption_repetition"),
    ("猫猫猫猫猫猫猫猫猫猫猫猫", "caption_repetition"),
    ("Кошка сидит на окне", "caption_script"),
    ("قطة تجلس على النافذة", "caption_script"),
    ("ねこがまどにすわっている", "caption_script"),
]


@pytest.mark.parametrize(("caption", "reason"), FAULTY)
def test_captions_that_do_not_are_taken_away_for_the_right_reason(caption: str, reason: str) -> None:
    _, rejection = ask("caption_validity", caption)
    assert rejection is not None
    assert rejection.reason == reason


def test_scripts_patterns_and_faults_are_the_users_choice() -> None:
    assert ask("caption_validity", "Кошка сидит на окне", scripts=("latin", "cyrillic"))[1] is None
    assert ask("caption_validity", "ねこがまどに", scripts=())[1] is None
    assert ask("caption_validity", "IMG_1234", reject=("url",))[1] is None
    values, rejection = ask("caption_validity", "Photo: ACME Studios", patterns=("^photo: acme",))
    assert (values["caption_fault"], rejection and rejection.reason) == ("boilerplate", "caption_boilerplate")
    with pytest.raises(ConfigError, match=r"filters.caption_validity.patterns.*not a regular expression"):
        validate_filters({"caption_validity": {"patterns": ["("]}})


def test_a_mixed_caption_has_the_share_of_its_letters() -> None:
    values, rejection = ask("caption_validity", "abcdef где", max_other_script=0.34)
    assert values["caption_other_script"] == pytest.approx(1 / 3)
    assert rejection is None
    assert ask("caption_validity", "abcdef где", max_other_script=0.33)[1] is not None


@pytest.mark.parametrize(
    ("caption", "reason"), [("a b c d", None), ("a b c", "caption_too_short"), ("a b c d e", "caption_too_long")]
)
def test_tokens_are_counted_by_the_pipelines_tokenizer(caption: str, reason: str | None) -> None:
    folder = Path(__file__).parents[3] / "qwenimg_dist" / "models" / "assets" / "tiny_tokenizer"
    count = len(Qwen2Tokenizer.from_pretrained(folder)("a b c d").input_ids)
    values, rejection = ask("caption_length", caption, min_tokens=count, max_tokens=count)
    assert values["caption_tokens"] == len(Qwen2Tokenizer.from_pretrained(folder)(caption).input_ids)
    assert (rejection.reason if rejection else None) == reason


def test_a_pipeline_without_tokenizer_is_named(tmp_path: Path) -> None:
    (bound,) = validate_filters({"caption_length": {}})
    with pytest.raises(ValueError, match=r"tokenizer is missing: filters.caption_length"):
        Scorers(Resources(pipeline_dir=tmp_path, device="cpu")).score(
            bound, [Facts(num_bytes=1, width=1, height=1, captions=("x",))]
        )


@pytest.mark.parametrize(
    ("captions", "category"),
    [
        (("a mountain lake at dawn",), "general"),
        (("a mandarin duck on a model railway",), "general"),
        (("an old man with a beard, close-up portrait",), "portrait"),
        (("一位穿红裙的少女站在海边",), "portrait"),
        (('a street with a sign "OPEN"',), "text"),
        (("墙上写着欢迎光临的招牌",), "text"),
        (("a minimalist poster and logo for a coffee brand",), "design"),
        (("一张音乐节海报的平面设计",), "design"),
        (("an evening", "a woman and a girl at a table"), "portrait"),
    ],
)
def test_rows_have_a_category(captions: tuple[str, ...], category: str) -> None:
    (bound,) = validate_filters({"category": {"reject": ["design"]}})
    values = bound.score(Facts(num_bytes=1, width=1, height=1, captions=captions))
    assert values == {"category": category}
    assert (bound.admit(values) is not None) == (category == "design")


def test_only_caption_filters_are_asked_per_caption() -> None:
    for name, one in FILTERS.items():
        assert not one.per_caption or one.looks_at == "captions", name
        assert not one.reads_captions or one.looks_at == "pixels", name
