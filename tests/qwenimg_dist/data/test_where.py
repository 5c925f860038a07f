"""Expressions select rows, and nothing in them is ever run by Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenimg_dist.data.where import WhereError, compile_where

COLUMNS: dict[str, npt.NDArray[Any]] = {
    "width": np.array([100, 200, 300, 400]),
    "height": np.array([100, 100, 100, 100]),
    "aspect": np.array([1.0, 2.0, 3.0, 4.0]),
    "format": np.array(["JPEG", "PNG", "JPEG", "WEBP"]),
    "status": np.array(["kept"] * 4),
    "score_aesthetic": np.array([5.0, np.nan, 6.0, 7.0], dtype=np.float32),
    "label_category": np.array(["text", "text", "", "text"]),
}


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("aspect < 2 and status == 'kept'", [0]),
        ("aspect < 2 or aspect >= 4", [0, 3]),
        ("not (aspect < 2 or aspect >= 4)", [1, 2]),
        ("1 < aspect <= 3", [1, 2]),
        ("width * height / 10000 - 1 == aspect - 1", [0, 1, 2, 3]),
        ("-aspect < -2.5", [2, 3]),
        ("format in ('JPEG', 'WEBP')", [0, 2, 3]),
        ("format not in ['JPEG']", [1, 3]),
        ("aspect in {1, 4}", [0, 3]),
        ("aspect in ()", []),
        ("aesthetic > 5.5", [2, 3]),
        ("score_aesthetic > 5.5", [2, 3]),
        ("score_aesthetic != 6", [0, 3]),
        ("aesthetic not in (6,)", [0, 3]),
        ("True", [0, 1, 2, 3]),
        ("2 > 3", []),
        (" aspect > 0 ", [0, 1, 2, 3]),
        ("width / (height - 100) > 1", [0, 1, 2, 3]),
        ("top(2, aspect)", [2, 3]),
        ("top(0.25, aspect)", [3]),
        ("top(0.26, aspect)", [2, 3]),  # a share is rounded up
        ("top(1, height)", [0]),  # of equal ones the first
        ("top(1, -aspect, format)", [0, 1, 3]),
        ("top(9, aesthetic)", [0, 2, 3]),  # what has no score is not counted
        ("top(0.5, aesthetic, category)", [3]),  # nor what has no group
        ("top(0.51, aesthetic, category)", [0, 3]),
        ("top(1, aspect + width, height / 50) and aspect > 3", [3]),
        ("top(1, aspect) and aspect < 4", []),  # rows compete with all rows
        ("not top(2, aspect)", [0, 1]),
    ],
)
def test_rows_are_selected(expression: str, expected: list[int]) -> None:
    assert np.flatnonzero(compile_where(expression).mask(COLUMNS, 4)).tolist() == expected


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("aspec < 2", "no column 'aspec', did you mean 'aspect'?; there are: aspect, format"),
        ("esthetic > 5", "did you mean 'aesthetic'"),
        ("aspect <", "not an expression"),
        ("", "not an expression"),
        ("aspect = 2", "not an expression"),
        ("aspect", "gives numbers"),
        ("aspect + 1", "gives numbers"),
        ("aspect and width", "and / or / not need comparisons"),
        ("aspect == 'kept'", "compares text with numbers"),
        ("format < 3", "compares text with numbers"),
        ("format in (1, 2)", "compares text with numbers"),
        ("format + 1 > 2", "compares text with numbers"),
        ("__import__('os').system('true')", "not allowed"),
        ("aspect.__class__ == 1", "not allowed"),
        ("(lambda: 1)() == 1", "not allowed"),
        ("[x for x in aspect] == 1", "not allowed"),
        ("aspect[0] == 1", "not allowed"),
        ("aspect ** 9 > 1", "not allowed"),
        ("aspect is None", "not allowed"),
        ("None == aspect", "not allowed"),
        ("aspect in width", "needs a list"),
        ("(a := 1) == 1", "not allowed"),
        ("top(aspect, 2)", "begins with a share below 1 or a whole number"),
        ("top(1.5, aspect)", "begins with a share"),
        ("top(0, aspect)", "begins with a share"),
        ("top(True, aspect)", "begins with a share"),
        ("top(0.5)", "not allowed"),
        ("top(0.5, aspect, format, width)", "not allowed"),
        ("top(0.5, aspect, by=format)", "not allowed"),
        ("bottom(0.5, aspect) ", "not allowed"),
        ("top(0.5, format)", "needs a number to compare by"),
        ("top(0.5, aspct)", "did you mean 'aspect'"),
    ],
)
def test_mistakes_are_named(expression: str, message: str) -> None:
    with pytest.raises(WhereError) as caught:
        compile_where(expression).mask(COLUMNS, 4)
    assert message in str(caught.value)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 1.0, 2.0, np.nan])), max_size=40), st.integers(1, 99)
)
def test_top_is_the_best_of_each_group_by_a_plain_loop(rows: list[tuple[int, float]], percent: int) -> None:
    groups, scores = np.array([g for g, _ in rows], dtype=np.int64), np.array([s for _, s in rows])
    mask = compile_where(f"top({percent / 100}, score, group)").mask({"score": scores, "group": groups}, len(rows))
    expected = set()
    for group in range(4):
        mine = [i for i, (g, s) in enumerate(rows) if g == group and s == s]
        best = sorted(mine, key=lambda i: (-scores[i], i))
        expected |= set(best[: -(-percent * len(mine) // 100)])
    assert set(np.flatnonzero(mask).tolist()) == expected


def test_names_are_known_before_any_data_is_there() -> None:
    assert compile_where("aspect < 2 and width > 3 and aspect > 1").names == ("aspect", "width")


def test_the_best_by_a_column_of_whole_numbers() -> None:
    mask = compile_where("top(0.5, width)").mask({"width": np.array([5, 1, 7, 3])}, 4)
    assert mask.tolist() == [True, False, True, False]
