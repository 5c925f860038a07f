"""Flow matching: the velocity `eps - x0` at a random point of the straight path, squared error in fp32.

Place in the flow: pretraining and SFT are this objective with other data and settings. Sigma and noise depend on
(seed, step, slot) only, so they are the same on any number of ranks. Caption dropout is the ledger's, not this file's.
Reference: arXiv 2508.02324; logit-normal density and resolution shift: arXiv 2403.03206.
"""

from __future__ import annotations

import math

import torch

from consumers.batch import MicroBatch
from consumers.objectives.base import LossOutput, Predict
from qwenimg_dist.config import FlowMatchingConfig
from qwenimg_dist.flow.path import interpolate, velocity_target
from qwenimg_dist.flow.sigmas import draw_noise, draw_sigma, resolution_mu


class FlowMatching:
    """Mean squared error of the velocity, per sample averaged over its elements."""

    sample_kind = "image"
    forwards_per_batch = 1

    def __init__(self, config: FlowMatchingConfig, *, seed: int) -> None:
        self.config = config
        self.seed = seed

    def loss(self, predict: Predict, micro: MicroBatch, *, step: int) -> LossOutput:
        slots, device = micro.slots.tolist(), micro.latents.device
        sigma = draw_sigma(
            self.seed,
            step,
            slots,
            density=self.config.sigma_density,
            mean=self.config.sigma_mean,
            std=self.config.sigma_std,
            mu=shift_mu(self.config, micro.bucket.image_tokens),
        ).to(device)
        noise = draw_noise(self.seed, step, slots, micro.latents.shape[1:]).to(device)
        errors = squared_errors(predict, micro, sigma, noise)
        return LossOutput(loss=(micro.weights * errors).sum())


def squared_errors(predict: Predict, micro: MicroBatch, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """(b,) fp32: mean over each sample's elements of (v - (eps - x0))^2, at given sigma (b,) and noise."""
    noisy = interpolate(micro.latents, noise, sigma)
    velocity = predict(noisy, sigma, micro.text, micro.text_mask)
    return (velocity - velocity_target(micro.latents, noise)).square().mean(dim=(1, 2, 3))


def shift_mu(config: FlowMatchingConfig, image_tokens: int) -> float:
    """mu of the time shift for pictures of this size; 0 is no shift."""
    if config.shift == "resolution":
        return resolution_mu(image_tokens)
    return math.log(config.shift_constant) if config.shift == "constant" else 0.0
