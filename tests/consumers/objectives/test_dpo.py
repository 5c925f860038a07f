"""The preference loss by hand, its gradient, its draws; errors computed beforehand give what a second model gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_run import TRANSFORMER

from consumers.batch import MicroBatch
from consumers.objectives import build_objective, sample_kind
from consumers.objectives.dpo import Dpo, pair_draws, pair_errors
from consumers.objectives.flow_matching import FlowMatching
from qwenimg_dist.compose import load_config
from qwenimg_dist.config import DpoConfig, FlowMatchingConfig
from qwenimg_dist.flow.sigmas import draw_noise, draw_sigma, resolution_mu
from qwenimg_dist.models.transformer import build_transformer, predict_velocity
from qwenimg_dist.schema import Bucket

BUCKET = Bucket(height=64, width=32)
SHAPE = (16, 8, 4)
Call = Callable[..., torch.Tensor]


def config(**changes: object) -> DpoConfig:
    tree: dict[str, Any] = {"kind": "dpo", "caption_dropout": 0.0, "beta": 30.0, "reference": "online", **changes}
    return DpoConfig.model_validate(tree)


def micro(slots: list[int], *, numbers: list[int] | None = None, weights: list[float] | None = None) -> MicroBatch:
    """Pairs whose latents are a function of their number in the listing, 100 + slot unless given."""
    numbers = numbers or [100 + slot for slot in slots]

    def draw(seed: int) -> torch.Tensor:
        return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))

    return MicroBatch(
        latents=torch.stack([draw(number) for number in numbers]),
        rejected=torch.stack([draw(number + 10_000) for number in numbers]),
        logvar=None,
        text=torch.stack([torch.full((3, 8), float(number)) for number in numbers]),
        text_mask=torch.tensor([[True, True, number % 2 == 0] for number in numbers]),
        weights=torch.tensor(weights or [1.0] * len(slots)),
        slots=torch.tensor(slots),
        num_slots=64,
        bucket=BUCKET,
        numbers=torch.tensor(numbers),
    )


def model(scale: float) -> Call:
    """A velocity that depends on all that a model sees."""

    def predict(noisy: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        valid = (text[:, :, 0] * mask).sum(dim=1) / 1000
        return scale * noisy * (1 + sigma)[:, None, None, None] + valid[:, None, None, None]

    return predict


def with_errors(settings: DpoConfig, one: MicroBatch, reference: Call, seed: int) -> MicroBatch:
    """As a pass over the pairs computes them beforehand: one draw after the other, in another batch each."""
    assert settings.draws is not None
    assert one.numbers is not None
    errors = torch.full((len(one.slots), settings.draws, 2), math.nan)
    for row in reversed(range(len(one.slots))):
        alone = micro([0], numbers=[int(one.numbers[row])])
        for draw in range(settings.draws):
            sigma, noise = pair_draws(settings, seed, [int(one.numbers[row])], [draw], SHAPE, BUCKET.image_tokens)
            errors[row, draw] = pair_errors(reference, alone, sigma, noise)[:, 0]
    return replace(one, reference=errors)


@pytest.mark.parametrize("draws", [4, None])
def test_the_loss_is_ln_2_where_the_policy_is_the_reference(draws: int | None) -> None:
    one = micro([0, 3, 4], weights=[1.0, 1.0, 0.0])
    for step in range(3):
        output = Dpo(config(draws=draws), seed=5, reference=model(0.4)).loss(model(0.4), one, step=step)
        assert float(output.loss) == pytest.approx(2 * math.log(2), rel=1e-6)
        assert float(output.metrics["implicit_accuracy"]) == 0
        assert float(output.metrics["margin"]) == 0
    if draws:
        settings = config(draws=draws, reference="precomputed")
        output = Dpo(settings, seed=5).loss(model(0.4), with_errors(settings, one, model(0.4), 5), step=1)
        assert float(output.loss) == pytest.approx(2 * math.log(2), rel=1e-6)


def by_hand(settings: DpoConfig, one: MicroBatch, step: int, seed: int) -> list[dict[str, float]]:
    """The formula in plain Python numbers, pair by pair, fp64, at fresh draws."""
    found = []
    slots = one.slots.tolist()
    sigmas = draw_sigma(seed, step, slots, mu=resolution_mu(BUCKET.image_tokens)).double()
    noises = draw_noise(seed, step, slots, SHAPE).double()
    assert one.rejected is not None
    assert one.text_mask is not None
    for row in range(len(slots)):
        errors = {}
        for side, latents in (("w", one.latents[row].double()), ("l", one.rejected[row].double())):
            noisy = (1 - sigmas[row]) * latents + sigmas[row] * noises[row]
            for who, scale in (("policy", 0.5), ("reference", 0.3)):
                valid = float((one.text[row, :, 0] * one.text_mask[row]).sum()) / 1000
                velocity = scale * noisy * (1 + sigmas[row]) + valid
                gap = velocity - (noises[row] - latents)
                errors[f"{who}_{side}"] = sum(float(g) ** 2 for g in gap.flatten()) / gap.numel()
        gain_w = errors["policy_w"] - errors["reference_w"]
        gain_l = errors["policy_l"] - errors["reference_l"]
        inside = -0.5 * settings.beta * (gain_w - gain_l)
        found.append({"loss": math.log1p(math.exp(-inside)), "inside": inside, "margin": gain_l - gain_w, **errors})
    return found


def test_value_by_hand() -> None:
    one, settings = micro([2, 5, 9]), config(draws=None, sft_weight=0.25)
    expected = by_hand(settings, one, 7, 11)
    output = Dpo(settings, seed=11, reference=model(0.3)).loss(model(0.5), one, step=7)
    total = sum(pair["loss"] + 0.25 * pair["policy_w"] for pair in expected)
    assert float(output.loss) == pytest.approx(total, rel=1e-5)
    sums = {name: float(value) for name, value in output.metrics.items()}
    assert sums["preference_loss"] == pytest.approx(sum(pair["loss"] for pair in expected), rel=1e-5)
    assert sums["implicit_accuracy"] == sum(pair["inside"] > 0 for pair in expected)
    assert 0 < sums["implicit_accuracy"] < 3
    assert sums["margin"] == pytest.approx(sum(pair["margin"] for pair in expected), rel=1e-4)
    assert sums["winner_error"] == pytest.approx(sum(pair["policy_w"] for pair in expected), rel=1e-5)
    assert sums["loser_reference_error"] == pytest.approx(sum(pair["reference_l"] for pair in expected), rel=1e-5)


def test_the_gradient_lowers_the_winners_error_and_raises_the_losers() -> None:
    one, settings = micro([2, 5]), config(draws=None)
    velocity = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    seen: list[torch.Tensor] = []

    def free(noisy: torch.Tensor, sigma: torch.Tensor, *_: object) -> torch.Tensor:
        seen.extend([noisy, sigma])
        return velocity

    Dpo(settings, seed=1, reference=model(0.3)).loss(free, one, step=0).loss.backward()
    assert velocity.grad is not None
    assert one.rejected is not None
    noisy, sigma = seen
    pictures = torch.cat([one.latents, one.rejected])
    noise = (noisy - (1 - sigma)[:, None, None, None] * pictures) / sigma[:, None, None, None]
    assert torch.equal(sigma[:2], sigma[2:])
    assert torch.allclose(noise[:2], noise[2:], atol=1e-4)
    gap = velocity.detach() - (noise - pictures)
    error = gap.square().mean(dim=(1, 2, 3))
    reference = pair_errors(model(0.3), one, sigma[:2], noise[:2]).flatten()
    inside = -0.5 * settings.beta * ((error - reference)[:2] - (error - reference)[2:])
    strength = 0.5 * settings.beta * torch.sigmoid(-inside)  # d loss / d winner's error
    expected = torch.cat([strength, -strength])[:, None, None, None] * 2 * gap / gap[0].numel()
    assert torch.allclose(velocity.grad, expected, rtol=1e-3, atol=1e-7)
    along = (velocity.grad * gap).sum(dim=(1, 2, 3))
    assert (along[:2] > 0).all()
    assert (along[2:] < 0).all()


@pytest.mark.parametrize("draws", [1, 4])
def test_errors_computed_beforehand_equal_a_second_model(draws: int) -> None:
    online, before = config(draws=draws), config(draws=draws, reference="precomputed")
    one = micro([0, 1, 2, 3, 4], numbers=[7, 1, 300, 8, 12])
    given = with_errors(before, one, model(0.3), 3)
    losses = []
    for step in range(4):
        expected = Dpo(online, seed=3, reference=model(0.3)).loss(model(0.5), one, step=step)
        found = Dpo(before, seed=3).loss(model(0.5), given, step=step)
        assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-5)
        for name, value in expected.metrics.items():
            assert float(found.metrics[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-6)
        losses.append(float(found.loss))
    assert len(set(losses)) == (1 if draws == 1 else 4)


def test_errors_of_other_pairs_are_noticed() -> None:
    before = config(draws=4, reference="precomputed")
    one = micro([0, 1])
    given = with_errors(before, one, model(0.5), 3)
    right = Dpo(before, seed=3).loss(model(0.5), given, step=0)
    assert given.reference is not None
    swapped = replace(given, reference=given.reference.flip(0))
    assert abs(float(Dpo(before, seed=3).loss(model(0.5), swapped, step=0).loss) - float(right.loss)) > 0.1


def test_draws_belong_to_pairs_and_cover_the_density() -> None:
    settings = config(draws=4, sigma_density="uniform", shift="none")
    numbers = list(range(200))
    for draw in range(4):
        sigma, noise = pair_draws(settings, 0, numbers, [draw] * 200, SHAPE, BUCKET.image_tokens)
        assert ((sigma * 4).long() == draw).all()
        alone, alone_noise = pair_draws(settings, 0, [17], [draw], SHAPE, BUCKET.image_tokens)
        assert torch.equal(alone[0], sigma[17])
        assert torch.equal(alone_noise[0], noise[17])
    objective = Dpo(settings, seed=0)
    taken = [objective._chosen_draws(micro([slot]), step) for slot in range(8) for step in range(50)]
    counts = torch.bincount(torch.tensor(taken).flatten(), minlength=4)
    assert (counts > 60).all()  # of 100 expected each


def test_cutting_a_batch_otherwise_changes_nothing() -> None:
    for draws in (4, None):
        objective = Dpo(config(draws=draws), seed=1, reference=model(0.3))
        whole = objective.loss(model(0.5), micro([0, 1, 2, 3]), step=9).loss
        parts = [objective.loss(model(0.5), micro(slots), step=9).loss for slots in ([3], [0, 2], [1])]
        assert torch.allclose(whole, torch.stack(parts).sum())


def test_the_winners_error_is_what_flow_matching_trains() -> None:
    one = micro([2, 5])
    flow = FlowMatchingConfig.model_validate({"kind": "flow_matching"})
    expected = FlowMatching(flow, seed=4).loss(model(0.5), one, step=6).loss
    found = Dpo(config(draws=None), seed=4, reference=model(0.3)).loss(model(0.5), one, step=6)
    assert torch.allclose(found.metrics["winner_error"], expected)


def test_missing_errors_are_refused() -> None:
    with pytest.raises(ValueError, match="given pairs without the reference's errors"):
        Dpo(config(draws=4, reference="precomputed"), seed=0).loss(model(0.5), micro([0]), step=0)
    with pytest.raises(ValueError, match="without their rejected pictures"):
        Dpo(config(), seed=0, reference=model(0.3)).loss(model(0.5), replace(micro([0]), rejected=None), step=0)


def test_a_rising_winners_error_is_told_once_in_a_while() -> None:
    def values(winner: float) -> dict[str, float]:
        return {"train/winner_error": winner, "train/winner_reference_error": 1.0}

    objective = Dpo(config(winner_tolerance=0.02), seed=0)
    assert not any(objective.notice(values(1.01)) for _ in range(50))
    told = [objective.notice(values(1.05)) for _ in range(30)]
    assert 2 <= sum(map(bool, told)) <= 4
    assert "above the reference's" in next(filter(None, told))
    assert "objective.sft_weight" in next(filter(None, told))
    assert objective.notice({"train/loss": math.nan}) == ""
    fresh = Dpo(config(winner_tolerance=0.02), seed=0)
    assert not any(fresh.notice(values(2.0)) for _ in range(5))  # one noisy step is no trend


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["objective.draws=null"], "give a number, or reference=online"),
        (["objective.caption_dropout=0.1"], "set caption_dropout=0, or reference=online"),
        (["objective.posterior=sample", "encode.posterior=mean_logvar"], "posterior=mode weighting=none"),
        (["objective.sigma_stratified=true"], "spread evenly already"),
        (["follow=true"], "needs all pairs before the first step"),
        (["objective.beta=0"], "greater than 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(["stage=dpo", *words])


def test_the_stage_trains_on_pairs() -> None:
    settings = load_config(["stage=dpo", "train.seed=5"])
    objective = build_objective(settings)
    assert isinstance(objective, Dpo)
    assert objective.seed == 5
    assert sample_kind(settings) == "preference"
    assert settings.source.kind == "pairs"
    online = load_config(["stage=dpo", "objective.reference=online", "objective.draws=null", "follow=true"])
    assert online.objective.kind == "dpo"


def test_a_pair_holds_the_memory_of_two_images() -> None:
    """What is kept for the backward pass, in bytes, of a real transformer: DPO on errors computed beforehand against
    flow matching on as many images. States and gathered weights are the same."""
    torch.manual_seed(0)
    transformer = build_transformer(TRANSFORMER).train()

    def predict(noisy: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor, mask: Any) -> torch.Tensor:
        return predict_velocity(transformer, noisy, sigma, text, mask)

    def held(make: Callable[[], torch.Tensor]) -> int:
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = make()
        assert loss.requires_grad
        return sum(kept.values())

    pairs, images = micro([0, 1]), micro([0, 1, 2, 3])
    settings = config(draws=4, reference="precomputed")
    given = replace(pairs, reference=torch.ones(2, 4, 2))
    flow = FlowMatching(FlowMatchingConfig.model_validate({"kind": "flow_matching"}), seed=0)
    of_images = held(lambda: flow.loss(predict, replace(images, rejected=None), step=0).loss)
    of_pairs = held(lambda: Dpo(settings, seed=0).loss(predict, given, step=0).loss)
    assert of_images > 500_000
    assert of_pairs <= 1.05 * of_images
