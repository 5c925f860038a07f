"""Group-relative policy optimisation of flows: steps that led to better pictures than their group's become likelier.

Place in the flow: `rollout.py` draws G pictures of each prompt and has them judged; the trainer calls `loss` for each
micro-batch and each stochastic step of it. With the step's log-probability under the model now and under the policy
that drew it, both means over the elements, and the picture's advantage A in its group:

    ratio = exp(log p - log p_old),    loss = max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps))    [+ kl_weight KL]

averaged over the window's steps. At a round's first update the ratio is 1, since rollouts make the very forwards that
training repeats: same rows, same texts, same kernels. With guidance both forwards of a step go through one, side by
side: under ZeRO-3 two would gather all weights twice, and DeepSpeed reduces a block's gradients once per backward.
Reference: Flow-GRPO, arXiv 2505.05470, Eq. 3 to 5. Deliberately left out: a learnt critic, and dropping groups without
a spread, since the ranks must make equally many forwards: their advantage is 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from consumers.batch import MicroBatch
from consumers.objectives.base import LossOutput, Predict
from qwenimg_dist.config import GrpoConfig
from qwenimg_dist.flow.samplers import true_guidance
from qwenimg_dist.flow.sde import kl, log_prob, transition
from qwenimg_dist.models.transformer import pack_latents, unpack_latents
from qwenimg_dist.schema import PROMPT, Kind

Rewards = npt.NDArray[np.float64]
_NO_SPREAD: Final = 1e-6
_EPSILON: Final = 1e-4
"""In the denominator, as Flow-GRPO has it: nearly equal rewards are not blown up."""


class Grpo:
    """See the module's docstring."""

    sample_kind: Kind = PROMPT

    def __init__(self, config: GrpoConfig, *, seed: int, reference: Predict | None = None) -> None:
        """The `reference` is asked by the rollouts, once for all updates."""
        self.config = config
        self.seed = seed
        self.updates_per_step = config.inner_updates
        self.forwards_per_batch = config.window * config.inner_updates

    def loss(self, predict: Predict, micro: MicroBatch, *, step: int) -> LossOutput:
        one, config = micro.rollout, self.config
        if one is None:
            raise ValueError("GRPO was given prompts without a rollout")
        sigma = one.x.new_full((len(one.x),), one.sigma)
        velocity = guided_velocity(predict, micro, one.x, sigma, config.guidance)
        mean, std = transition(one.x, velocity, one.sigma, one.sigma_next, level=config.noise_level)
        change = log_prob(one.x_next, mean, std) - one.log_prob
        ratio, gain = change.exp(), one.advantages
        losses = torch.maximum(-gain * ratio, -gain * ratio.clamp(1 - config.clip, 1 + config.clip))
        weights = micro.weights / config.window
        found = {
            "ratio": ratio,
            "ratio_error": (ratio - 1).abs(),
            "clip_fraction": ((ratio - 1).abs() > config.clip).float(),
            "policy_loss": losses,
        }
        if one.reference_mean is not None:
            found["kl"] = kl(mean, one.reference_mean, std)
            losses = losses + config.kl_weight * found["kl"]
        with torch.no_grad():
            metrics = {name: (weights * values.detach()).sum() for name, values in found.items()}
        per_sample = {"sigma": sigma, "ratio": ratio.detach(), "advantage": gain, "log_prob": one.log_prob}
        return LossOutput(loss=(weights * losses).sum(), metrics=metrics, per_sample=per_sample)

    def notice(self, values: Mapping[str, float]) -> str:
        """A warning where training does not repeat what the rollouts computed, so that clipping would act on noise."""
        first = "train/ratio_error" + ("_of_first_update" if self.updates_per_step > 1 else "")
        if values.get(first, 0.0) <= self.config.clip:
            return ""
        return (
            f"the first ratio is off 1 by {values[first]:.2g} on average, more than objective.clip="
            f"{self.config.clip:g}: rollouts and training round differently. Try engine.compile=false, or raise it"
        )


def guided_velocity(
    predict: Predict, micro: MicroBatch, x: torch.Tensor, sigma: torch.Tensor, guidance: float
) -> torch.Tensor:
    """(b,16,h,w) fp32 at `x` and `sigma` (b,): the model's, or guided against `micro.negative` in one forward of 2b
    rows."""
    if micro.negative is None:
        return predict(x, sigma, micro.text, micro.text_mask)
    text, mask = _both_texts(micro, micro.negative)
    height, width = x.shape[2:]
    both = predict(torch.cat([x, x]), torch.cat([sigma, sigma]), text, mask)
    positive, negative = pack_latents(both).chunk(2)
    return unpack_latents(true_guidance(positive, negative, guidance), height, width)


def _both_texts(micro: MicroBatch, negative: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(2b, T, D) prompts and below them the empty one, and their mask; None if all are equally long."""
    (rows, longest, width), tokens = micro.text.shape, len(negative)
    most = max(longest, tokens)
    text = micro.text.new_zeros((2 * rows, most, width))
    text[:rows, :longest] = micro.text
    text[rows:, :tokens] = negative
    if micro.text_mask is None and longest == tokens:
        return text, None
    mask = torch.zeros((2 * rows, most), dtype=torch.bool, device=text.device)
    mask[:rows, :longest] = True if micro.text_mask is None else micro.text_mask
    mask[rows:, :tokens] = True
    return text, mask


@dataclass(frozen=True, kw_only=True)
class Groups:
    """What the rewards of a round say of its pictures."""

    advantages: Rewards
    """(N,) 0 where there is no reward, or nothing to tell the group's pictures apart by."""
    useful: npt.NDArray[np.bool_]
    """(groups,) whether it has at least two rewards, and these differ."""
    spread: Rewards
    """(groups,) standard deviation of its rewards; 0 where there are none."""


def group_advantages(rewards: Rewards, *, group_size: int, bound: float) -> Groups:
    """Advantages of N pictures, G of each prompt in a row; NaN is a picture without a reward (failed, or none at all).

    Mean and population standard deviation are of the group's rewards that there are: one NaN does not spread.
    """
    grouped = rewards.reshape(-1, group_size)
    there = np.isfinite(grouped)
    counts = there.sum(axis=1)
    known = np.where(there, grouped, 0.0)
    mean = known.sum(axis=1) / np.maximum(counts, 1)
    off = np.where(there, grouped - mean[:, None], 0.0)
    spread = np.sqrt((off**2).sum(axis=1) / np.maximum(counts, 1))
    useful = (counts >= 2) & (spread > _NO_SPREAD)
    advantages = np.clip(off / (spread + _EPSILON)[:, None], -bound, bound) * useful[:, None]
    return Groups(advantages=advantages.ravel(), useful=useful, spread=spread)
