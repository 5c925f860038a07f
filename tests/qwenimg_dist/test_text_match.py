"""Scripts, quotes and edit distances, on English, Chinese and what lies between."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenimg_dist.text_match import (
    edit_similarity,
    found_similarity,
    in_order_of,
    language,
    normalise,
    quoted_texts,
    quotes_found,
    script_counts,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("OPEN 24 HOURS", "en"),
        ("今日特价", "zh"),
        ("今日特价 SALE", "zh"),
        ("the WiFi password is 咖啡", "en"),
        ("Открыто", "other"),
        ("いらっしゃいませ", "other"),
        ("東京駅へようこそ", "other"),
        ("안녕하세요", "other"),
        ("مرحبا", "other"),
        ("2026", "en"),
        ("ＯＰＥＮ", "en"),
        ("", "none"),
        ("— ?! …", "none"),
    ],
)
def test_language_by_scripts(text: str, expected: str) -> None:
    assert language(text) == expected


def test_letters_are_counted_by_script() -> None:
    assert script_counts("Café 咖啡 кофе コーヒー 7!") == {"latin": 4, "han": 2, "kana": 4, "cyrillic": 4}


@pytest.mark.parametrize(
    ("caption", "quotes"),
    [
        ('a sign that says "OPEN 24 HOURS"', ["OPEN 24 HOURS"]),
        ("a sign that says 'Don't walk' and the dogs' bowls", ["Don't walk"]),
        ("a mug with ‘It’s Monday’ on it", ["It’s Monday"]),
        ("it's the cats' food, isn't it", []),
        ('a 12" pizza beside a 15" one', []),
        ("招牌写着“今日特价”，旁边是「欢迎光临」和《红楼梦》", ["今日特价", "欢迎光临", "红楼梦"]),
        ("『二重』", ["二重"]),
        ("写着\"今日特价\"的牌子，和'欢迎'二字", ["今日特价", "欢迎"]),
        ('"A" and "B" and again "A"', ["A", "B"]),
        ('two lines: "first\nsecond"', ["first\nsecond"]),
        ('nothing between "" or " … "', []),
        ('“the word "WOW" in it”', ['the word "WOW" in it']),
        ("\"A b\" “C” 「丁」 it's Bob's 'two words' ‘single’", ["A b", "C", "丁", "two words", "single"]),
        ('one mark " only', []),
        ('"' + "x" * 401 + '"', []),
    ],
)
def test_quoted_texts(caption: str, quotes: list[str]) -> None:
    assert quoted_texts(caption) == quotes


def test_case_width_spaces_and_punctuation_do_not_count() -> None:
    assert normalise("Ｏｐｅｎ — 24h, OK?") == "open24hok"
    assert edit_similarity("OPEN 24 HOURS", "Open24Hours!") == 1.0
    assert edit_similarity("今日，特价", "今日特价") == 1.0


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [("kitten", "sitting", 4 / 7), ("abc", "", 0.0), ("", "", 1.0), ("今日特价", "今日特介", 0.75), ("ab", "ba", 0.0)],
)
def test_edit_similarity(a: str, b: str, expected: float) -> None:
    assert edit_similarity(a, b) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("quote", "text", "expected"),
    [
        ("OPEN", "CAFE open 24 hours", 1.0),
        ("OPEN", "CAFE 0PEN 24 hours", 0.75),
        ("OPEN", "", 0.0),
        ("今日特价", "欢迎光临 今日特价 新鲜面包", 1.0),
        ("Fresh bread", "Fresh\nbread every morning", 1.0),
        ("!!", "anything", 1.0),
    ],
)
def test_a_quote_is_found_anywhere_in_the_text(quote: str, text: str, expected: float) -> None:
    assert found_similarity(quote, text) == pytest.approx(expected)


def test_long_quotes_weigh_more() -> None:
    assert quotes_found(["OPEN", "x"], "open") == pytest.approx(4 / 5)
    assert quotes_found([], "open") == 1.0


letters = st.text(alphabet="abcd今日", max_size=12)


@given(a=letters, b=letters)
def test_against_the_plain_recursion(a: str, b: str) -> None:
    def distance(a: str, b: str) -> int:
        rows = [list(range(len(b) + 1))]
        for i, left in enumerate(a, start=1):
            rows.append([i])
            for j, right in enumerate(b, start=1):
                rows[i].append(min(rows[i - 1][j] + 1, rows[i][j - 1] + 1, rows[i - 1][j - 1] + (left != right)))
        return rows[-1][-1]

    longer = max(len(a), len(b))
    assert edit_similarity(a, b) == pytest.approx(1 - distance(a, b) / longer if longer else 1.0)
    if a:
        parts = [b[i:j] for i in range(len(b) + 1) for j in range(i, len(b) + 1)]
        assert found_similarity(a, b) == pytest.approx(1 - min(distance(a, part) for part in parts) / len(a))


def test_quotes_are_put_in_the_order_of_the_text() -> None:
    assert in_order_of(["OPEN", "Bakery"], "BAKERY\nopen daily") == ["Bakery", "OPEN"]
    assert in_order_of(["OPEN", "Bakery"], "opem bakrey") == ["OPEN", "Bakery"]
    assert in_order_of(["今日特价", "面包"], "面包 今日特介") == ["面包", "今日特价"]
    assert in_order_of(["a", "b"], "") == ["a", "b"]
