"""Flow matching: the velocity `eps - x0` at a random point of the straight path, squared error in fp32.

Place in the flow: pretraining, SFT and editing are this objective with other data and settings. An edit's conditions
are given clean beside the noisy target, and the loss, like the shift, is of the target alone. Sigma, noise and the
sample of the posterior depend on (seed, step, slot) only, stratified sigmas on the size of the global batch besides, so
they are the same on any number of ranks. Caption dropout is the ledger's, not this file's.
Reference: arXiv 2508.02324; logit-normal and mode density, resolution shift: arXiv 2403.03206.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from consumers.batch import MicroBatch
from consumers.objectives.base import LossOutput, Predict
from qwenimg_dist.config import FlowConfig, FlowMatchingConfig
from qwenimg_dist.flow.path import interpolate, velocity_target
from qwenimg_dist.flow.sigmas import draw_noise, draw_sigma, resolution_mu, sigma_at_quantiles
from qwenimg_dist.schema import IMAGE, Kind

_QUADRATURE = 4096


class FlowMatching:
    """Mean squared error of the velocity, per sample averaged over its elements."""

    sample_kind: Kind = IMAGE
    forwards_per_batch = 1
    updates_per_step = 1

    def __init__(self, config: FlowMatchingConfig, *, seed: int, reference: Predict | None = None) -> None:
        """There is no use for a `reference`."""
        self.config = config
        self.seed = seed

    def loss(self, predict: Predict, micro: MicroBatch, *, step: int) -> LossOutput:
        slots, device = micro.slots.tolist(), micro.latents.device
        mu = shift_mu(self.config, micro.bucket.image_tokens)
        sigma = draw_sigma(
            self.seed,
            step,
            slots,
            density=self.config.sigma_density,
            mean=self.config.sigma_mean,
            std=self.config.sigma_std,
            mode_scale=self.config.sigma_mode_scale,
            mu=mu,
            strata=micro.num_slots if self.config.sigma_stratified else 0,
        ).to(device)
        noise = draw_noise(self.seed, step, slots, micro.latents.shape[1:]).to(device)
        if self.config.posterior == "sample":
            micro = self._sampled(micro, step)
        errors = squared_errors(predict, micro, sigma, noise)
        per_sample = {"sigma": sigma, "error": errors.detach()}
        if self.config.weighting == "none":
            return LossOutput(loss=(micro.weights * errors).sum(), per_sample=per_sample)
        weights = micro.weights * loss_weight(self.config, sigma, mu)
        unweighted = (micro.weights * errors.detach()).sum()
        metrics = {"loss_unweighted": unweighted}
        return LossOutput(loss=(weights * errors).sum(), metrics=metrics, per_sample=per_sample)

    def notice(self, values: Mapping[str, float]) -> str:
        return ""

    def _sampled(self, micro: MicroBatch, step: int) -> MicroBatch:
        """With latents `mean + exp(logvar / 2) * N(0,1)`."""
        if micro.logvar is None:
            raise ValueError("objective.posterior=sample was given latents without log-variances")
        slots, shape = micro.slots.tolist(), micro.latents.shape[1:]
        draw = draw_noise(self.seed, step, slots, shape, stream="posterior").to(micro.latents.device)
        return replace(micro, latents=micro.latents + (0.5 * micro.logvar).exp() * draw)


def squared_errors(predict: Predict, micro: MicroBatch, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """(b,) fp32: mean over each sample's elements of (v - (eps - x0))^2, at given sigma (b,) and noise."""
    noisy = interpolate(micro.latents, noise, sigma)
    # Of an edit only the target's tokens are predicted: what the model makes of its conditions' is not asked.
    conditions = (micro.conditions,) if micro.conditions else ()
    velocity = predict(noisy, sigma, micro.text, micro.text_mask, *conditions)
    return (velocity - velocity_target(micro.latents, noise)).square().mean(dim=(1, 2, 3))


def shift_mu(config: FlowConfig, image_tokens: int) -> float:
    """mu of the time shift for pictures of this size; 0 is no shift."""
    if config.shift == "resolution":
        return resolution_mu(image_tokens)
    return math.log(config.shift_constant) if config.shift == "constant" else 0.0


def loss_weight(config: FlowMatchingConfig, sigma: torch.Tensor, mu: float) -> torch.Tensor:
    """(b,) fp32 weight of each sample by its shifted sigma, of mean 1 over the sampled density shifted by `mu`.

    `bell`: `exp(-2 (sigma - 1/2)^2) - exp(-1/2)`, known as bell-shaped mean-normalised timestep weighting. Trainers
    that have it normalise over evenly spaced timesteps; here it is over the density that sigma is drawn from.
    """
    if config.weighting == "none":
        return torch.ones_like(sigma)
    return _bell(sigma) / _mean_bell(config, mu)


def _bell(sigma: torch.Tensor) -> torch.Tensor:
    return (-2.0 * (sigma - 0.5).square()).exp() - math.exp(-0.5)


@functools.lru_cache(maxsize=1024)  # one entry per size of picture
def _mean_bell(config: FlowMatchingConfig, mu: float) -> float:
    """Mean of the bell over the density: the midpoint rule over its quantiles."""
    quantiles = [(index + 0.5) / _QUADRATURE for index in range(_QUADRATURE)]
    sigma = sigma_at_quantiles(
        quantiles,
        density=config.sigma_density,
        mean=config.sigma_mean,
        std=config.sigma_std,
        mode_scale=config.sigma_mode_scale,
        mu=mu,
    )
    return float(_bell(sigma.double()).mean())
