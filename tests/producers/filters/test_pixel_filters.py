"""What holds for every filter on pixels: real photographs pass, odd sizes do not trip them, config matches code."""

from __future__ import annotations

import math

import numpy as np
import pytest
from photographs import PHOTOGRAPHS, bound, facts_about, photograph, reason, resized

from producers.filters import FILTERS, validate_filters
from producers.filters.base import PREVIEW_SIDE
from qwenimg_dist.compose import compose_tree

CLASSICAL = [name for name, one in FILTERS.items() if one.looks_at == "pixels" and one.score is not None]
FOR_PHOTOGRAPHS = compose_tree(["filter_set=qwen_image_2512"])["filters"]


@pytest.mark.parametrize("photo", PHOTOGRAPHS)
def test_photographs_pass_all_of_them_as_shipped(photo: str) -> None:
    facts = facts_about(photograph(photo))
    for one in validate_filters({name: FOR_PHOTOGRAPHS[name] for name in CLASSICAL}):
        assert one.admit(one.score(facts)) is None, one.name


def test_the_shipped_thresholds_are_those_of_the_code() -> None:
    for name in (*CLASSICAL, "rotation"):
        assert bound(name, **FOR_PHOTOGRAPHS[name]).params == bound(name).params


@pytest.mark.parametrize("name", CLASSICAL)
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (2, 3), (7, 9), (600, 3)])
def test_pictures_of_any_size_have_finite_scores(name: str, size: tuple[int, int]) -> None:
    one = bound(name)
    for level in (0, 255):
        found = one.score(facts_about(np.full((*size, 3), level, dtype=np.uint8)))
        assert set(found) == set(one.filter.names)
        assert all(math.isfinite(value) for value in found.values() if not isinstance(value, str))
        one.admit(found)


@pytest.mark.parametrize("name", ["clarity", "texture", "entropy", "luma", "saturation", "border"])
@pytest.mark.parametrize("photo", ["astronaut", "coffee", "chelsea"])
def test_a_larger_file_of_the_same_picture_is_judged_alike(name: str, photo: str) -> None:
    """The preview has one size: enlarging the file and taking it back gives nearly the same scores."""
    small = resized(photograph(photo), 0.75 * PREVIEW_SIDE / max(photograph(photo).shape))
    facts = facts_about(resized(photograph(photo), PREVIEW_SIDE / max(photograph(photo).shape)))
    large = facts_about(resized(photograph(photo), 3 * PREVIEW_SIDE / max(photograph(photo).shape)))
    assert max(large.preview.shape) == max(facts.preview.shape) == PREVIEW_SIDE
    assert max(small.shape) < PREVIEW_SIDE
    before, after = bound(name).score(facts), bound(name).score(large)
    for key, value in before.items():
        assert after[key] == pytest.approx(value, rel=0.5, abs=0.02), key
    assert reason(name, small) is None
