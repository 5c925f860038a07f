"""The loss is the velocity's weighted error; noise belongs to slots, so cutting a batch otherwise changes nothing."""

from __future__ import annotations

import math

import pytest
import torch

from consumers.batch import MicroBatch
from consumers.objectives import OBJECTIVES, build_objective
from consumers.objectives.flow_matching import FlowMatching, shift_mu
from qwenimg_dist.compose import load_config
from qwenimg_dist.config import FlowMatchingConfig
from qwenimg_dist.flow.sigmas import draw_noise, draw_sigma, resolution_mu
from qwenimg_dist.schema import Bucket

BUCKET = Bucket(height=64, width=32)


def config(**changes: object) -> FlowMatchingConfig:
    return FlowMatchingConfig.model_validate({"kind": "flow_matching", **changes})


def micro(slots: list[int], weights: list[float] | None = None) -> MicroBatch:
    """Samples whose latents are a function of the slot."""
    latents = [torch.randn(16, 8, 4, generator=torch.Generator().manual_seed(slot)) for slot in slots]
    return MicroBatch(
        latents=torch.stack(latents),
        text=torch.zeros(len(slots), 3, 8),
        text_mask=None,
        weights=torch.tensor(weights or [1.0] * len(slots)),
        slots=torch.tensor(slots),
        bucket=BUCKET,
    )


def blind(noisy: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return noisy * sigma[:, None, None, None]


def test_a_perfect_model_has_no_loss() -> None:
    one = micro([3, 4])
    noise = draw_noise(7, 11, [3, 4], (16, 8, 4))

    def perfect(noisy: torch.Tensor, sigma: torch.Tensor, *_: object) -> torch.Tensor:
        # x_sigma = (1 - sigma) x0 + sigma eps, so the velocity follows from x_sigma and x0 alone.
        return (noisy - one.latents) / sigma[:, None, None, None]

    output = FlowMatching(config(), seed=7).loss(perfect, one, step=11)
    assert float(output.loss) < 1e-8
    assert torch.allclose(perfect(one.latents + noise, torch.ones(2)), noise, atol=1e-6)


def test_value_by_hand() -> None:
    one = micro([5])
    mu = resolution_mu(BUCKET.image_tokens)
    sigma, noise = draw_sigma(7, 2, [5], mu=mu), draw_noise(7, 2, [5], (16, 8, 4))
    noisy = (1 - sigma) * one.latents + sigma * noise
    expected = ((noisy * sigma - (noise - one.latents)) ** 2).mean()
    assert torch.allclose(FlowMatching(config(), seed=7).loss(blind, one, step=2).loss, expected)


def test_cutting_a_batch_otherwise_changes_nothing() -> None:
    objective = FlowMatching(config(), seed=1)
    whole = objective.loss(blind, micro([0, 1, 2, 3]), step=9).loss
    parts = [objective.loss(blind, micro(slots), step=9).loss for slots in ([3], [0, 2], [1])]
    assert torch.allclose(whole, torch.stack(parts).sum())


def test_weight_zero_moves_nothing() -> None:
    objective = FlowMatching(config(), seed=1)
    with_fill = objective.loss(blind, micro([0, 1], [1.0, 0.0]), step=0).loss
    assert torch.allclose(with_fill, objective.loss(blind, micro([0]), step=0).loss)


def test_steps_and_seeds_differ() -> None:
    losses = [
        float(FlowMatching(config(), seed=seed).loss(blind, micro([0]), step=step).loss)
        for seed, step in ((0, 0), (0, 1), (1, 0))
    ]
    assert len(set(losses)) == 3


def test_shift() -> None:
    assert shift_mu(config(), 256) == pytest.approx(0.5)
    assert shift_mu(config(shift="none"), 256) == 0.0
    assert shift_mu(config(shift="constant", shift_constant=3.0), 256) == pytest.approx(math.log(3.0))


def test_loss_is_fp32_with_a_graph() -> None:
    weight = torch.nn.Parameter(torch.ones(()))
    output = FlowMatching(config(), seed=0).loss(lambda noisy, *_: noisy * weight, micro([0, 1]), step=0)
    assert output.loss.dtype == torch.float32
    output.loss.backward()
    assert weight.grad is not None


def test_registry_builds_what_the_config_names() -> None:
    objective = build_objective(load_config(["train.seed=5"]))
    assert isinstance(objective, FlowMatching)
    assert objective.seed == 5
    assert objective.forwards_per_batch == 1
    assert set(OBJECTIVES) == {"flow_matching"}
