"""Every measured row is in one bin, whatever the numbers look like."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenimg_dist.report.histograms import Threshold, histogram

KEPT = np.array([True, False, True, True])


@given(
    values=st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=60),
    seed=st.integers(0, 9),
)
def test_all_are_counted_once(values: list[float], seed: int) -> None:
    array = np.array(values, dtype=np.float32)
    kept = np.random.default_rng(seed).random(len(array)) < 0.5
    one = histogram("x", array, kept)
    finite = np.isfinite(array)
    assert sum(one.kept) == (kept & finite).sum()
    assert sum(one.kept) + sum(one.others) == one.measured == finite.sum()
    assert one.missing == (~finite).sum()
    assert list(one.edges) == sorted(one.edges)


def test_whole_numbers_get_a_bin_each() -> None:
    one = histogram("text_level", np.array([0.0, 2.0, 2.0, 1.0]), KEPT)
    assert (one.discrete, one.edges) == (True, (-0.5, 0.5, 1.5, 2.5))
    assert (one.kept, one.others) == ((1, 1, 1), (0, 0, 1))


def test_very_uneven_numbers_get_a_logarithmic_axis() -> None:
    values = np.geomspace(1e2, 1e8, 500)
    assert histogram("bytes", values, np.ones(500, dtype=np.bool_)).logarithmic


def test_a_value_far_away_does_not_squeeze_the_others_and_a_threshold_stays_in_sight() -> None:
    values = np.concatenate([np.linspace(1, 2, 1000), [50.0]])
    line = Threshold(
        filter="f", at=3.0, rejects="above", inclusive=False, reason="r", name="n", rejected=1, admitted=1000
    )
    one = histogram("aspect", values, np.ones(1001, dtype=np.bool_), [line])
    assert one.edges[0] == pytest.approx(1.0)
    assert 3.0 < one.edges[-1] < 4.0
    assert one.cut == (False, True)
    assert one.kept[-1] == 1
