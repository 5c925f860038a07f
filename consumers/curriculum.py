"""The curriculum: phases, and the learning rate of every step. Pure functions of the config and the step.

Place in the flow: the trainer asks for the phase and the learning rate, the ledger walks the same phases. Nothing here
depends on what happened earlier in the run, so a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from qwenimg_dist.config import Config, GrpoConfig, OptimConfig
from qwenimg_dist.data.buckets import buckets
from qwenimg_dist.data.phases import PlannedPhase, phase_at
from qwenimg_dist.schema import Bucket


def plan(config: Config) -> tuple[PlannedPhase, ...]:
    """Phases with [first_step, last_step), which add up to `train.steps`.

    Shares are cut at the rounded cumulative share, so rounding never adds up; a phase may be left without steps in a
    very short run. Raises ValueError if phases given in `steps` or `images` do not add up to `train.steps`.
    """
    phases, own_steps = config.curriculum.phases, config.curriculum.own_steps
    if own_steps is not None:
        if own_steps != config.train.steps:
            unit = "steps" if phases[0].images is None else "images"
            raise ValueError(
                f"the curriculum's phases have {own_steps} steps, train.steps={config.train.steps}: set "
                f"train.steps={own_steps}, or null to follow them, or give phases a `share` instead of `{unit}`"
            )
        parts = [Fraction(phase.own_steps or 0) for phase in phases]
    else:
        parts = [Fraction(str(phase.share)) for phase in phases]
    total = sum(parts, Fraction(0))
    ends = [round_half_up(sum(parts[: i + 1], Fraction(0)) * config.train.steps / total) for i in range(len(parts))]
    return tuple(
        PlannedPhase(
            index=index,
            first_step=ends[index - 1] if index else 0,
            last_step=ends[index],
            weights=dict(phase.resolutions),
            global_batch=phase.global_batch,
            micro_batch_tokens=phase.micro_batch_tokens,
            lr_scale=phase.lr_scale,
            where=phase.where,
            name=phase.name,
            lr=phase.lr,
            warmup_steps=phase.warmup_steps,
            activation_checkpointing=(
                config.engine.activation_checkpointing
                if phase.activation_checkpointing is None
                else phase.activation_checkpointing
            ),
            row_weights=phase.weights,
            mix=phase.mix or None,
            drawn=_drawn(config, sorted(phase.resolutions)),
        )
        for index, phase in enumerate(phases)
    )


def _drawn(config: Config, resolutions: Sequence[int]) -> dict[int, tuple[Bucket, ...]]:
    """Shapes of each class's pictures, where the run draws them itself."""
    if not isinstance(config.objective, GrpoConfig):
        return {}
    return {r: buckets(r, config.objective.aspects, "objective.aspects") for r in resolutions}


def lr_at(phases: tuple[PlannedPhase, ...], optim: OptimConfig, step: int) -> float:
    """Learning rate of a step: linear warm-up to `lr` over `warmup_steps`; then constant, with a linear way down to
    `min_lr_ratio * lr` in the last `cooldown_steps`, or half a cosine down to it. The phase may have an `lr` of its
    own or an `lr_scale`, and a linear warm-up over its first steps."""
    phase = phase_at(phases, step)
    total = phases[-1].last_step
    if step < optim.warmup_steps:
        factor = (step + 1) / optim.warmup_steps
    elif optim.schedule == "constant":
        cooled = max(0, step + 1 - (total - optim.cooldown_steps))
        factor = 1.0 - (1.0 - optim.min_lr_ratio) * cooled / max(1, optim.cooldown_steps)
    else:
        done = (step - optim.warmup_steps) / max(1, total - 1 - optim.warmup_steps)
        factor = optim.min_lr_ratio + (1 - optim.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))
    if phase.warmup_steps:
        factor *= min(1.0, (step + 1 - phase.first_step) / phase.warmup_steps)
    return (optim.lr if phase.lr is None else phase.lr) * factor * phase.lr_scale


def round_half_up(value: Fraction) -> int:
    """Nearest integer, halves up (Python's `round` goes to even)."""
    return math.floor(value + Fraction(1, 2))
