"""The guard counts evaluations in a row, forgets a recovery, and does not forget over a resume."""

from __future__ import annotations

import json
from typing import Any

import pytest

from consumers.guard import Guard
from qwenimg_dist.compose import load_config
from qwenimg_dist.config import EvaluateConfig

START = {256: 1.0, 512: 2.0}
WORDS = {256: "trained in this phase", 512: "not trained"}


def config(**changes: Any) -> EvaluateConfig:
    settings = {"guard": "stop", "guard_tolerance": 0.1, "guard_patience": 2, **changes}
    return load_config([]).evaluate.model_copy(update=settings)


def test_it_stops_after_patience_and_names_class_losses_and_the_way_out() -> None:
    guard = Guard(config(), START, None)
    guard.look(10, {256: 0.5, 512: 2.19}, WORDS)  # within the tolerance
    guard.look(20, {256: 0.5, 512: 2.21}, WORDS)
    assert not guard.verdict
    assert guard.metrics() == {"eval/guard": 1}
    assert guard.look(30, {256: 0.5, 512: 2.5}, WORDS) == ""
    for words in ("step 30", "512 px 2.5000 against 2.0000 (+25.0%, not trained)", "optim.lr", "evaluate.guard=warn"):
        assert words in guard.verdict
    assert "256 px" not in guard.verdict


def test_a_recovery_begins_the_count_anew() -> None:
    guard = Guard(config(), START, None)
    for loss in (3.0, 1.0, 3.0):
        guard.look(1, {512: loss}, WORDS)
    assert not guard.verdict
    guard.look(4, {512: float("nan")}, WORDS)  # a loss that is not finite is worse than any
    assert "512 px" in guard.verdict


def test_its_state_survives_json_and_a_resume_says_the_same() -> None:
    guard = Guard(config(), START, None)
    guard.look(1, {256: float("nan"), 512: 1.0}, WORDS)
    resumed = Guard(config(), START, json.loads(json.dumps(guard.state(), allow_nan=False)))
    assert not resumed.verdict
    resumed.look(2, {256: 7.0, 512: 1.0}, WORDS)
    assert "256 px 7.0000" in resumed.verdict
    again = Guard(config(), START, json.loads(json.dumps(resumed.state())))
    assert "256 px 7.0000" in again.verdict


@pytest.mark.parametrize(
    "change", [{"guard_patience": 3}, {"guard_tolerance": 9.0}, {"guard": "warn"}, {"guard": "off"}]
)
def test_a_stopped_run_goes_on_when_it_is_told_otherwise(change: dict[str, Any]) -> None:
    guard = Guard(config(), START, None)
    for step in (1, 2):
        guard.look(step, {256: 7.0}, WORDS)
    assert guard.verdict
    assert not Guard(config(**change), START, guard.state()).verdict


def test_a_warning_is_said_and_off_is_silent() -> None:
    guard = Guard(config(guard="warn", guard_patience=1), START, None)
    assert "256 px 7.0000 against 1.0000" in guard.look(1, {256: 7.0, 1328: 9.0}, WORDS)  # 1328 has no start
    assert not guard.verdict
    assert guard.look(2, {256: 1.0}, WORDS) == ""
    off = Guard(config(guard="off", guard_patience=1), START, None)
    assert off.look(1, {256: 7.0}, WORDS) == ""
    assert off.metrics() == {}
