"""Expressions select rows, and nothing in them is ever run by Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qwenimg_dist.data.where import WhereError, compile_where

COLUMNS: dict[str, npt.NDArray[Any]] = {
    "width": np.array([100, 200, 300, 400]),
    "height": np.array([100, 100, 100, 100]),
    "aspect": np.array([1.0, 2.0, 3.0, 4.0]),
    "format": np.array(["JPEG", "PNG", "JPEG", "WEBP"]),
    "status": np.array(["kept"] * 4),
    "score_aesthetic": np.array([5.0, np.nan, 6.0, 7.0], dtype=np.float32),
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
    ],
)
def test_mistakes_are_named(expression: str, message: str) -> None:
    with pytest.raises(WhereError) as caught:
        compile_where(expression).mask(COLUMNS, 4)
    assert message in str(caught.value)


def test_names_are_known_before_any_data_is_there() -> None:
    assert compile_where("aspect < 2 and width > 3 and aspect > 1").names == ("aspect", "width")
