"""Phases and learning rates are pure functions of the step, and add up exactly."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from fake_catalog import MemoryCatalogs, memory_catalog
from hypothesis import given, settings
from hypothesis import strategies as st

from consumers.curriculum import lr_at, plan
from qwenimg_dist.compose import groups, load_config
from qwenimg_dist.config import Config, OptimConfig, training_identity
from qwenimg_dist.data.ledger import Ledger
from qwenimg_dist.data.order import Segment
from qwenimg_dist.data.phases import PlannedPhase, phase_at, quota
from qwenimg_dist.data.samples import Selection

BASE = load_config([])


def with_phases(lengths: Sequence[Mapping[str, float]], steps: int | None) -> Config:
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


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.tuples(st.integers(1, 10_000), st.integers(1, 700)), min_size=1, max_size=6))
def test_images_become_steps_by_the_global_batch(lengths: list[tuple[int, int]]) -> None:
    tree = with_phases([{"images": images, "global_batch": batch} for images, batch in lengths], None)
    phases = plan(tree)
    assert tree.train.steps == phases[-1].last_step  # null: follows from the phases
    for phase, (images, batch) in zip(phases, lengths, strict=True):
        assert (phase.num_steps - 1) * batch < images <= phase.num_steps * batch
    assert plan(Config.model_validate(tree.model_dump(mode="json"))) == phases


def test_images_must_agree_with_a_given_number_of_steps() -> None:
    lengths: list[dict[str, float]] = [{"images": 9}, {"images": 8}]
    assert plan(with_phases(lengths, 5)) == plan(with_phases(lengths, None))
    with pytest.raises(ValueError, match=r"phases have 5 steps, train.steps=6: set train.steps=5, or null .*`images`"):
        plan(with_phases(lengths, 6))
    with pytest.raises(ValueError, match=r"train.steps is null, but the phases have shares"):
        with_phases([{"share": 1}], None)
    with pytest.raises(ValueError, match=r"0 has images; 1 has steps"):
        with_phases([{"images": 9}, {"steps": 2}], 5)


CURRICULA = {
    "images": 3908,
    "qwen_image_2512": 5000,
    "qwen_image_2512_edit": 1000,
    "qwen_image_2512_grpo": 1000,
    "qwen_image_2512_post": 1000,
    "text_levels": 5000,
    "tiny": 1000,
    "tiny_edit": 1000,
    "tiny_grpo": 1000,
    "tiny_post": 1000,
}
"""Steps of each; 1,000 are those of a config without a stage that says more."""


@pytest.mark.parametrize("name", CURRICULA)
def test_shipped_curricula_plan(name: str) -> None:
    config = load_config([f"curriculum={name}"])
    phases = plan(config)
    last = phases[-1].last_step
    assert last == config.train.steps == CURRICULA[name]
    seen = {resolution_at(phases, step) for step in range(last)}
    assert seen == set(config.resolutions)
    assert all(lr_at(phases, config.optim, step) > 0 for step in range(last))


def test_every_curriculum_that_is_shipped_is_tested() -> None:
    assert sorted(CURRICULA) == groups()["curriculum"]


def test_text_levels_select_and_weigh_by_level() -> None:
    config = load_config(["curriculum=text_levels", "model=qwen_image_2512"])
    level = np.append(np.tile([0.0, 1.0, 2.0], 30), [np.nan] * 6)
    columns = {"score_text_level": level}
    catalog = memory_catalog([0] * 96, [[3]] * 96, resolutions=(256, 640, 1328), columns=columns)
    ledger = Ledger(
        phases=[replace(phase, global_batch=7) for phase in plan(config)],
        seed=0,
        caption_dropout=0.0,
        catalogs=MemoryCatalogs([catalog]),
        selection=Selection(where=None, held_out_below=0),
    )
    ledger.append(Segment(catalog=0, phase=None, epoch=0, last=True))
    per_epoch = {0: {0.0: 30}, 1: {0.0: 30, 1.0: 60}, 2: {0.0: 15, 1.0: 30, 2.0: 90}}
    for phase in ledger.phases:
        for resolution in phase.weights:
            counted = ledger.tally(phase.index, resolution)
            assert abs(counted.samples - sum(per_epoch[phase.index].values())) <= 15
        batches = [ledger.batch(step) for step in range(phase.first_step, phase.last_step)]
        first = [batch for batch in batches if batch.resolution == max(phase.weights) and batch.epoch < 2]
        drawn = Counter(level[row] for batch in first for row in batch.rows[batch.weights > 0])
        assert drawn == {key: 2 * num for key, num in per_epoch[phase.index].items()}


def test_resolutions_follow_the_weights_exactly() -> None:
    config = load_config(["model=qwen_image_2512", "train.steps=1000"])
    phases = plan(config)
    last = phases[-1]
    steps = range(last.first_step, last.last_step)
    assert sum(resolution_at(phases, step) == 640 for step in steps) == round(0.3 * len(steps))


def test_checkpointing_of_activations_is_the_phases_or_the_engines() -> None:
    lengths: list[dict[str, float]] = [{"share": 1}, *({"share": 1, "activation_checkpointing": b} for b in (0, 1))]
    for engine in (False, True):
        tree = with_phases(lengths, 30).model_dump(mode="json")
        tree["engine"]["activation_checkpointing"] = engine
        config = Config.model_validate(tree)
        assert [phase.activation_checkpointing for phase in plan(config)] == [engine, False, True]
    one, other = with_phases(lengths[:1], 30), with_phases(lengths[1:2], 30)
    assert training_identity(one) == training_identity(other)  # it may change when a phase does not fit into memory


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
    # A phase's own rate takes the place of the run's, and may be reached over some steps.
    own = plan(with_phases([{"share": 0.5}, {"share": 0.5, "lr": 4e-4, "warmup_steps": 8}], 100))
    rates = [lr_at(own, cooled, step) for step in range(100)]
    assert rates[49] == pytest.approx(1e-3)
    assert rates[50:58] == pytest.approx([4e-4 * (step + 1) / 8 for step in range(8)])
    assert rates[58:80] == pytest.approx([4e-4] * 22)
    assert rates[99] == pytest.approx(0.1 * 4e-4)
    # A run shorter than its warm-up, or exactly as long, is no division by zero.
    short = plan(with_phases([{"share": 1.0}], 10))
    assert lr_at(short, optim, 9) == pytest.approx(1e-3)
