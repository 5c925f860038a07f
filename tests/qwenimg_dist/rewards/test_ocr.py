"""The reward `ocr`: 1 for what was asked for, less for errors and for other text, NaN without a quote."""

from __future__ import annotations

import lettering
import numpy as np
import pytest
from PIL import Image

from qwenimg_dist.rewards import _Loaded, ocr
from qwenimg_dist.rewards.base import Prompt, WeightedRewards
from qwenimg_dist.rewards.kind import Judge, Resources
from qwenimg_dist.rewards.ocr import Params, asked_for, similarity

SIGN = lettering.page(("OPEN 24 HOURS", 40, (60, 40)), ("Fresh bread", 28, (60, 280)))
CHINESE = lettering.page(("今日特价", 48, (40, 40)), font=lettering.CHINESE)


def judge(**settings: object) -> Judge:
    return ocr._load(Params.model_validate(settings), Resources(device="cpu", num_threads=1))


@pytest.fixture(scope="module")
def plain() -> Judge:
    return judge()


def test_what_stands_there_is_compared_with_what_was_quoted(plain: Judge) -> None:
    asked = {
        'a sign that says "Open 24 hours" and "fresh bread"': (0.95, 1.0),
        'a sign that says "fresh bread" and "OPEN 24 HOURS"': (0.95, 1.0),
        'a sign that says "OPEN 24 HOURS"': (0.4, 0.7),
        'a sign that says "something else"': (0.0, 0.4),
    }
    scores = plain([SIGN] * len(asked), [Prompt(text=text) for text in asked])
    for (text, (least, most)), score in zip(asked.items(), scores, strict=True):
        assert least <= score <= most, text
    assert plain([Image.new("RGB", (256, 256), "white")], [Prompt(text='says "OPEN"')]) == [0.0]


def test_chinese_is_read_too(plain: Judge) -> None:
    right, wrong = plain([CHINESE] * 2, [Prompt(text="牌子上写着“今日特价”"), Prompt(text="牌子上写着“新鲜面包”")])
    assert right == 1.0
    assert wrong <= 0.25


def test_a_prompt_without_a_quote_is_refused_beforehand_and_nan_at_run_time(plain: Judge) -> None:
    judged = WeightedRewards([_Loaded("ocr", plain)], {"ocr": 1.0})
    scores = judged.score([SIGN, SIGN], [Prompt(text="a sign"), Prompt(text='says "open 24 hours fresh bread"')])
    assert np.isnan(scores.total).tolist() == [True, False]
    assert scores.failures == {"ocr": 1}
    assert "'a sign' quotes no text" in scores.notes[0]
    why = ocr._refuse(Prompt(text="a sign"), Params())
    assert why is not None
    assert "quotes no text" in why
    assert ocr._refuse(Prompt(text='a "sign"'), Params()) is None


def test_metadata_may_say_what_is_asked_for() -> None:
    params = Params(text_key="words")
    assert asked_for(Prompt(text='"x"', metadata={"words": ["OPEN", "...", None]}), params) == ["OPEN"]
    assert asked_for(Prompt(text='"x"', metadata={"words": "OPEN"}), params) == ["OPEN"]
    why = ocr._refuse(Prompt(text='"x"'), params)
    assert why is not None
    assert "'words'" in why


def test_text_that_nobody_asked_for_costs_unless_it_is_free() -> None:
    assert similarity(["OPEN"], "OPEN") == 1.0
    assert similarity(["OPEN"], "OPEN OPEN") == 0.5
    assert similarity(["OPEN"], "OPEN OPEN", extra_text=True) == 1.0
    assert similarity(["one", "two", "three"], "three one two") == 1.0
    assert similarity(["one", "two"], "") == 0.0
