"""The Gaussian step against torch's distributions, its marginals against the ODE's, its window against ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from qwenimg_dist.flow.samplers import sample_ode
from qwenimg_dist.flow.sde import draw_window, kl, log_prob, sample_sde, transition
from qwenimg_dist.flow.sigmas import shift

MEAN, SPREAD = 1.5, 0.4
"""Of the data in the 1-D world."""
PARTICLES = 40_000


def exact_velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """E[eps - x0 | x] where x0 is N(MEAN, SPREAD^2) and eps is N(0, 1), in closed form."""
    keep = 1 - sigma
    variance = keep**2 * SPREAD**2 + sigma**2
    off = (x - keep * MEAN) / variance
    return sigma * off - (MEAN + keep * SPREAD**2 * off)


def schedule(num_steps: int) -> torch.Tensor:
    return torch.cat([shift(torch.linspace(1, 0.005, num_steps, dtype=torch.float64), 0.5).float(), torch.zeros(1)])


def simulate(step: Callable[..., tuple[torch.Tensor, float]], num_steps: int, level: float) -> torch.Tensor:
    """Particles from noise to data by Gaussian steps, the last one by the ODE."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(PARTICLES, generator=generator)
    sigmas = schedule(num_steps).tolist()
    for sigma, sigma_next in itertools.pairwise(sigmas[:-1]):
        mean, std = step(x, exact_velocity(x, torch.tensor(sigma)), sigma, sigma_next, level=level)
        x = mean + std * torch.randn(PARTICLES, generator=generator)
    return x - sigmas[-2] * exact_velocity(x, torch.tensor(sigmas[-2]))


@pytest.mark.parametrize("level", [0.4, 0.7, 1.2])
def test_the_sde_has_the_odes_marginals(level: float) -> None:
    """Within 2 %: 400 Euler steps, 40,000 particles."""
    noise = torch.randn(PARTICLES, generator=torch.Generator().manual_seed(1))
    ode = sample_ode(exact_velocity, noise, schedule(400))
    sde = simulate(transition, 400, level)
    for found in (ode, sde):
        assert float(found.mean()) == pytest.approx(MEAN, rel=0.02)
        assert float(found.std()) == pytest.approx(SPREAD, rel=0.02)


def test_marginals_hold_in_between_too() -> None:
    """Each sampled state, not only the end: N((1 - sigma) MEAN, (1 - sigma)^2 SPREAD^2 + sigma^2)."""
    generator = torch.Generator().manual_seed(2)
    noise, draws = torch.randn(PARTICLES, 1, generator=generator), torch.randn(300, PARTICLES, 1, generator=generator)
    _, taken = sample_sde(exact_velocity_2d, noise, schedule(400), window=range(300), level=0.7, draws=draws)
    for one in taken[20::70]:
        keep = 1 - one.sigma_next
        assert float(one.x_next.mean()) == pytest.approx(keep * MEAN, abs=0.02)
        assert float(one.x_next.std()) == pytest.approx(math.hypot(keep * SPREAD, one.sigma_next), rel=0.03)


