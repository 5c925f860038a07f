"""The clipped ratio by hand and by autograd, its sign, its groups; guidance in one forward; failed rewards alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_run import TRANSFORMER

from consumers.batch import MicroBatch, RolloutStep
from consumers.objectives import build_objective, is_guided, rows_per_sample, sample_kind
from consumers.objectives.grpo import Grpo, group_advantages, guided_velocity
from qwenimg_dist.compose import load_config
from qwenimg_dist.config import GrpoConfig
from qwenimg_dist.flow.samplers import true_guidance
from qwenimg_dist.flow.sde import sample_sde, transition
from qwenimg_dist.models.transformer import build_transformer, pack_latents, predict_velocity, unpack_latents
from qwenimg_dist.schema import Bucket

BUCKET = Bucket(height=64, width=32)
SHAPE = (16, 8, 4)
SIGMAS = [1.0, 0.8, 0.55, 0.3, 0.0]
Call = Callable[..., torch.Tensor]


def config(**changes: object) -> GrpoConfig:
    tree: dict[str, Any] = {"kind": "grpo", "caption_dropout": 0.0, "guidance": 1.0, "noise_level": 0.7, **changes}
    return GrpoConfig.model_validate(tree)


def micro(rows: int, *, weights: list[float] | None = None, negative: int | None = None) -> MicroBatch:
    generator = torch.Generator().manual_seed(rows)
    return MicroBatch(
        latents=torch.zeros(()).expand(rows, *SHAPE),
        logvar=None,
        text=torch.randn(rows, 5, 8, generator=generator),
        text_mask=torch.tensor([[True] * (5 - row % 3) + [False] * (row % 3) for row in range(rows)]),
        weights=torch.tensor(weights or [1.0] * rows),
        slots=torch.arange(rows),
        num_slots=rows,
        bucket=BUCKET,
        negative=torch.randn(negative, 8, generator=generator) if negative else None,
    )


def model(scale: float) -> Call:
    """A velocity that depends on all that a model sees."""

    def predict(
        noisy: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        valid = text[:, :, 0] if mask is None else text[:, :, 0] * mask
        return scale * noisy * (1 + sigma)[:, None, None, None] + valid.sum(dim=1)[:, None, None, None] / 10

    return predict


def rolled(
    predict: Call, one: MicroBatch, gains: list[float], settings: GrpoConfig, *, reference: Call | None = None
) -> list[MicroBatch]:
    """A micro-batch per window step, drawn by a policy."""
    rows = len(one.slots)
    noise = torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(1))
    draws = torch.randn(settings.window, rows, *SHAPE, generator=torch.Generator().manual_seed(2))

    def velocity(by: Call, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return guided_velocity(by, one, x, sigma, settings.guidance)

    window, level = range(settings.window), settings.noise_level
    _, taken = sample_sde(lambda x, s: velocity(predict, x, s), noise, SIGMAS, window=window, level=level, draws=draws)
    made = []
    for step in taken:
        mean = None
        if reference is not None:
            of_reference = velocity(reference, step.x, torch.full((rows,), step.sigma))
            mean = transition(step.x, of_reference, step.sigma, step.sigma_next, level=level)[0]
        told = RolloutStep(
            sigma=step.sigma,
            sigma_next=step.sigma_next,
            x=step.x,
            x_next=step.x_next,
            log_prob=step.log_prob,
            advantages=torch.tensor(gains),
            reference_mean=mean,
        )
        made.append(replace(one, rollout=told))
    return made


def test_the_ratio_is_1_at_the_first_update_to_the_bit() -> None:
    one, settings, gains = micro(3, weights=[1.0, 1.0, 0.0]), config(window=2), [1.5, -0.5, 7.0]
    for part in rolled(model(0.4), one, gains, settings):
        output = Grpo(settings, seed=0).loss(model(0.4), part, step=0)
        assert float(output.metrics["ratio_error"]) == 0
        assert float(output.metrics["clip_fraction"]) == 0
        assert float(output.loss) == pytest.approx(-(1.5 - 0.5) / 2)  # weights, and a window of two


def test_it_is_1_with_the_transformer_itself_guided_and_masked() -> None:
    torch.manual_seed(0)
    transformer = build_transformer(TRANSFORMER)
    calls: list[int] = []

    def predict(x: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        calls.append(len(x))
        return predict_velocity(transformer, x, sigma, text, mask)

    one, settings = micro(3, negative=2), config(window=2, guidance=3.0)
    for part in rolled(predict, one, [1.0, -1.0, 0.5], settings):
        output = Grpo(settings, seed=0).loss(predict, part, step=0)
        assert float(output.metrics["ratio_error"]) == 0
        output.loss.backward()
    assert calls == [6] * (4 + 2)  # one forward of both at every step of the schedule, and one per window step
    assert any(float(p.grad.abs().max()) > 0 for p in transformer.parameters() if p.grad is not None)


def test_guidance_in_one_forward_is_guidance_in_two() -> None:
    torch.manual_seed(0)
    transformer = build_transformer(TRANSFORMER).double()

    def predict(x: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return predict_velocity(transformer, x, sigma, text, mask)

    x, sigma = torch.randn(3, *SHAPE), torch.full((3,), 0.6)
    for tokens in (2, 5, 9):  # shorter than the prompts, as long, longer
        one = micro(3, negative=tokens)
        assert one.negative is not None
        positive = predict(x, sigma, one.text, one.text_mask)
        negative = predict(x, sigma, one.negative.expand(3, -1, -1), None)
        expected = unpack_latents(true_guidance(pack_latents(positive), pack_latents(negative), 3.0), 8, 4)
        found = guided_velocity(predict, one, x, sigma, 3.0)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(
        guided_velocity(predict, micro(3), x, sigma, 1.0), predict(x, sigma, micro(3).text, micro(3).text_mask)
    )


def test_value_by_hand_with_clipping_and_divergence() -> None:
    settings = config(window=1, clip=1e-4, kl_weight=0.3)
    one, gains = micro(4), [1.2, -0.7, 0.4, 0.0]
    (part,) = rolled(model(0.4), one, gains, settings, reference=model(0.3))
    output = Grpo(settings, seed=0).loss(model(0.47), part, step=0)
    told = part.rollout
    assert told is not None
    assert told.reference_mean is not None
    expected, clipped, divergences = 0.0, 0, 0.0
    for row in range(4):
        sigma = torch.full((1,), told.sigma)
        velocity = model(0.47)(told.x[row : row + 1], sigma, one.text[row : row + 1], one.text_mask[row : row + 1])
        mean, std = transition(told.x[row : row + 1], velocity, told.sigma, told.sigma_next, level=0.7)
        normal = torch.distributions.Normal(mean.double(), std)
        log_prob = float(normal.log_prob(told.x_next[row : row + 1].double()).mean())
        ratio = math.exp(log_prob - float(told.log_prob[row]))
        bounded = min(max(ratio, 1 - 1e-4), 1 + 1e-4)
        gap = (mean.double() - told.reference_mean[row : row + 1].double()) / std
        divergence = float((gap**2).mean()) / 2
        expected += max(-gains[row] * ratio, -gains[row] * bounded) + 0.3 * divergence
        clipped += ratio != bounded
        divergences += divergence
    assert clipped > 0
    assert float(output.loss) == pytest.approx(expected, rel=1e-4)
    assert float(output.metrics["clip_fraction"]) == clipped
    assert float(output.metrics["kl"]) == pytest.approx(divergences, rel=1e-4)


@pytest.mark.parametrize(("gain", "rises"), [(1.0, True), (-1.0, False)])
def test_a_step_along_the_gradient_makes_better_pictures_likelier(gain: float, rises: bool) -> None:
    settings = config(window=1)
    scale = torch.tensor(0.4, requires_grad=True)
    (part,) = rolled(model(0.4), micro(3), [gain] * 3, settings)
    output = Grpo(settings, seed=0).loss(model(scale), part, step=0)  # type: ignore[arg-type]
    (slope,) = torch.autograd.grad(output.loss, scale)
    moved = Grpo(settings, seed=0).loss(model(0.4 - 1e-3 * float(slope.sign())), part, step=0)
    assert (float(moved.metrics["ratio"]) > 3) is rises


@pytest.mark.parametrize(
    ("gain", "towards", "dead"), [(1.0, 1, True), (1.0, -1, False), (-1.0, -1, True), (-1.0, 1, False)]
)
def test_beyond_the_clip_there_is_no_gradient_and_back_there_is(gain: float, towards: int, dead: bool) -> None:
    """`towards` is where the ratio has gone: up or down."""
    settings = config(window=1, clip=1e-4)
    (part,) = rolled(model(0.4), micro(1), [gain], settings)
    assert part.rollout is not None
    part = replace(part, rollout=replace(part.rollout, log_prob=part.rollout.log_prob - 0.01 * towards))
    scale = torch.tensor(0.4, requires_grad=True)
    output = Grpo(settings, seed=0).loss(model(scale), part, step=0)  # type: ignore[arg-type]
    assert float(output.metrics["ratio"]) == pytest.approx(math.exp(0.01 * towards), rel=1e-5)
    (slope,) = torch.autograd.grad(output.loss, scale)
    assert (float(slope) == 0) is dead


def test_advantages_are_of_the_group_alone_and_bounded() -> None:
    rewards = np.array([0.0, 1.0, 1.0, 0.0, 5.0, 5.0, 5.0, 5.0, 0.1, 0.2, 0.3, 0.4])
    groups = group_advantages(rewards, group_size=4, bound=5.0)
    assert groups.useful.tolist() == [True, False, True]
    np.testing.assert_allclose(groups.advantages[:4], np.array([-1, 1, 1, -1]) * 0.5 / (0.5 + 1e-4))
    assert (groups.advantages[4:8] == 0).all()
    last = rewards[8:]
    np.testing.assert_allclose(groups.advantages[8:], (last - last.mean()) / (last.std() + 1e-4))
    outlier = np.array([0.0] * 63 + [1.0])
    assert group_advantages(outlier, group_size=64, bound=5.0).advantages.max() == 5.0


def test_a_failed_reward_leaves_its_group_and_spoils_nobody() -> None:
    rewards = np.array([0.0, np.nan, 1.0, np.inf, np.nan, np.nan, np.nan, 3.0, np.nan, np.nan, np.nan, np.nan])
    groups = group_advantages(rewards, group_size=4, bound=5.0)
    assert groups.useful.tolist() == [True, False, False]  # one reward has nothing to be compared with
    assert groups.advantages[1] == groups.advantages[3] == 0
    np.testing.assert_allclose(groups.advantages[[0, 2]], np.array([-1, 1]) * 0.5 / (0.5 + 1e-4))
    assert (groups.advantages[4:] == 0).all()


def test_rollouts_that_training_does_not_repeat_are_told() -> None:
    once, twice = Grpo(config(clip=1e-4), seed=0), Grpo(config(clip=1e-4, inner_updates=2), seed=0)
    assert once.notice({"train/ratio_error": 1e-5}) == ""
    assert "is off 1 by 0.002" in once.notice({"train/ratio_error": 2e-3})
    assert twice.notice({"train/ratio_error": 2e-3, "train/ratio_error_of_first_update": 0.0}) == ""
    assert "round differently" in twice.notice({"train/ratio_error_of_first_update": 2e-3})


def test_the_config_names_prompts_rows_and_guidance() -> None:
    whole = load_config(["stage=grpo", "objective.group_size=3", "objective.kl_weight=0.1"])
    assert sample_kind(whole) == "prompt"
    assert rows_per_sample(whole) == 3
    assert is_guided(whole)
    assert not is_guided(load_config(["stage=grpo", "objective.guidance=1"]))
    objective = build_objective(load_config(["stage=grpo", "objective.inner_updates=4"]))
    assert (objective.updates_per_step, objective.forwards_per_batch) == (4, 8)
    for wrong in ({"window": 6}, {"window_within": 10}, {"caption_dropout": 0.1}, {"posterior": "sample"}):
        with pytest.raises(ValueError, match=r"window|rollouts"):
            config(**wrong)
