"""The enhancement is a pure, idempotent function: language, quotes, suffix."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenimg_dist.commands.sample import conditions
from qwenimg_dist.compose import load_config
from qwenimg_dist.models.prompt_enhance import NEGATIVE_PROMPT, SUFFIXES, enhance, language_of, quote_text

EN, ZH = SUFFIXES["en"], SUFFIXES["zh"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a shop sign that says OPEN on a rainy street", 'a shop sign that says "OPEN" on a rainy street'),
        ("a poster with the title Summer Jam 2024, blue", 'a poster with the title "Summer Jam 2024", blue'),
        ('a sign that says "OPEN"', 'a sign that says "OPEN"'),
        ("a woman reading a book", "a woman reading a book"),
        ("店门口写着欢迎光临，夜晚", '店门口写着"欢迎光临"，夜晚'),
        ("店门口写着“欢迎光临”，夜晚", "店门口写着“欢迎光临”，夜晚"),
        ("a cat", "a cat"),
        ("", ""),
    ],
)
def test_rendered_text_gets_quotation_marks_once(text: str, expected: str) -> None:
    assert quote_text(text) == expected
    assert quote_text(expected) == expected


def test_the_suffix_is_that_of_the_language() -> None:
    assert enhance("a cat on a mat. ") == f"a cat on a mat, {EN}"
    assert enhance("一只猫。") == f"一只猫，{ZH}"
    assert enhance("a sign that says 你好") == f"a sign that says 你好，{ZH}"
    assert enhance("") == ""
    assert enhance(f"a cat, {EN.upper()}") == f"a cat, {EN.upper()}"


def test_language_is_chinese_with_one_han_character_as_the_reference_has_it() -> None:
    assert [language_of(text) for text in ("", "cat", "a 猫", "ねこ", "\u4e00", "\u9fff", "\ua000")] == [
        "en", "en", "zh", "en", "zh", "zh", "en",
    ]  # fmt: skip


@given(st.text(max_size=80))
def test_enhancing_twice_changes_nothing(text: str) -> None:
    assert enhance(enhance(text)) == enhance(text)


def test_sample_takes_enhanced_prompts_and_the_recommended_negative_only_when_asked() -> None:
    prompts = ["a sign that says OPEN", "一只猫"]
    assert conditions(load_config([]), prompts) == (prompts, "")
    texts, negative = conditions(load_config(["sample.enhance=true"]), prompts)
    assert texts == [f'a sign that says "OPEN", {EN}', f"一只猫，{ZH}"]
    assert negative == NEGATIVE_PROMPT
    assert conditions(load_config(["sample.enhance=true", "sample.negative_prompt=blurry"]), prompts)[1] == "blurry"
