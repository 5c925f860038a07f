"""Each filter by its numbers; the config that is refused; every filter that ships has a YAML with all its keys."""

from __future__ import annotations

from typing import Any

import pytest

from producers.filters import FILTERS, validate_filters
from producers.filters.base import Facts
from qwenimg_dist.compose import ConfigError, compose_tree

CASES = [
    ("file_size", {"min_bytes": 100, "max_bytes": 1000}, {"num_bytes": 99}, "file_too_small"),
    ("file_size", {"min_bytes": 100, "max_bytes": 1000}, {"num_bytes": 1001}, "file_too_large"),
    ("file_size", {"min_bytes": 100, "max_bytes": 1000}, {"num_bytes": 100}, None),
    ("resolution", {"min_side": 64}, {"width": 63, "height": 900}, "too_small"),
    ("resolution", {"min_side": 64}, {"width": 64, "height": 64}, None),
    ("resolution", {"max_pixels": 100}, {"width": 11, "height": 10}, "too_small"),
    ("resolution", {"min_side": 1, "max_pixels": 100}, {"width": 11, "height": 10}, "too_many_pixels"),
    ("aspect", {"max_ratio": 2}, {"width": 201, "height": 100}, "extreme_aspect"),
    ("aspect", {"max_ratio": 2}, {"width": 100, "height": 201}, "extreme_aspect"),
    ("aspect", {"max_ratio": 2}, {"width": 200, "height": 100}, None),
    ("broken", {}, {"num_frames": 2}, "animated"),
    ("broken", {"max_frames": 5}, {"num_frames": 5}, None),
]


@pytest.mark.parametrize(("name", "params", "facts", "reason"), CASES)
def test_scores_meet_thresholds(name: str, params: dict[str, Any], facts: dict[str, Any], reason: str | None) -> None:
    (bound,) = validate_filters({name: params})
    scores = bound.score(Facts(**{"num_bytes": 500, "width": 100, "height": 100, **facts}))
    assert set(scores) == set(bound.filter.scores)
    rejection = bound.admit(scores)
    assert (rejection.reason if rejection else None) == reason
    if rejection is not None:
        assert any(key in rejection.detail for key in bound.filter.params.model_fields)


def test_disabled_filters_are_not_asked() -> None:
    assert validate_filters({"aspect": {"enabled": False}, "broken": {}})[0].name == "broken"


@pytest.mark.parametrize(
    ("configured", "message"),
    [
        ({"aspects": {}}, "did you mean 'aspect'"),
        ({"aspect": {"max_rato": 2}}, "did you mean 'max_ratio'"),
        ({"aspect": {"max_ratio": "wide"}}, "filters.aspect.max_ratio"),
        ({"resolution": {"min_side": 0}}, "greater than 0"),
    ],
)
def test_unusable_parameters_are_named(configured: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate_filters(configured)


def test_score_names_are_unique_and_each_filter_ships_all_its_keys() -> None:
    names = [name for one in FILTERS.values() for name in one.scores]
    assert len(names) == len(set(names))
    shipped = compose_tree([])["filters"]
    assert set(shipped) == set(FILTERS)
    for name, one in FILTERS.items():
        assert set(shipped[name]) == set(one.params.model_fields)
