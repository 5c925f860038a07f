"""The loss is the velocity's weighted error; noise belongs to slots, so cutting a batch otherwise changes nothing."""

from __future__ import annotations

import math

import pytest
import torch

from consumers.batch import MicroBatch
from consumers.objectives import OBJECTIVES, build_objective
from consumers.objectives.flow_matching import FlowMatching, loss_weight, shift_mu
from qwenimg_dist.compose import load_config
from qwenimg_dist.config import FlowMatchingConfig
from qwenimg_dist.flow.sigmas import draw_noise, draw_sigma, resolution_mu
from qwenimg_dist.schema import Bucket

BUCKET = Bucket(height=64, width=32)


def config(**changes: object) -> FlowMatchingConfig:
    return FlowMatchingConfig.model_validate({"kind": "flow_matching", **changes})


def micro(
    slots: list[int], weights: list[float] | None = None, *, num_slots: int = 8, logvar: bool = False
) -> MicroBatch:
    """Samples whose latents are a function of the slot."""
    latents = [torch.randn(16, 8, 4, generator=torch.Generator().manual_seed(slot)) for slot in slots]
    return MicroBatch(
        latents=torch.stack(latents),
        logvar=torch.stack([one / 4 - 1 for one in latents]) if logvar else None,
        text=torch.zeros(len(slots), 3, 8),
        text_mask=None,
        weights=torch.tensor(weights or [1.0] * len(slots)),
        slots=torch.tensor(slots),
        num_slots=num_slots,
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


def seen(settings: FlowMatchingConfig, one: MicroBatch, *, seed: int = 3, step: int = 5) -> torch.Tensor:
    """(b,) the sigmas that the model was asked at."""
    asked: list[torch.Tensor] = []

    def spy(noisy: torch.Tensor, sigma: torch.Tensor, *_: object) -> torch.Tensor:
        asked.append(sigma)
        return noisy

    FlowMatching(settings, seed=seed).loss(spy, one, step=step)
    return asked[0]


def test_stratified_sigmas_cover_the_batch_and_do_not_know_ranks() -> None:
    settings = config(sigma_stratified=True, sigma_density="uniform", shift="none")
    whole = seen(settings, micro(list(range(8))))
    assert sorted((whole * 8).long().tolist()) == list(range(8))
    parts = [seen(settings, micro(slots)) for slots in ([0, 1, 2], [3, 4, 5, 6], [7])]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(seen(settings, micro(list(range(8))), step=6), whole)


@pytest.mark.parametrize("density", ["logit_normal", "uniform", "mode"])
@pytest.mark.parametrize("shift", ["none", "resolution"])
def test_bell_weights_have_mean_one_under_the_sampled_density(density: str, shift: str) -> None:
    settings = config(weighting="bell", sigma_density=density, shift=shift, sigma_stratified=True)
    mu = shift_mu(settings, BUCKET.image_tokens)
    sigma = draw_sigma(0, 0, range(4000), density=settings.sigma_density, mode_scale=1.29, mu=mu, strata=4000)
    weights = loss_weight(settings, sigma, mu)
    assert float(weights.mean()) == pytest.approx(1, abs=1e-4)
    middle, ends = loss_weight(settings, torch.tensor([0.5, 0.4, 0.6]), mu), torch.tensor([0.0, 1.0])
    assert middle[0] > middle[1] == pytest.approx(float(middle[2]))
    assert loss_weight(settings, ends, mu).abs().max() < 1e-6


def test_a_weighted_loss_is_the_unweighted_one_times_the_weight() -> None:
    plain, bell = config(), config(weighting="bell")
    one = micro([4], [1.0])
    expected = FlowMatching(plain, seed=3).loss(blind, one, step=5)
    found = FlowMatching(bell, seed=3).loss(blind, one, step=5)
    weight = loss_weight(bell, seen(plain, one), shift_mu(bell, BUCKET.image_tokens))
    assert torch.allclose(found.loss, weight[0] * expected.loss)
    assert torch.equal(found.metrics["loss_unweighted"], expected.loss)
    assert expected.metrics == {}


def test_a_sample_of_the_posterior_has_its_moments_and_belongs_to_the_slot() -> None:
    """Read from the target of a model that predicts nothing at sigma = 1, where the noise is known."""
    settings = config(posterior="sample")
    one = micro([2, 9], logvar=True)

    def latents_of(step: int, batch: MicroBatch) -> torch.Tensor:
        kept: list[torch.Tensor] = []

        def spy(noisy: torch.Tensor, sigma: torch.Tensor, *_: object) -> torch.Tensor:
            noise = draw_noise(3, step, batch.slots.tolist(), (16, 8, 4))
            weight = sigma[:, None, None, None]
            kept.append((noisy - weight * noise) / (1 - weight))
            return noisy

        FlowMatching(settings, seed=3).loss(spy, batch, step=step)
        return kept[0]

    draws = torch.stack([latents_of(step, one) for step in range(400)])
    assert one.logvar is not None
    standard = (draws - one.latents) / (0.5 * one.logvar).exp()
    assert abs(float(standard.mean())) < 0.01
    assert float(standard.std()) == pytest.approx(1, abs=0.01)
    assert abs(float(torch.corrcoef(standard.flatten(1).T[:2])[0, 1])) < 0.2
    alone = latents_of(7, micro([9], logvar=True))
    assert torch.equal(alone[0], draws[7][1])
    noise = draw_noise(3, 7, [2, 9], (16, 8, 4))
    assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), standard[7].flatten()]))[0, 1])) < 0.1
    with pytest.raises(ValueError, match="without log-variances"):
        FlowMatching(settings, seed=3).loss(blind, micro([0]), step=0)


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
    assert set(OBJECTIVES) == {"flow_matching", "dpo", "grpo"}
