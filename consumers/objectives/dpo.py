"""Direct preference optimisation on velocities: the chosen picture's error falls below the rejected one's.

Place in the flow: an objective on preference pairs. For one (noise, sigma) that both pictures of a pair share,
m = mean((v - (eps - x0))^2) of the trained model, r the same of the frozen reference, w the chosen and l the rejected:

    loss = -log sigmoid(-beta / 2 ((m_w - r_w) - (m_l - r_l)))        [+ sft_weight m_w]

which is ln 2 where the model is the reference. Errors are means over a latent's elements, in fp32; `beta` belongs to
means. The reference's errors come with the batch, computed beforehand at K draws of each pair, or from a second model
here. Both pictures go through one forward side by side: under ZeRO-3 two would gather all weights twice.
Reference: Diffusion-DPO, arXiv 2311.12908, Eq. 14, with the flow's velocity error for the noise error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import torch
from torch.nn.functional import logsigmoid

from consumers.batch import MicroBatch
from consumers.objectives.base import LossOutput, Predict
from consumers.objectives.flow_matching import shift_mu, squared_errors
from qwenimg_dist.config import DpoConfig
from qwenimg_dist.flow.sigmas import draw_noise, draw_sigma, sigma_at_quantiles, slot_generator
from qwenimg_dist.schema import PREFERENCE, Kind

_AVERAGED: Final = 20
"""Logged steps that the warning averages over."""
_QUIET: Final = 10
"""Logged steps between two warnings."""


class Dpo:
    """See the module's docstring."""

    sample_kind: Kind = PREFERENCE
    forwards_per_batch = 1
    updates_per_step = 1

    def __init__(self, config: DpoConfig, *, seed: int, reference: Predict | None = None) -> None:
        """`reference` is the frozen model; None where its errors come with the batch."""
        self.config = config
        self.seed = seed
        self._reference = reference
        self._rise = 0.0
        self._logged = 0
        self._warned = -_QUIET

    def loss(self, predict: Predict, micro: MicroBatch, *, step: int) -> LossOutput:
        chosen = self._chosen_draws(micro, step)
        sigma, noise = self._noise(micro, step, chosen)
        policy = pair_errors(predict, micro, sigma, noise)
        reference = self._reference_errors(micro, sigma, noise, chosen)
        gain = policy - reference  # (2, b), below 0 is better than the reference
        inside = -0.5 * self.config.beta * (gain[0] - gain[1])
        losses = -logsigmoid(inside)
        weights = micro.weights
        total = (weights * (losses + self.config.sft_weight * policy[0])).sum()
        with torch.no_grad():
            found = {
                "preference_loss": losses,
                "implicit_accuracy": (inside > 0).float(),
                "margin": gain[1] - gain[0],
                "winner_error": policy[0],
                "loser_error": policy[1],
                "winner_reference_error": reference[0],
                "loser_reference_error": reference[1],
            }
            metrics = {name: (weights * values.detach()).sum() for name, values in found.items()}
        per_sample = {"sigma": sigma, "winner_error": policy[0].detach(), "loser_error": policy[1].detach()}
        per_sample |= {"winner_reference_error": reference[0], "loser_reference_error": reference[1]}
        return LossOutput(loss=total, metrics=metrics, per_sample=per_sample)

    def notice(self, values: Mapping[str, float]) -> str:
        """A warning when the winner's error stays above the reference's, averaged over logged steps."""
        winner, reference = (values.get(f"train/{name}", 0.0) for name in ("winner_error", "winner_reference_error"))
        if not (winner > 0 and reference > 0):  # a skipped step has none, or NaN
            return ""
        self._logged += 1
        share = 1 / min(self._logged, _AVERAGED)
        self._rise += share * (winner / reference - 1 - self._rise)
        enough, quiet = self._logged >= _AVERAGED // 2, self._logged - self._warned < _QUIET
        if not enough or quiet or self._rise <= self.config.winner_tolerance:
            return ""
        self._warned = self._logged
        return (
            f"the winner's error is {self._rise:.1%} above the reference's (objective.winner_tolerance="
            f"{self.config.winner_tolerance:g}): good pictures are unlearnt with the bad ones. Stop earlier, lower "
            "optim.lr, or raise objective.sft_weight"
        )

    def _chosen_draws(self, micro: MicroBatch, step: int) -> list[int] | None:
        """Which of its K draws each pair takes at this step; None where every visit draws anew."""
        num = self.config.draws
        if num is None:
            return None
        slots = micro.slots.tolist()
        return [int(torch.randint(num, (), generator=slot_generator(self.seed, "pair_draw", step, s))) for s in slots]

    def _noise(self, micro: MicroBatch, step: int, chosen: Sequence[int] | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(b,) and (b,16,h,w): what both pictures of each pair share."""
        shape, device = micro.latents.shape[1:], micro.latents.device
        if chosen is not None:
            assert micro.numbers is not None
            numbers, tokens = micro.numbers.tolist(), micro.bucket.image_tokens
            sigma, noise = pair_draws(self.config, self.seed, numbers, chosen, shape, tokens)
            return sigma.to(device), noise.to(device)
        slots, config = micro.slots.tolist(), self.config
        sigma = draw_sigma(
            self.seed,
            step,
            slots,
            density=config.sigma_density,
            mean=config.sigma_mean,
            std=config.sigma_std,
            mode_scale=config.sigma_mode_scale,
            mu=shift_mu(config, micro.bucket.image_tokens),
            strata=micro.num_slots if config.sigma_stratified else 0,
        )
        return sigma.to(device), draw_noise(self.seed, step, slots, shape).to(device)

    def _reference_errors(
        self, micro: MicroBatch, sigma: torch.Tensor, noise: torch.Tensor, chosen: Sequence[int] | None
    ) -> torch.Tensor:
        """(2, b) without a graph."""
        if self._reference is not None:
            with torch.no_grad():
                return pair_errors(self._reference, micro, sigma, noise)
        if micro.reference is None or chosen is None:
            raise ValueError("objective.reference=precomputed was given pairs without the reference's errors")
        return micro.reference[torch.arange(len(chosen)), torch.tensor(chosen)].T


def pair_errors(predict: Predict, micro: MicroBatch, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """(2, b) fp32 errors of the chosen and the rejected pictures at one sigma (b,) and noise (b,16,h,w) for both."""
    if micro.rejected is None:
        raise ValueError("pairs were given without their rejected pictures")
    mask = micro.text_mask
    both = replace(
        micro,
        latents=torch.cat([micro.latents, micro.rejected]),
        text=torch.cat([micro.text, micro.text]),
        text_mask=None if mask is None else torch.cat([mask, mask]),
    )
    errors = squared_errors(predict, both, torch.cat([sigma, sigma]), torch.cat([noise, noise]))
    return errors.view(2, -1)


def pair_draws(
    config: DpoConfig,
    seed: int,
    numbers: Sequence[int],
    chosen: Sequence[int],
    shape: Sequence[int],
    image_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sigma (b,) and noise (b, *shape) on the CPU of draw `chosen[i]` of pair number `numbers[i]`.

    The same whenever the pair comes, whatever batch it comes in. The sigmas of a pair's K draws lie in K equal parts of
    the density.
    """
    num = config.draws
    assert num is not None
    uniforms = [
        float(torch.rand((), generator=slot_generator(seed, "pair_sigma", draw, number), dtype=torch.float64))
        for number, draw in zip(numbers, chosen, strict=True)
    ]
    sigma = sigma_at_quantiles(
        [(draw + uniform) / num for draw, uniform in zip(chosen, uniforms, strict=True)],
        density=config.sigma_density,
        mean=config.sigma_mean,
        std=config.sigma_std,
        mode_scale=config.sigma_mode_scale,
        mu=shift_mu(config, image_tokens),
    )
    noise = [
        torch.randn(tuple(shape), generator=slot_generator(seed, "pair_noise", draw, number))
        for number, draw in zip(numbers, chosen, strict=True)
    ]
    return sigma, torch.stack(noise)
