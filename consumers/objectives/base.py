"""What an objective is: one file with a loss over micro-batches.

Place in the flow: the trainer calls `loss` for each micro-batch and knows nothing else. An objective declares which
samples it reads and how many forwards it makes per micro-batch, equal on all ranks, because under ZeRO-3 a forward is
collective: a useless sample is multiplied by zero, never dropped. Objectives know neither trainer, stream nor
checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from consumers.batch import MicroBatch
from qwenimg_dist.schema import Kind


class Predict(Protocol):
    """The trained model: velocity (b,16,h,w) fp32 of noisy latents (b,16,h,w) and sigma (b,), given an edit's
    conditions."""

    def __call__(
        self,
        noisy: torch.Tensor,
        sigma: torch.Tensor,
        text: torch.Tensor,
        text_mask: torch.Tensor | None,
        conditions: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """Sums over the micro-batch, weighted: the trainer divides by the global batch's real samples."""

    loss: torch.Tensor
    """fp32 scalar with a graph."""
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)
    """fp32 scalars without a graph; logged as `train/NAME`."""
    per_sample: dict[str, torch.Tensor] = field(default_factory=dict)
    """(b, ...) without a graph, on the device: what led to the loss of each sample. Read only when it is not finite."""


class Objective(Protocol):
    """See the module's docstring."""

    sample_kind: Kind
    """Kind of samples in the data set."""
    forwards_per_batch: int
    """Forwards of the trained model per micro-batch, with their backward, over all updates of a step."""
    updates_per_step: int
    """Optimiser updates per step, each over all of its micro-batches."""

    def __init__(self, config: Any, *, seed: int, reference: Predict | None = None) -> None:
        """`config` is the objective's own part; `reference` the frozen model that the run starts from, where asked."""

    def loss(self, predict: Predict, micro: MicroBatch, *, step: int) -> LossOutput:
        """Loss of one micro-batch at global step `step`. Randomness only from (seed, step, slot)."""
        ...

    def notice(self, values: Mapping[str, float]) -> str:
        """What a person should be warned of in the logged `train/...` means; empty if nothing. Rank 0's alone."""
        ...
