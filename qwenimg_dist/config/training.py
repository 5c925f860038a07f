"""How a training run goes: optimiser, engine, checkpoints, evaluation (`curriculum.py` has what it trains on).

Options of other trainers that are left out on purpose are named with a reason where people would look for them.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from qwenimg_dist.config.section import Section

_WATCHDOG_FIRST_S: Final = 300.0


def _expression(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression ({error})") from error
    return pattern


Pattern = Annotated[str, AfterValidator(_expression)]


class ParameterGroupConfig(Section):
    """Parameters with a learning rate and weight decay of their own."""

    pattern: Pattern
    """Regular expression, searched in the parameters' names."""
    lr_scale: PositiveFloat = 1.0
    """The learning rate of every step, times this. To train a group not at all, freeze it."""
    weight_decay: NonNegativeFloat | None = None
    """Of the group's matrices, in place of `optim.weight_decay`; norms and biases never decay."""


class OptimConfig(Section):
    """AdamW with fp32 masters, by torch's fused kernel.

    Left out: Adafactor and 8-bit states. The states of full finetuning are divided over the ranks already (5.7 GB per
    GPU on 64 with AdamW in fp32) and both change what is learnt; for few GPUs there are `freeze` and
    `engine.offload_optimizer`.
    """

    lr: PositiveFloat
    """Highest learning rate, where no phase or group says otherwise. Higher learns faster and forgets more of the
    starting model; `evaluate.guard` watches that."""
    betas: tuple[float, float] = (0.9, 0.95)
    """How long AdamW remembers gradients and their squares: some 10 and 20 steps by these."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment; larger damps parameters with tiny gradients."""
    weight_decay: NonNegativeFloat = 0.01
    """Of matrices, times the learning rate; norms and biases never decay."""
    warmup_steps: NonNegativeInt = 0
    """First steps of the run, in which the rate rises linearly while the moments fill."""
    schedule: Literal["constant", "cosine"] = "constant"
    """How the rate goes on after the warm-up: `constant` can end in `cooldown_steps`, `cosine` falls to `min_lr_ratio`
    over the whole run."""
    cooldown_steps: NonNegativeInt = 0
    """Last steps of a run with `schedule=constant` in which the rate falls linearly to `min_lr_ratio`."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Share of the highest rate that a cosine or cool-down ends at."""
    train: tuple[Pattern, ...] = ()
    """Regular expressions, searched in the parameters' names: what none of them finds is frozen; empty trains all. A
    frozen parameter saves 16 of its 18 bytes over all ranks (bf16; with EMA 20 of 22), and the time of its gradient and
    its reduction; what is trained then has less to move with."""
    freeze: tuple[Pattern, ...] = ()
    """What these find is frozen, even where `train` finds it too."""
    groups: dict[str, ParameterGroupConfig] = Field(default_factory=dict)
    """Name -> pattern, `lr_scale` and `weight_decay`. The first group in the order written that finds a parameter takes
    it; what none finds has `optim.lr` and `optim.weight_decay`. Sizes are printed at the start, and names stand in
    `parameter_groups.json` of the run. Clipping is over all groups together."""
    clip_grad_norm: NonNegativeFloat = 1.0
    """0 turns clipping off."""
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    """0 turns the EMA off."""

    @field_validator("groups", mode="before")
    @classmethod
    def _no_groups(cls, groups: Any) -> Any:
        return {} if groups is None else groups

    @model_validator(mode="after")
    def _one_way_down(self) -> OptimConfig:
        if self.schedule == "cosine" and self.cooldown_steps:
            raise ValueError("`cooldown_steps` belongs to `schedule=constant`: a cosine comes down by itself")
        return self


ZeroSize = Literal[
    "reduce_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "sub_group_size",
]


