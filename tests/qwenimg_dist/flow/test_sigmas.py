"""Draws belong to slots; the density and the shift are what they claim."""

import math
from statistics import NormalDist

import pytest
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

from qwenimg_dist.flow.sigmas import draw_noise, draw_sigma, resolution_mu, shift, sigma_at_quantiles


@pytest.mark.parametrize(("side", "factor"), [(256, 1.649), (512, 1.714), (640, 1.764), (1024, 2.001), (1328, 2.303)])
def test_resolution_mu(side: int, factor: float) -> None:
    tokens = (side // 16) ** 2
    assert resolution_mu(tokens) == pytest.approx(calculate_shift(tokens, 256, 8192, 0.5, 0.9), abs=1e-12)
    assert math.exp(resolution_mu(tokens)) == pytest.approx(factor, abs=6e-4)


def test_shift_formula() -> None:
    sigma = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    for mu in (0.0, 0.5, 0.9):
        expected = math.exp(mu) / (math.exp(mu) + 1 / sigma - 1)
        torch.testing.assert_close(shift(sigma, mu), expected)
    assert torch.equal(shift(torch.zeros(1), 0.7), torch.zeros(1))


def test_draws_depend_on_the_slot_alone() -> None:
    whole_sigma, whole_noise = draw_sigma(3, 11, range(12)), draw_noise(3, 11, range(12), (16, 4, 6))
    for ranks in (1, 2, 4):
        for rank in range(ranks):
            slots = list(range(rank, 12, ranks))
            assert torch.equal(draw_sigma(3, 11, slots), whole_sigma[slots])
            assert torch.equal(draw_noise(3, 11, slots, (16, 4, 6)), whole_noise[slots])
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    draw_noise(3, 11, [0], (4,))
    assert torch.equal(torch.random.get_rng_state(), before), "the global generator is not touched"
    assert draw_noise(3, 11, [], (4, 2)).shape == (0, 4, 2)
    assert draw_sigma(3, 11, []).shape == (0,)


def test_streams_seeds_steps_and_slots_are_independent() -> None:
    base = draw_noise(0, 0, [0], (64,))
    others = [
        draw_noise(1, 0, [0], (64,)),
        draw_noise(0, 1, [0], (64,)),
        draw_noise(0, 0, [1], (64,)),
        draw_noise(0, 0, [0], (64,), stream="eval"),
        draw_noise(1, 10, [0], (64,)),
        draw_noise(11, 0, [0], (64,)),
    ]
    everything = torch.stack([base[0], *(o[0] for o in others)])
    correlations = torch.corrcoef(everything) - torch.eye(len(everything))
    assert correlations.abs().max() < 0.5
    assert draw_sigma(0, 0, [0]) != draw_sigma(0, 0, [0], stream="eval")


def test_noise_is_standard_normal() -> None:
    noise = draw_noise(0, 5, range(200), (16, 8, 8))
    assert noise.dtype == torch.float32
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.std()) - 1) < 0.01


def test_pinned_values() -> None:
    """A change of these is a change of every run's noise: it breaks resuming and must be said."""
    assert draw_sigma(0, 0, range(4)).tolist() == pytest.approx(PINNED_SIGMA, abs=1e-6)
    assert draw_noise(0, 0, [0], (4,))[0].tolist() == pytest.approx(PINNED_NOISE, abs=1e-6)


PINNED_SIGMA = [0.7340081, 0.5307333, 0.4695809, 0.6353385]
PINNED_NOISE = [0.6267749, 1.0663958, 1.817633, 0.2896397]


def test_density_is_shifted_logit_normal() -> None:
    mean, std, mu, count = -0.3, 1.2, 0.6, 20_000
    sigma = draw_sigma(1, 2, range(count), mean=mean, std=std, mu=mu)
    # The shift adds mu to the logit, so the shifted density is logit-normal around mean + mu.
    logits = torch.logit(sigma.double()).sort().values
    normal = NormalDist(mean + mu, std)
    empirical = torch.arange(1, count + 1) / count
    expected = torch.tensor([normal.cdf(float(v)) for v in logits])
    assert (empirical - expected).abs().max() < 1.63 / math.sqrt(count), "Kolmogorov-Smirnov at 1 %"


def test_uniform_density_and_quantiles() -> None:
    sigma = draw_sigma(1, 2, range(2000), density="uniform")
    assert 0 < float(sigma.min()) < 0.01
    assert 0.99 < float(sigma.max()) < 1
    quantiles = [0.0, 0.25, 0.5, 0.75, 1.0]
    uniform = sigma_at_quantiles(quantiles, density="uniform", mean=0.0, std=1.0, mu=0.0)
    assert uniform.tolist() == pytest.approx(quantiles)
    logit = sigma_at_quantiles(quantiles, density="logit_normal", mean=0.5, std=2.0, mu=0.0)
    assert logit[2] == pytest.approx(float(torch.sigmoid(torch.tensor(0.5))))
    assert bool((logit.diff() > 0).all())
    with pytest.raises(ValueError, match="needs std > 0"):
        draw_sigma(0, 0, [0], std=0.0)
    with pytest.raises(ValueError, match="unknown sigma density"):
        draw_sigma(0, 0, [0], density="beta")  # type: ignore[arg-type]
