"""Phases and learning rates are pure functions of the step, and add up exactly."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consumers.curriculum import lr_at, plan
from qwenimg_dist.compose import load_config
from qwenimg_dist.config import Config, OptimConfig
from qwenimg_dist.data.phases import PlannedPhase, phase_at, quota

BASE = load_config([])


def with_phases(lengths: list[dict[str, float]], steps: int) -> Config:
    tree = BASE.model_dump(mode="json")
    tree["curriculum"] = {
        "phases": [
            {"resolutions": {64: 1.0}, "global_batch": 4, "micro_batch_tokens": 100, **length} for length in lengths
        ]
    }
    tree["train"]["steps"] = steps
    return Config.model_validate(tree)


def resolution_at(phases: tuple[PlannedPhase, ...], step: int) -> int:
    phase = phase_at(phases, step)
    return quota(phase.weights, step - phase.first_step)[0]


@settings(max_examples=100, deadline=None)
@given(shares=st.lists(st.integers(1, 100), min_size=1, max_size=6), steps=st.integers(1, 5000))
def test_shares_add_up_and_are_off_by_less_than_a_step(shares: list[int], steps: int) -> None:
    phases = plan(with_phases([{"share": share / 100} for share in shares], steps))
    assert phases[0].first_step == 0
    assert phases[-1].last_step == steps
    for before, after in itertools.pairwise(phases):
        assert before.last_step == after.first_step
    for phase, share in zip(phases, shares, strict=True):
        exact = Fraction(share * steps, sum(shares))
        assert abs(phase.last_step - phase.first_step - exact) <= 1
    for step in {0, steps // 2, steps - 1}:
        phase = phase_at(phases, step)
        assert phase.first_step <= step < phase.last_step


def test_steps_must_add_up() -> None:
    phases = plan(with_phases([{"steps": 3}, {"steps": 7}], 10))
    assert [(phase.first_step, phase.last_step) for phase in phases] == [(0, 3), (3, 10)]
    with pytest.raises(ValueError, match=r"phases have 10 steps, train.steps=12: set train.steps=10"):
        plan(with_phases([{"steps": 3}, {"steps": 7}], 12))
    with pytest.raises(ValueError, match="step 10 lies outside"):
        phase_at(phases, 10)


@pytest.mark.parametrize("model", ["tiny", "qwen_image_2512"])
def test_shipped_curricula_plan(model: str) -> None:
    config = load_config([f"model={model}", "train.steps=1000"])
    phases = plan(config)
    assert phases[-1].last_step == 1000
    seen = {resolution_at(phases, step) for step in range(1000)}
    assert seen == set(config.resolutions)


def test_resolutions_follow_the_weights_exactly() -> None:
    config = load_config(["model=qwen_image_2512", "train.steps=1000"])
    phases = plan(config)
    last = phases[-1]
    steps = range(last.first_step, last.last_step)
    assert sum(resolution_at(phases, step) == 640 for step in steps) == round(0.3 * len(steps))


def test_learning_rate() -> None:
    phases = plan(with_phases([{"share": 0.5}, {"share": 0.5, "lr_scale": 0.5}], 100))
    optim = OptimConfig(lr=1e-3, warmup_steps=10, schedule="cosine", min_lr_ratio=0.1)
    rates = [lr_at(phases, optim, step) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == pytest.approx(1e-3)
    assert rates[10] == pytest.approx(1e-3)
    assert rates[99] == pytest.approx(0.1 * 1e-3 * 0.5)
    assert rates[50] < 0.6 * rates[49]
    assert all(a < b for a, b in itertools.pairwise(rates[:10]))
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    constant = optim.model_copy(update={"schedule": "constant"})
    assert lr_at(phases, constant, 40) == pytest.approx(1e-3)
    assert lr_at(phases, constant, 99) == pytest.approx(5e-4)
    cooled = constant.model_copy(update={"cooldown_steps": 20})
    assert [lr_at(phases, cooled, step) for step in range(80)] == [lr_at(phases, constant, step) for step in range(80)]
    assert lr_at(phases, cooled, 89) == pytest.approx(0.5 * 1e-3 * 0.55)
    assert lr_at(phases, cooled, 99) == pytest.approx(0.5 * 1e-3 * 0.1)
    # A run shorter than its warm-up, or exactly as long, is no division by zero.
    short = plan(with_phases([{"share": 1.0}], 10))
    assert lr_at(short, optim, 9) == pytest.approx(1e-3)