class EngineConfig(Section):
    """ZeRO-3 by DeepSpeed, its sizes derived from the model.

    Left out: MiCS, which shards states over few ranks only and so takes the memory that full finetuning lacks (hpZ is
    the part of it that spares traffic); FP8, whose scaling needs other layers than the stock model's; offload of
    parameters and to NVMe, since 20 B parameters fit into the GPUs' or the host's memory.
    """

    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of the gathered weights and the forward pass; masters, reduce-scatter and loss are always fp32."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: 6 KB instead of 170 KB per token and block of the 20 B model are kept,
    a step costs up to 4/3. Of every phase that does not say otherwise; may be changed on resume."""
    gather: Literal["block", "layer"] = "block"
    """What forward and backward gather at once: `block` is faster, `layer` needs the least memory. With activation
    checkpointing `layer` gathers the weights a third time, for the recomputation, a quarter more bytes per step; a
    `block` that is gathered for it stays for its backward."""
    compile: bool = False
    """Compile the transformer block, which all blocks share, by `torch.compile`; needs `gather=block` and a C++ or
    Triton compiler on every node. Costs a minute or more before the first step and at shapes of a new kind."""
    attention: Literal["native", "flash", "cudnn", "efficient", "math"] = "native"
    """Which kernel of PyTorch computes the attention: `native` lets PyTorch choose by what the inputs allow; `flash`
    cannot take a text mask, so batches with unequal captions go by `native`; `math` is slow, for comparisons."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """`cpu` keeps masters, moments, gradients and EMA in host memory: 16 of 18 bytes per parameter (20 of 22 with EMA)
    leave the GPUs. It costs time: gradients cross PCIe at every micro-batch, weights at every step, and torch's fused
    AdamW updates on the rank's cores (give it some: `cluster.cpus_per_rank`). Nothing is compiled for it, which
    DeepSpeed's own CPU Adam would need. With `cluster.device=cpu` all is in host memory anyway."""
    hpz_partition: PositiveInt = 1
    """ZeRO++'s hpZ: each group of so many ranks (the GPUs of a node) holds a second partition of the weights, so that
    after the first forward pass of a step all gathering stays within the node. Spares the network between nodes a
    quarter of a micro-batch's bytes, of a step's further micro-batches half; costs 2 x parameters / hpz_partition bytes
    per GPU in bf16 (20 B over 8: 5.1 GB). Must divide the ranks; 1 is off."""
    zero: dict[ZeroSize, PositiveInt] = Field(default_factory=dict)
    """DeepSpeed's sizes in elements, in place of those derived from the model: larger buckets are fewer collectives,
    smaller ones less memory."""
    max_skipped_steps: NonNegativeInt = 3
    """Consecutive steps with a non-finite loss or gradient after which the run stops."""

    @field_validator("zero", mode="before")
    @classmethod
    def _no_sizes(cls, sizes: Any) -> Any:
        return {} if sizes is None else sizes

    @model_validator(mode="after")
    def _compiled_whole(self) -> EngineConfig:
        if self.compile and self.gather != "block":
            raise ValueError("`compile=true` needs `gather=block`: a block that is gathered by layers has breaks in it")
        return self


class CheckpointConfig(Section):
    every: PositiveInt = 500
    """Steps between checkpoints: what a fault can cost at most (with `background`, those since it was written too).
    Training waits while one is written, unless `background` is on."""
    background: bool = False
    """Write checkpoints while training goes on: it waits for a copy into host memory only, and a checkpoint exists a
    little later. A save under way is waited for before the next one, and when the run ends or is told to stop. Costs
    another copy of a rank's part in host memory for the whole run (16 bytes per parameter over all ranks, 12 without
    EMA: 5 GB per rank of 64 for 20 B), and disk and a core per rank while it writes."""
    keep: PositiveInt = 3
    """Newest checkpoints kept; older ones are removed after a new one is committed. Each takes 16 bytes per parameter
    on disk (12 without EMA), and while one is written there is one more than this."""
    keep_every: NonNegativeInt = 0
    """Checkpoints of steps that are multiples of this stay for good, whatever `keep` says; 0 keeps none so. The disk
    they fill is never given back by the run."""
    remote: str | None = None
    """`s3://BUCKET/FOLDER` that gets a copy of each checkpoint and of the run's small files, by which the same command
    goes on with an empty `run.path` on any machine. The run directory itself stays on a disk. Costs the upload of a
    checkpoint over all ranks, which training waits for; one that fails, or takes more than half of
    `train.stall_timeout_s`, is a warning. `keep` holds there too. `None` keeps no copy."""
    certify: Literal["start", "save", "off"] = "start"
    """When the run's call of the transformer is compared with stock diffusers' on the same weights: at each start, also
    before each `save`, or never. The result stands in every checkpoint's certificate; a difference beyond rounding
    stops the run (in bf16 see `certify_strict`). Costs seven forwards of 60 image tokens: at 20 B mostly seven gathers
    of the weights."""
    certify_strict: bool = False
    """In bf16, stop also at a difference that rounding may explain but that is more than 5 % of the largest velocity:
    padded texts against unpadded ones, the engine against a stock module. `False` warns with the figure, since what
    bf16 rounds to over 60 blocks was not measured with the 20 B weights. Differences of the same inputs in the same
    engine, and all in fp32, stop the run in any case. Costs nothing."""
    certify_independent: NonNegativeInt = 200_000_000
    """Models of at most so many parameters are also compared with a stock module loaded for it, which rank 0 holds for
    a moment (4 bytes per parameter in fp32); larger ones only with the stock pipeline's call of the run's engine."""


