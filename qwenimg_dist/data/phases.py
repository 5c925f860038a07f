"""Phases with their steps, and which resolution each step of a phase has. Pure functions.

Place in the flow: `consumers/curriculum.py` plans the phases from the config, the ledger walks them. Nothing here is
drawn at random: proportions are exact, and any step is found without looking at earlier ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from qwenimg_dist.schema import Bucket


@dataclass(frozen=True, kw_only=True)
class PlannedPhase:
    """One stretch of the curriculum with its steps, [first_step, last_step)."""

    index: int
    first_step: int
    last_step: int
    weights: Mapping[int, float]
    """Resolution class (px) -> weight of its draws."""
    global_batch: int
    micro_batch_tokens: int
    lr_scale: float
    where: str | None
    mix: Mapping[str, float] | None = None
    """Data set -> its weight or repeats in this phase, where it differs from `data.mix`."""
    name: str = ""
    lr: float | None = None
    """In the place of the run's; None takes that."""
    warmup_steps: int = 0
    activation_checkpointing: bool = False
    row_weights: Mapping[str, float] = field(default_factory=dict)
    """`where` expression -> how often its rows come per epoch; joins the run's own."""
    drawn: Mapping[int, tuple[Bucket, ...]] = field(default_factory=dict)
    """Resolution class -> shapes of the pictures that the run draws itself, which its batches have in turn, whatever
    their prompts; a class that is not here has the shapes of its latents."""

    @property
    def num_steps(self) -> int:
        return self.last_step - self.first_step

    def __str__(self) -> str:
        """What messages call it."""
        return f"phase {self.index}" + f" ({self.name})" * bool(self.name)

    @property
    def steps_by_resolution(self) -> dict[int, int]:
        """Resolution class -> how many of the phase's steps have it."""
        return steps_by_resolution(self.weights, self.num_steps)


def phase_at(phases: Sequence[PlannedPhase], step: int) -> PlannedPhase:
    """The phase with first_step <= step < last_step. Raises ValueError outside the plan."""
    for phase in phases:
        if phase.first_step <= step < phase.last_step:
            return phase
    raise ValueError(f"step {step} lies outside the plan of {phases[-1].last_step} steps")


def quota(weights: Mapping[int, float], step: int) -> tuple[int, int]:
    """(resolution, how many earlier steps had it) of the `step`-th step of a phase.

    Splits the steps between the smallest resolution and the rest in exact proportion (step t goes to the rest when
    floor((t + 1) p) > floor(t p)), then the rest in the same way: O(number of resolutions), no state. Weights count
    as the decimal fractions they are written as.
    """
    items = [(resolution, Fraction(str(weights[resolution]))) for resolution in sorted(weights)]
    left = sum((weight for _, weight in items), Fraction(0))
    position = step
    for resolution, weight in items[:-1]:
        rest = left - weight
        before, after = int(position * rest / left), int((position + 1) * rest / left)
        if before == after:
            return resolution, position - before
        position, left = before, rest
    return items[-1][0], position


def steps_by_resolution(weights: Mapping[int, float], num_steps: int) -> dict[int, int]:
    """Resolution -> how many of a phase's first `num_steps` steps have it; what `quota` counts, all at once."""
    left, steps = sum((Fraction(str(weight)) for weight in weights.values()), Fraction(0)), num_steps
    found = {}
    for resolution in sorted(weights):
        rest = left - Fraction(str(weights[resolution]))
        to_the_rest = int(steps * rest / left)
        found[resolution] = steps - to_the_rest
        steps, left = to_the_rest, rest
    return found
