"""Several updates of one step: what was made before one that is not finite stays, and is told as made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Results = Callable[[str], dict[str, Any]]


@pytest.mark.parametrize(("fault", "norm"), [("loss", "nan"), ("gradient", "inf")])
def test_a_second_update_that_is_not_finite_leaves_the_first(results: Results, fault: str, norm: str) -> None:
    found = results("updates")
    told = found[f"{fault}_2"]
    assert (told["made"], told["skipped"], told["failed_norm"]) == (1, False, norm)
    assert told["norm"] > 0
    assert told["metrics"] == {"train/updates": 1.0}
    assert told["names"] == ["loss", "loss_of_first_update", "twice", "twice_of_first_update"]
    assert told["dumped"] == ([2] if fault == "loss" else [])
    assert found[f"{fault}_2_as_if_it_had_not_been"]  # bit for bit what one update alone leaves


@pytest.mark.parametrize(("fault", "norm"), [("loss", "nan"), ("gradient", "inf")])
def test_a_first_update_that_is_not_finite_ends_the_step_untouched(results: Results, fault: str, norm: str) -> None:
    found = results("updates")
    told = found[f"{fault}_1"]
    assert (told["made"], told["skipped"], told["failed_norm"], told["norm"]) == (0, True, norm, None)
    assert told["metrics"] == {"train/updates": 0.0}
    assert told["dumped"] == ([1] if fault == "loss" else [])
    assert found[f"{fault}_1_as_if_it_had_not_been"]
