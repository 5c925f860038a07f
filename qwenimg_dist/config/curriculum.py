"""What is trained when, and how noise is mixed in: the phases of the curriculum, and flow matching."""

from __future__ import annotations

import math
from typing import Any, Final, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from qwenimg_dist.config.data import Amount, RowWeights
from qwenimg_dist.config.section import Section


class Phase(Section):
    """One stretch of the curriculum.

    Beside what stands here nothing can change between phases: precision, gathering and the optimiser's state are built
    once. Its length is a `share`, `steps` or `images`, in the same unit for all phases.
    """

    name: str = ""
    """What messages and reports call it; the key it stands under."""
    resolutions: dict[PositiveInt, PositiveFloat] = Field(min_length=1)
    """Resolution class -> weight of its draws; exact in proportion, one class per step."""
    share: PositiveFloat | None = None
    """Share of `train.steps`, in proportion to the other phases' shares."""
    steps: PositiveInt | None = None
    """Optimiser steps; all phases' together are `train.steps`, which may be null then."""
    images: PositiveInt | None = None
    """Pictures to draw, repeats counted: `images / global_batch` steps, rounded up. Slots that only fill a bucket's
    last batch count as drawn, so that the length depends on the config alone; the printed plan says how many there are.
    All phases' steps together are `train.steps`, which may be null then."""
    global_batch: PositiveInt
    """Samples per optimiser step, over all ranks. Larger is steadier and needs fewer updates per epoch; small buckets
    then have more fill slots."""
    micro_batch_tokens: PositiveInt
    """Token budget (image and text) of one forward pass on one rank; at least one sample is always taken. More is
    faster until memory is full; it changes rounding only."""
    lr_scale: PositiveFloat = 1.0
    """Multiplies the learning rate in this phase."""
    lr: PositiveFloat | None = None
    """Learning rate of this phase in the place of `optim.lr`; `optim.schedule` works on it as on that. Not with an
    `lr_scale`."""
    warmup_steps: NonNegativeInt = 0
    """First steps of the phase in which its rate rises linearly from near 0. Worth it where the resolution changes:
    AdamW's moments are of the old one then. The start of the run has `optim.warmup_steps`."""
    activation_checkpointing: bool | None = None
    """`engine.activation_checkpointing` of this phase: a step costs 4/3 with it, activations a small part. Low
    resolutions rarely need it. `None` takes the engine's. May be changed on resume."""
    where: str | None = None
    """Narrows `data.where` in this phase, for example `text_level <= 1`."""
    weights: RowWeights = Field(default_factory=dict)
    """Joins `data.weights` in this phase; an expression that stands in both counts as here. 0 keeps its rows out."""
    mix: dict[str, Amount] | None = None
    """Data set of `data.mix` -> its weight (or repeats) in this phase, where it differs; 0 leaves it out."""

    @model_validator(mode="after")
    def _one_rate(self) -> Phase:
        if self.lr is not None and self.lr_scale != 1.0:
            raise ValueError(
                f"give a phase `lr` or `lr_scale`, not both: with `lr` set `lr_scale` to 1 (it is {self.lr_scale:g})"
            )
        return self

    @property
    def own_steps(self) -> int | None:
        """Steps that the phase itself says; None where it has a share."""
        return self.steps if self.images is None else -(-self.images // self.global_batch)


class CurriculumConfig(Section):
    """Phases in order. YAML may name them (`curriculum.phases.low.steps=100` then overrides one), or list them."""

    phases: tuple[Phase, ...] = Field(min_length=1)

    @field_validator("phases", mode="before")
    @classmethod
    def _named_phases(cls, phases: Any) -> Any:
        if isinstance(phases, dict):
            return [{**phase, "name": str(name)} for name, phase in phases.items() if phase is not None]
        return phases

    @model_validator(mode="after")
    def _one_unit_of_length(self) -> CurriculumConfig:
        units = [[unit for unit in LENGTHS if getattr(phase, unit) is not None] for phase in self.phases]
        if any(len(given) != 1 for given in units) or len({given[0] for given in units}) > 1:
            there = "; ".join(
                f"{phase.name or number} has {' and '.join(given) or 'none'}"
                for number, (phase, given) in enumerate(zip(self.phases, units, strict=True))
            )
            raise ValueError(f"give every phase a `share`, or every phase `steps`, or every phase `images` ({there})")
        if self.phases[0].warmup_steps:
            raise ValueError("the first phase is warmed up by `optim.warmup_steps`: set its own `warmup_steps` to 0")
        return self

    @property
    def own_steps(self) -> int | None:
        """Steps that the phases come to by themselves; None where they have shares."""
        steps = [phase.own_steps for phase in self.phases]
        return None if None in steps else sum(number for number in steps if number is not None)


LENGTHS: Final = ("share", "steps", "images")
"""The units that a phase's length may be given in."""


class FlowConfig(Section):
    """Errors of the velocity = noise - x0 (sigma = 1 is noise): what the objectives share, and validation takes."""

    sigma_density: Literal["logit_normal", "uniform", "mode"] = "logit_normal"
    """How often each sigma is trained, before the shift. `logit_normal`: most in the middle, hardly at the ends, as the
    report trained; `uniform`: every sigma alike, which spends steps where little is to be learnt; `mode`: SD3's, in the
    middle more often and yet not rarely at the ends. Costs nothing."""
    sigma_mean: float = 0.0
    """Of the normal under the sigmoid of `logit_normal`; above 0 trains noisier sigmas."""
    sigma_std: PositiveFloat = 1.0
    """Of the normal under the sigmoid of `logit_normal`; smaller trains the ends less."""
    sigma_mode_scale: float = Field(default=1.29, ge=-1, le=2 / (math.pi - 2))
    """s of `sigma_density=mode`: 0 is uniform, above 0 the middle comes more often (1.29: SD3's best), below 0 the ends
    do."""
    sigma_stratified: bool = False
    """The slots of each global batch share the density's quantiles evenly, one in each part, dealt anew every step: the
    loss scatters less from step to step, most with small batches. Each single draw keeps its density; costs nothing."""
    shift: Literal["resolution", "constant", "none"] = "resolution"
    """Moves sigmas towards noise, of which larger pictures need more to lose their structure. `resolution` is the
    scheduler's own exponential shift by image tokens, which sampling uses too; `none` trains large pictures at sigmas
    that sampling hardly visits."""
    shift_constant: PositiveFloat = 2.2
    """e^mu, used with `shift=constant`."""
    weighting: Literal["none", "bell"] = "none"
    """Weight of a sample's loss by its shifted sigma. `bell`: exp(-2 (sigma - 1/2)^2) - exp(-1/2), divided by its mean
    over the sampled density, so that the mean weight is 1 and `optim.lr` keeps its meaning: 0 at both ends, as common
    trainers weigh uniform sigmas. On top of `logit_normal` it hardly trains the ends. `train/loss` is then weighted;
    `train/loss_unweighted` stands beside it."""
    posterior: Literal["mode", "sample"] = "mode"
    """Latents are the VAE posterior's mode, or a new sample of it each time. `sample` is what the VAE was trained to
    decode and a slight augmentation; it needs a data set made with `encode.posterior=mean_logvar`, whose latents are
    twice the size, and reads twice the bytes. Validation uses the mode."""
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of captions replaced by the empty prompt; decided in the ledger."""


class FlowMatchingConfig(FlowConfig):
    """Flow matching: pretraining and finetuning."""

    kind: Literal["flow_matching"]
    """Which objective this is."""
