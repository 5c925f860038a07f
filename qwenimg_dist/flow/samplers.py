"""From noise to data: the sigma schedule of stock diffusers, the Euler steps, and true guidance.

Place in the flow: `models.generate` and the evaluation build pictures from these plain functions.

Refuses: scheduler variants that Qwen-Image does not use (Karras, exponential and beta sigmas, inverted
sigmas, stochastic steps): silently ignoring one would give other pictures than the pipeline.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from qwenimg_dist.flow.sigmas import resolution_mu, shift

UNSUPPORTED = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(x (B,...), sigma (B,)) -> velocity (B,...)."""


def ode_schedule(num_steps: int, image_tokens: int, scheduler_config: Mapping[str, Any]) -> torch.Tensor:
    """Sigmas (num_steps + 1,) fp32, from 1 down to a final 0, as `QwenImagePipeline` sets them.

    `scheduler_config` is PIPELINE/scheduler/scheduler_config.json of a `FlowMatchEulerDiscreteScheduler`;
    absent keys take that class's defaults. Evenly spaced sigmas from 1 to 1/num_steps are shifted (by the
    image tokens' mu where `use_dynamic_shifting`, else by `shift`), then stretched so that the last one
    before 0 is `shift_terminal`. A single step is [1, 0]; stock diffusers gives NaN there when it
    stretches.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    unsupported = [key for key in UNSUPPORTED if scheduler_config.get(key)]
    if unsupported:
        raise ValueError(f"scheduler_config sets {', '.join(unsupported)}, which this sampler does not implement")
    sigmas = torch.linspace(1.0, 1.0 / num_steps, num_steps, dtype=torch.float64)
    sigmas = shift(sigmas, _shift_mu(image_tokens, scheduler_config))
    terminal = scheduler_config.get("shift_terminal")
    if terminal and num_steps > 1:
        sigmas = 1.0 - (1.0 - sigmas) * (1.0 - terminal) / (1.0 - sigmas[-1])
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


def _shift_mu(image_tokens: int, scheduler_config: Mapping[str, Any]) -> float:
    if not scheduler_config.get("use_dynamic_shifting", False):
        return math.log(scheduler_config.get("shift", 1.0))
    mu = resolution_mu(
        image_tokens,
        base_shift=scheduler_config.get("base_shift", 0.5),
        max_shift=scheduler_config.get("max_shift", 1.15),
        base_tokens=scheduler_config.get("base_image_seq_len", 256),
        max_tokens=scheduler_config.get("max_image_seq_len", 4096),
    )
    # The linear type uses mu itself where the exponential one uses e^mu.
    return math.log(mu) if scheduler_config.get("time_shift_type") == "linear" else mu


def sample_ode(predict: Predict, noise: torch.Tensor, sigmas: torch.Tensor | Sequence[float]) -> torch.Tensor:
    """Integrates dx/dsigma = v from `noise` (B,...) along `sigmas` (N+1,) by Euler steps; the state is fp32.

    `predict` is called once per step with the state and sigma (B,), both on the noise's device; the last
    sigma, usually 0, is only arrived at.
    """
    x = noise.float()
    steps = torch.as_tensor(sigmas, dtype=torch.float32)
    for sigma, sigma_next in zip(steps[:-1].tolist(), steps[1:].tolist(), strict=True):
        velocity = predict(x, x.new_full((x.shape[0],), sigma))
        x = x + (sigma_next - sigma) * velocity.float()
    return x


def true_guidance(positive: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
    """`negative + scale (positive - negative)`, rescaled per token to the norm of `positive`; (...,
    channels).

    The arguments are *packed* (B,S,64): the norm is taken over a token's 64 values, as in
    `QwenImagePipeline`. A token whose combination is exactly zero stays zero, where stock diffusers divides
    by it.
    """
    combined = negative + scale * (positive - negative)
    target: torch.Tensor = torch.linalg.vector_norm(positive, dim=-1, keepdim=True)
    norm: torch.Tensor = torch.linalg.vector_norm(combined, dim=-1, keepdim=True)
    return combined * (target / norm.clamp_min(1e-20))
