"""The filter `entropy` on real photographs and on what was done to them."""

from __future__ import annotations

import numpy as np
import pytest
from photographs import photograph, reason, scores


def test_bits_of_known_histograms() -> None:
    levels = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    assert scores("entropy", levels)["entropy"] == pytest.approx(8.0)
    assert scores("entropy", levels // 64)["entropy"] == pytest.approx(2.0)
    assert scores("entropy", np.full((9, 9, 3), 77, dtype=np.uint8))["entropy"] == 0.0


def test_few_flat_colours_are_rejected_however_they_lie() -> None:
    shapes = (photograph("camera") // 86 * 86).astype(np.uint8)  # three levels left
    assert scores("entropy", shapes)["entropy"] < 1.6
    assert reason("entropy", shapes) == "low_entropy"
    assert reason("entropy", shapes, min_entropy=1) is None
    assert reason("entropy", photograph("camera")) is None