class TrainConfig(Section):
    steps: PositiveInt
    """Optimiser steps of the run, fixed for its whole life. `null` takes what the curriculum's phases come to, if they
    have `steps` or `images`; a number must agree with them, and is needed where they have shares."""
    seed: NonNegativeInt = 0
    """Of the order of samples, caption draws, noise and sigmas."""
    stop_after: PositiveInt | None = None
    """End (saved, exit 0) after this step without changing the schedule."""
    log_samples: bool = False
    """Write `samples.jsonl`: step, bucket and the keys of the global batch in order."""
    log_every: PositiveInt = 10
    """Steps between lines of `metrics.jsonl`. A logged step waits for its loss, which costs little."""
    report: Literal["checkpoints", "end", "off"] = "checkpoints"
    """When `report.html` is written into the run directory: after checkpoints and at the end, at the end, or only by
    `qwenimg-dist report`. A process of its own on rank 0's node does it in seconds; no step waits."""
    norms_every: NonNegativeInt = 0
    """Steps between norms of gradients and parameters per block (`norms/...`); 0 turns them off. Costs one pass over a
    rank's gradients and masters and one small all-reduce."""
    heartbeat_timeout_s: PositiveFloat = 120
    """A rank whose process gives no sign of life for so long (stopped, frozen, its machine starved) is ended by the
    watchdog beside it, and the gang starts anew. Signs come from a thread every second, whatever the rank works on:
    long loading, compiling, saving or evaluating does not matter here."""
    stall_timeout_s: PositiveFloat = 3600
    """A rank that lives but has not come from one stage or micro-batch to the next for so long is ended likewise. Must
    exceed the longest single stage: loading the weights, compiling, one save, one sample grid. Collectives, of every
    process group, give up five minutes later: a rank waits for another at least as long as that one may take."""
    replay_generations: str | None = None
    """A `generations.jsonl` of another run: its generations are taken over before the first step, so that samples come
    in the same order, which for a run that followed its producers also depends on when units became ready. All their
    units must be there as that run read them. Beyond its last generation the run goes on by itself. Costs nothing."""
    fresh: bool = False
    """Start from step 0 even if the run directory holds checkpoints; they are moved aside."""
    dry_run: bool = False
    """Check the input, print the plan (steps, images, epochs, buckets, fill slots of every phase) and end: no ranks are
    started, nothing is written. Costs one pass over the index."""

    @property
    def collective_timeout_s(self) -> float:
        """After which a rank gives up waiting for another: later than the watchdog, which can say where one stuck."""
        return self.stall_timeout_s + _WATCHDOG_FIRST_S


class EvaluateConfig(Section):
    every: NonNegativeInt = 500
    """Steps between held-out losses; 0 turns them off."""
    data_path: str | None = None
    """A data set of images whose held-out rows (by `data.held_out` and `data.max_held_out`) are validated on in the
    place of the run's own: for runs on prompts, which have no pictures, and for finetuning on little, so that what the
    model knew stays watched. `None` is the run's own; on prompts that is no validation."""
    sigma_quantiles: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Where in the trained density of sigma losses are measured; a forward each. Fixed when a run starts."""
    num_samples: PositiveInt = 64
    """Held-out samples per resolution class, at most `data.max_held_out`. Each costs a forward per quantile and class
    at every evaluation, and stays in the memory of one rank."""
    resolutions: tuple[PositiveInt, ...] | None = None
    """Classes that are evaluated, trained or not. `None` takes all that the data set has latents of, so that forgetting
    at a class that is not trained shows; fewer cost less. Fixed when a run starts, but for leaving some out."""
    weights: Literal["ema", "raw", "both"] = "ema"
    """Which weights losses and grids are of; without an EMA, the raw ones. `both` shows whether the EMA lags or helps
    (raw ones as `eval/raw/...` and `step-...-raw.png`) and costs twice the time."""
    guard: Literal["warn", "stop", "off"] = "warn"
    """What happens when the model has become worse than the one it started from, at any class: a line in the log, or
    the end of the run (saved, exit code 1). Costs nothing beyond the evaluation."""
    guard_tolerance: NonNegativeFloat = 0.02
    """Relative: 0.02 lets a loss be 2 % above the starting model's. A smaller one speaks sooner, and sooner in vain."""
    guard_patience: PositiveInt = 2
    """Evaluations in a row that must be worse before the guard acts."""
    grid_every: NonNegativeInt = 0
    """Steps between sample grids; 0 turns them off."""
    prompts: tuple[str, ...] = ()
    """Of the sample grids; none, and there are no grids but those of `edits`."""
    edits: NonNegativeInt = 8
    """Held-out edits in a grid of their own when edits are trained on: conditions, what is drawn from them, the target.
    Each costs what a prompt costs, and its conditions' tokens besides; each is drawn alone."""
    negative_prompt: str = ""
    """The empty prompt, as dropped captions in training."""
    num_steps: PositiveInt = 20
    """Steps of the sampler per picture, two forwards each."""
    guidance: PositiveFloat = 4.0
    """How far pictures follow the prompt; 1 is not at all beyond the model's own."""
    height: PositiveInt | None = None
    """px; `None` is the square bucket of the phase."""
    width: PositiveInt | None = None
    """px; `None` is the square bucket of the phase, as for the height."""
    seed: NonNegativeInt = 0
    """Of the held-out noise and the grids' first noise."""
