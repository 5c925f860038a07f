"""Thresholds that are drawn are those that the filters apply, whatever their parameters are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from producers.filters import FILTERS
from producers.filters.base import Filter, FilterParams, Rejection, Value, Values, number
from qwenimg_dist.commands.data_thresholds import histograms
from qwenimg_dist.compose import load_config
from qwenimg_dist.data.row_columns import RowColumns

KEPT, TOO_SMALL, LONG, MISSING = "", "too_small", "extreme_aspect", "missing_file"


def columns(scores: Mapping[str, list[float]], reasons: list[str]) -> RowColumns:
    words = list(dict.fromkeys(reasons))
    lost = [0 if reason == KEPT else 1 for reason in reasons]
    arrays: dict[str, Any] = {f"score_{name}": np.array(values, dtype=np.float32) for name, values in scores.items()}
    arrays["status"] = np.array(lost, dtype=np.int8)
    arrays["reason"] = np.array([words.index(reason) for reason in reasons], dtype=np.int16)
    rows = np.arange(len(reasons), dtype=np.int64)
    return RowColumns(rows=rows, arrays=arrays, words={"status": ["kept", "rejected"], "reason": words})


ASPECTS = [1.0, 1.5, 2.0, 3.0, 3.5, 0.5, 0.3, 0.2, float("nan")]
SIDES = [512.0, 64.0, 63.0, 100.0, 20.0, 200.0, 300.0, 400.0, float("nan")]
INDEX = columns(
    {"aspect": ASPECTS, "min_side": SIDES, "pixels": [side * side for side in SIDES]},
    [KEPT, KEPT, TOO_SMALL, KEPT, TOO_SMALL, KEPT, LONG, LONG, MISSING],
)


def lines(index: RowColumns, *overrides: str) -> dict[str, list[tuple[Any, ...]]]:
    found = histograms(load_config(list(overrides)), index)
    return {
        one.name: [(t.filter, t.name, t.at, t.rejects, t.inclusive, t.rejected, t.admitted) for t in one.thresholds]
        for one in found
    }


def test_each_side_is_counted() -> None:
    found = lines(INDEX)
    third = pytest.approx(1 / 3)
    assert found["aspect"] == [
        ("aspect", "1/max_ratio", third, "below", False, 2, 6),
        ("aspect", "max_ratio", 3.0, "above", False, 1, 7),
    ]
    assert found["min_side"] == [("resolution", "min_side", 64.0, "below", False, 2, 6)]


def test_thresholds_of_the_command_line_count_at_once() -> None:
    found = lines(INDEX, "filters.aspect.max_ratio=1.8", "filters.resolution.min_side=63")
    assert [line[5] for line in found["aspect"]] == [3, 3]
    assert found["min_side"] == [("resolution", "min_side", 63.0, "below", False, 1, 7)]


def test_a_threshold_outside_of_what_was_measured_is_found() -> None:
    assert lines(INDEX)["pixels"] == [("resolution", "max_pixels", 178_956_970.0, "above", False, 0, 8)]


def test_a_filter_that_is_off_draws_nothing() -> None:
    assert lines(INDEX, "filters.aspect.enabled=false")["aspect"] == []


class _Params(FilterParams):
    tolerance: float = 0.25
    language: str = "en"


def _admit(values: Values, params: _Params) -> Rejection | None:
    """Two scores and a label; the threshold is no parameter, and one side is closed."""
    if values["language"] == "??":
        raise ValueError("cannot be reckoned with")
    if number(values, "noise") >= 1.0 - params.tolerance * number(values, "grain"):
        return Rejection(reason="noisy", detail="")
    return None


def test_a_derived_threshold_with_other_scores_and_a_label(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(facts: object) -> dict[str, Value]:
        raise AssertionError("nothing is scored here")

    made = Filter(
        params=_Params,
        stage=2,
        looks_at="pixels",
        scores=("noise", "grain"),
        labels=("language",),
        score=none,
        admit=_admit,
    )
    monkeypatch.setitem(FILTERS, "noise", made)
    index = columns({"noise": [0.1, 0.5, 0.6, 0.9], "grain": [2.0, 2.0, 2.0, 2.0]}, [KEPT, "noisy", "noisy", "noisy"])
    arrays: dict[str, Any] = {**index.arrays, "label_language": np.zeros(4, dtype=np.int16)}
    index = RowColumns(rows=index.rows, arrays=arrays, words={**index.words, "label_language": ["en"]})
    config = load_config(["+filters.noise.tolerance=0.25"])
    (line,) = next(one for one in histograms(config, index) if one.name == "noise").thresholds
    assert (line.at, line.name, line.rejects, line.inclusive) == (pytest.approx(0.5), "", "above", True)
    assert (line.rejected, line.admitted, line.reason) == (3, 1, "noisy")


def test_counts_without_a_single_hit_and_rows_with_an_empty_label_have_their_thresholds() -> None:
    zeros = [0.0, 0.0]
    scores = {"qr_codes": zeros, "barcodes": zeros, "caption_other_script": zeros, "caption_repetition": [0.0, 0.6]}
    index = columns(scores, [KEPT, "caption_repetition"])
    arrays: dict[str, Any] = {**index.arrays, "label_caption_fault": np.zeros(2, dtype=np.int16)}
    index = RowColumns(rows=index.rows, arrays=arrays, words={**index.words, "label_caption_fault": [""]})
    found = lines(index, "filters.barcode.max_codes=0")
    (code,) = found["qr_codes"]
    assert code[2:4] == (pytest.approx(1.0), "above")  # half a code counts as none
    assert code[5:] == (0, 2)
    assert found["caption_repetition"] == [
        ("caption_validity", "max_repetition", pytest.approx(0.5), "above", False, 1, 1)
    ]


def test_nothing_decided() -> None:
    empty = RowColumns(rows=np.empty(0, dtype=np.int64), arrays={}, words={})
    assert histograms(load_config([]), empty) == []
