"""Draws belong to slots; the density and the shift are what they claim."""

import math
from statistics import NormalDist

import pytest
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

from qwenimg_dist.flow.sigmas import (
    MAX_MODE_SCALE,
    Density,
    draw_noise,
    draw_sigma,
    resolution_mu,
    shift,
    sigma_at_quantiles,
)


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


def mode_cdf(values: torch.Tensor, scale: float) -> torch.Tensor:
    """By inverting Esser et al., Eq. 20, with bisection: P(f(u) < t) = 1 - u(t), f falling."""
    low, high = torch.zeros_like(values), torch.ones_like(values)
    for _ in range(60):
        u = (low + high) / 2
        above = 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u) > values
        low, high = torch.where(above, u, low), torch.where(above, high, u)
    return 1 - low


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.29, MAX_MODE_SCALE])
def test_mode_density_is_that_of_the_paper(scale: float) -> None:
    count = 10_000
    sigma = draw_sigma(1, 2, range(count), density="mode", mode_scale=scale).double().sort().values
    empirical = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    assert (empirical - mode_cdf(sigma, scale)).abs().max() < 1.63 / math.sqrt(count), "Kolmogorov-Smirnov at 1 %"
    middle = float(((sigma > 0.4) & (sigma < 0.6)).double().mean())
    assert (middle > 0.25) == (scale > 1)
    assert (middle < 0.16) == (scale < 0)


def test_mode_quantiles_and_limits() -> None:
    quantiles = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)
    for scale in (-0.7, 0.0, 1.29):
        sigma = sigma_at_quantiles(quantiles.tolist(), density="mode", mean=0.0, std=1.0, mu=0.0, mode_scale=scale)
        assert bool((sigma.diff() > 0).all())
        torch.testing.assert_close(mode_cdf(sigma.double(), scale), quantiles, atol=1e-6, rtol=0)
    for scale in (-1.01, MAX_MODE_SCALE + 0.01):
        with pytest.raises(ValueError, match="needs a scale from -1"):
            draw_sigma(0, 0, [0], density="mode", mode_scale=scale)
    assert 0 < float(sigma_at_quantiles([0.0], density="mode", mean=0.0, std=1.0, mu=0.0, mode_scale=1.0)) < 1e-9


@pytest.mark.parametrize("density", ["logit_normal", "uniform", "mode"])
def test_strata_are_met_once_each_and_keep_the_density(density: Density) -> None:
    def quantile(step: int, slots: range, strata: int) -> torch.Tensor:
        sigma = draw_sigma(5, step, slots, density=density, mode_scale=1.29, strata=strata).double()
        if density == "logit_normal":
            return torch.tensor([NormalDist().cdf(float(v)) for v in torch.logit(sigma)])
        return mode_cdf(sigma, 1.29) if density == "mode" else sigma

    for strata in (1, 7, 64):
        for step in (0, 1):
            cells = (quantile(step, range(strata), strata) * strata).floor().long()
            assert sorted(cells.tolist()) == list(range(strata))
    # One slot over many steps meets the whole density: no slot is tied to a part of it.
    over_steps = torch.cat([quantile(step, range(3, 4), 8) for step in range(2000)]).sort().values
    assert ((torch.arange(2000) + 0.5) / 2000 - over_steps).abs().max() < 1.63 / math.sqrt(2000)
    first = torch.tensor([float(quantile(step, range(1), 8)) for step in range(300)])
    second = torch.tensor([float(quantile(step, range(1, 2), 8)) for step in range(300)])
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1]) + 1 / 7) < 0.2


def test_strata_belong_to_slots_and_the_size_of_the_batch() -> None:
    whole = draw_sigma(3, 11, range(12), strata=12)
    for ranks in (2, 3, 5):
        for rank in range(ranks):
            slots = list(range(rank, 12, ranks))
            assert torch.equal(draw_sigma(3, 11, slots, strata=12), whole[slots])
    assert not torch.equal(draw_sigma(3, 11, range(12), strata=13), whole)
    assert draw_sigma(3, 11, [12, 13], strata=12).shape == (2,)  # slots that even out the ranks


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