def exact_velocity_2d(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return exact_velocity(x, sigma[:, None])


def in_the_reports_convention(
    x: torch.Tensor, velocity: torch.Tensor, sigma: float, sigma_next: float, *, level: float
) -> tuple[torch.Tensor, float]:
    """The report's Eq. 6 read beside its Eq. 1: t = 1 is data, v = x0 - eps, t grows."""
    t, dt, v = 1 - sigma, sigma - sigma_next, -velocity
    t = max(t, dt)
    variance = level**2 * t / (1 - t) if t < 1 else 0.0
    return x + (v + variance / (2 * t) * (x + (1 - t) * v)) * dt, math.sqrt(variance * dt)


def wrong_sign(
    x: torch.Tensor, velocity: torch.Tensor, sigma: float, sigma_next: float, *, level: float
) -> tuple[torch.Tensor, float]:
    """The score's part added where it must be taken off."""
    mean, std = transition(x, velocity, sigma, sigma_next, level=level)
    return 2 * (x + (sigma_next - sigma) * velocity) - mean, std


@pytest.mark.parametrize("step", [in_the_reports_convention, wrong_sign])
def test_of_the_test_mixed_conventions_leave_the_marginals(step: Callable[..., tuple[torch.Tensor, float]]) -> None:
    found = simulate(step, 400, 0.7)
    assert not float(found.std()) < 3 * SPREAD  # NaN is as wrong


@pytest.mark.parametrize(("sigma", "sigma_next"), [(1.0, 0.9), (0.83, 0.7), (0.3, 0.02)])
def test_log_probs_and_divergence_equal_torchs_distributions(sigma: float, sigma_next: float) -> None:
    generator = torch.Generator().manual_seed(3)
    x, velocity, other, draw = torch.randn(4, 3, 16, 6, 8, generator=generator)
    mean, std = transition(x, velocity, sigma, sigma_next, level=0.7)
    x_next = mean + std * draw
    normal = torch.distributions.Normal(mean.double(), std)
    expected = normal.log_prob(x_next.double()).mean(dim=(1, 2, 3))
    torch.testing.assert_close(log_prob(x_next, mean, std).double(), expected, rtol=1e-5, atol=1e-6)
    reference, same_std = transition(x, other, sigma, sigma_next, level=0.7)
    assert same_std == std
    divergence = torch.distributions.kl_divergence(normal, torch.distributions.Normal(reference.double(), std))
    torch.testing.assert_close(kl(mean, reference, std).double(), divergence.mean(dim=(1, 2, 3)), rtol=1e-5, atol=1e-7)
    assert bool((kl(mean, mean, std) == 0).all())


def test_the_step_by_hand() -> None:
    x, v = torch.tensor([[2.0]]), torch.tensor([[-0.5]])
    variance = 0.7**2 * 0.8 / 0.2
    mean, std = transition(x, v, 0.8, 0.6, level=0.7)
    assert std == pytest.approx(math.sqrt(variance * 0.2))
    by_hand = 2.0 + (-0.5 + variance / (2 * 0.8) * (2.0 + 0.2 * -0.5)) * -0.2
    assert float(mean) == pytest.approx(by_hand, rel=1e-6)
    _, std = transition(x, v, 1.0, 0.9, level=0.7)
    assert std == pytest.approx(math.sqrt(0.7**2 / 0.1 * 0.1))


def test_sampled_steps_are_their_own_transitions_and_the_rest_is_the_ode() -> None:
    generator = torch.Generator().manual_seed(4)
    noise, draws = torch.randn(2, 16, 4, 4, generator=generator), torch.randn(2, 2, 16, 4, 4, generator=generator)
    calls: list[float] = []

    def predict(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        calls.append(float(sigma[0]))
        return 0.3 * x * (1 + sigma)[:, None, None, None]

    sigmas = schedule(7)
    end, taken = sample_sde(predict, noise, sigmas, window=range(2, 4), level=0.7, draws=draws)
    assert calls == sigmas[:-1].tolist()
    assert [(one.sigma, one.sigma_next) for one in taken] == [tuple(sigmas[i : i + 2].tolist()) for i in (2, 3)]
    assert torch.equal(taken[0].x, sample_ode(predict, noise, sigmas[:3]))
    assert torch.equal(taken[0].x_next, taken[1].x)
    assert torch.equal(end, sample_ode(predict, taken[1].x_next, sigmas[4:]))
    for one in taken:
        mean, std = transition(one.x, predict(one.x, torch.full((2,), one.sigma)), one.sigma, one.sigma_next, level=0.7)
        assert torch.equal(log_prob(one.x_next, mean, std), one.log_prob)  # so that the first ratio is 1 to the bit


def test_windows_depend_on_seed_and_step_and_reach_everywhere() -> None:
    windows = [draw_window(7, step, length=2, within=5) for step in range(60)]
    assert windows == [draw_window(7, step, length=2, within=5) for step in range(60)]
    assert {window.start for window in windows} == {0, 1, 2, 3}
    assert {len(window) for window in windows} == {2}
    assert windows != [draw_window(8, step, length=2, within=5) for step in range(60)]
    with pytest.raises(ValueError, match="does not lie within"):
        draw_window(7, 0, length=6, within=5)


def test_a_gaussian_step_onto_data_is_refused() -> None:
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="smaller one above 0"):
        transition(x, x, 0.02, 0.0, level=0.7)
    with pytest.raises(ValueError, match="whose last is the ODE's"):
        sample_sde(lambda a, s: a, x, [1.0, 0.5, 0.0], window=range(1, 2), level=0.7, draws=x[None])
