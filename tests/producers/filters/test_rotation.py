"""The filter `rotation` on real photographs and on what was done to them."""

from __future__ import annotations

import pytest
from photographs import bound
from pydantic import ValidationError

from producers.filters.base import Facts


def facts(orientation: int) -> Facts:
    return Facts(num_bytes=1, width=10, height=20, orientation=orientation)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_are_admitted_unless_told_otherwise(orientation: int) -> None:
    values = bound("rotation").score(facts(orientation))
    assert values == {"orientation": orientation}
    assert bound("rotation").admit(values) is None
    rejection = bound("rotation", allowed=[1, 3]).admit(values)
    assert (rejection is None) == (orientation in (1, 3))
    if rejection is not None:
        assert rejection.reason == "rotated"
        assert f"orientation {orientation} is not in allowed=[1, 3]" in rejection.detail


@pytest.mark.parametrize("allowed", [[], [0], [9]])
def test_what_is_no_orientation_is_refused(allowed: list[int]) -> None:
    with pytest.raises(ValidationError):
        bound("rotation", allowed=allowed)
