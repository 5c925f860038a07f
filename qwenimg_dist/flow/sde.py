"""From noise to data with a chance in it: steps whose log-probability is known, for policy gradients.

Place in the flow: rollouts sample with `sample_sde`, the GRPO objective asks `transition`, `log_prob` and `kl` again
for the steps that were sampled. Within a window of the schedule a step is Gaussian, elsewhere it is the ODE's; the SDE
has the ODE's marginals, so a window takes nothing from the pictures. In the project's convention (sigma = 1 is noise,
v = eps - x0, dt = sigma_next - sigma < 0) the score is -(x + (1 - sigma) v) / sigma, and with diffusion
s = level sqrt(sigma / (1 - sigma)) the reverse SDE's Euler step is

    mean = x (1 + s^2 dt / (2 sigma)) + v (1 + s^2 (1 - sigma) / (2 sigma)) dt,    std = s sqrt(-dt)

References: Flow-GRPO, arXiv 2505.05470; the window: MixGRPO, arXiv 2507.21802. The technical report's Eq. 6 is the
same step, but beside its Eq. 1, where t = 1 is data, it would diverge.

Refuses: a Gaussian step onto sigma = 0, which no density of a picture allows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from qwenimg_dist.flow.samplers import Predict
from qwenimg_dist.flow.sigmas import slot_generator

_HALF_LOG_2_PI: Final = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True, kw_only=True)
class Transition:
    """One sampled step: where it began, where it ended, and how probable that was."""

    sigma: float
    sigma_next: float
    x: torch.Tensor
    """(B,...) fp32."""
    x_next: torch.Tensor
    """(B,...) fp32."""
    log_prob: torch.Tensor
    """(B,) fp32, see `log_prob`."""


def draw_window(seed: int, step: int, *, length: int, within: int) -> range:
    """The steps of a schedule that are Gaussian in this round: `length` of the first `within`, the same everywhere."""
    if not 0 < length <= within:
        raise ValueError(f"a window of {length} steps does not lie within the first {within}")
    generator = slot_generator(seed, "sde_window", step, 0)
    first = int(torch.randint(within - length + 1, (), generator=generator))
    return range(first, first + length)


def transition(
    x: torch.Tensor, velocity: torch.Tensor, sigma: float, sigma_next: float, *, level: float
) -> tuple[torch.Tensor, float]:
    """Mean (B,...) fp32 and standard deviation of the Gaussian step from `x` (B,...) at `sigma` to `sigma_next`."""
    if not 0.0 < sigma_next < sigma <= 1.0:
        raise ValueError(f"a Gaussian step goes from sigma to a smaller one above 0, not from {sigma} to {sigma_next}")
    dt = sigma_next - sigma
    # At sigma = 1 the diffusion would be infinite: there the step's other end stands in the denominator.
    variance = level**2 * sigma / (1.0 - (sigma if sigma < 1.0 else sigma_next))
    of_x = 1.0 + variance * dt / (2.0 * sigma)
    of_velocity = (1.0 + variance * (1.0 - sigma) / (2.0 * sigma)) * dt
    return of_x * x.float() + of_velocity * velocity.float(), math.sqrt(-variance * dt)


def log_prob(x_next: torch.Tensor, mean: torch.Tensor, std: float) -> torch.Tensor:
    """(B,) fp32: log-density of `x_next` (B,...) under N(mean, std^2), *averaged* over the elements.

    With the sum, ratios of a picture's thousands of elements would leave any clipping range at once.
    """
    standard = (x_next.float() - mean) / std
    return (-0.5 * standard.square()).flatten(1).mean(dim=1) - (math.log(std) + _HALF_LOG_2_PI)


def kl(mean: torch.Tensor, reference: torch.Tensor, std: float) -> torch.Tensor:
    """(B,) fp32: divergence of N(mean, std^2) from N(reference, std^2), averaged over the elements."""
    return ((mean - reference) / std).square().flatten(1).mean(dim=1) / 2.0


@torch.no_grad()
def sample_sde(
    predict: Predict,
    noise: torch.Tensor,
    sigmas: torch.Tensor | Sequence[float],
    *,
    window: range,
    level: float,
    draws: torch.Tensor,
) -> tuple[torch.Tensor, list[Transition]]:
    """As `samplers.sample_ode`, but Gaussian steps where `window` counts them; returns the end and these steps.

    `draws` (len(window), B, ...) are standard normal, what the steps are disturbed by. `predict` is called once per
    step, whatever the window. The end is (B,...) fp32.
    """
    x = noise.float()
    steps = torch.as_tensor(sigmas, dtype=torch.float32).tolist()
    if len(draws) != len(window) or window.stop >= len(steps) - 1:
        raise ValueError(
            f"{len(draws)} draws for steps {list(window)} of a schedule of {len(steps) - 1}, whose last is the ODE's"
        )
    taken: list[Transition] = []
    for index, (sigma, sigma_next) in enumerate(itertools.pairwise(steps)):
        velocity = predict(x, x.new_full((x.shape[0],), sigma))
        if index not in window:
            x = x + (sigma_next - sigma) * velocity.float()
            continue
        mean, std = transition(x, velocity, sigma, sigma_next, level=level)
        x_next = mean + std * draws[index - window.start].to(mean.device)
        taken.append(
            Transition(sigma=sigma, sigma_next=sigma_next, x=x, x_next=x_next, log_prob=log_prob(x_next, mean, std))
        )
        x = x_next
    return x, taken
