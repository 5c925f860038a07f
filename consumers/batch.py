"""What one rank gets for one optimiser step: tensors, and the facts about the global batch they were cut from.

Place in the flow: `stream.py` makes these from the ledger's `GlobalBatch`; objectives read `MicroBatch`, the trainer
reads `RankBatch`. Holds no logic, so that objectives need neither the stream nor the data set.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwenimg_dist.data.ledger import GlobalBatch
from qwenimg_dist.schema import Bucket


@dataclass(frozen=True, kw_only=True)
class RolloutStep:
    """One stochastic step that the pictures of a micro-batch took, to be trained on (`rollout.py`)."""

    sigma: float
    sigma_next: float
    x: torch.Tensor
    """(b, 16, height / 8, width / 8) fp32 where it began."""
    x_next: torch.Tensor
    """As `x`: where it ended."""
    log_prob: torch.Tensor
    """(b,) fp32 of `x_next`, by the policy that drew it."""
    advantages: torch.Tensor
    """(b,) fp32: how much better the picture was than its group; 0 where that is not known."""
    reference_mean: torch.Tensor | None
    """As `x`: where the reference would have gone on average; None where it is not asked."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One forward pass of one rank: b samples of one bucket, texts padded to the longest of the b."""

    latents: torch.Tensor
    """(b, 16, height / 8, width / 8) normalised posterior mean: as stored while on the host, fp32 after `to`. Of
    prompts, zeros that take no memory."""
    logvar: torch.Tensor | None
    """As `latents`: log-variance of the posterior, where the objective asked for it."""
    text: torch.Tensor
    """(b, T, D) in the compute dtype; zeros where padded."""
    text_mask: torch.Tensor | None
    """(b, T) bool, True = valid; None when every token is valid (a mask turns flash attention off)."""
    weights: torch.Tensor
    """(b,) fp32; 1 = real, 0 = a slot that fills the batch and must not move the model."""
    slots: torch.Tensor
    """(b,) int64 position in the global batch (held-out: in the held-out set); seeds noise and sigma."""
    num_slots: int
    """Slots of the whole global batch (held-out: of the held-out set's bucket)."""
    bucket: Bucket
    rejected: torch.Tensor | None = None
    """As `latents`: the other picture of a preference pair, of which `latents` are the chosen one's."""
    numbers: torch.Tensor | None = None
    """(b,) int64 numbers in the listing, of pairs: what stays the same whenever a pair comes, on the host."""
    reference: torch.Tensor | None = None
    """(b, K, 2) fp32 errors of the reference for chosen and rejected at each of a pair's K draws, where they were
    computed beforehand (`reference.py`)."""
    negative: torch.Tensor | None = None
    """(T, D) features of the empty prompt, as `text`, where rollouts are guided against it."""
    rollout: RolloutStep | None = None
    """What the rollout of these prompts did at one step."""
    conditions: tuple[torch.Tensor, ...] = ()
    """As `latents`, each of a size of its own (`bucket.conditions`): the pictures that an edit starts from."""

    @property
    def pictures_per_row(self) -> int:
        """How many pictures a forward of one row computes."""
        return 1 if self.rejected is None and self.negative is None else 2

    def to(self, device: torch.device | str) -> MicroBatch:
        """On a device, latents in fp32 (made there, so that half as much travels); pinned memory does not block."""
        return MicroBatch(
            latents=self.latents.to(device, non_blocking=True).float(),
            logvar=None if self.logvar is None else self.logvar.to(device, non_blocking=True).float(),
            text=self.text.to(device, non_blocking=True),
            text_mask=None if self.text_mask is None else self.text_mask.to(device, non_blocking=True),
            weights=self.weights.to(device, non_blocking=True),
            slots=self.slots.to(device, non_blocking=True),
            num_slots=self.num_slots,
            bucket=self.bucket,
            rejected=None if self.rejected is None else self.rejected.to(device, non_blocking=True).float(),
            numbers=self.numbers,
            reference=None if self.reference is None else self.reference.to(device, non_blocking=True),
            negative=None if self.negative is None else self.negative.to(device, non_blocking=True),
            rollout=self.rollout,
            conditions=tuple(one.to(device, non_blocking=True).float() for one in self.conditions),
        )


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """A sample that could not be read: zeros at weight zero stand in its slot."""

    key: str
    slot: int
    problem: str


@dataclass(frozen=True, kw_only=True)
class RankBatch:
    """A rank's cut of one global batch."""

    batch: GlobalBatch
    micro_batches: list[MicroBatch]
    """As many on every rank."""
    keys: list[str]
    """Sample keys of the whole global batch in order, fill slots included."""
    num_real: int
    """Real samples of the whole global batch: what the loss is divided by. As the ledger has it, until the ranks have
    agreed on what could not be read (`bad_samples.py`)."""
    wait_s: float
    """Seconds that the training thread waited for this batch."""
    read_s: float
    """Seconds that reading and assembling it took, mostly hidden behind the previous step."""
    read_bytes: int
    image_tokens: int
    """Image tokens this rank computes (those of conditions and fill slots included)."""
    text_tokens: int
    """Valid text tokens this rank computes (fill slots included)."""
    padding: float
    """Share of this rank's computed tokens that are text padding or belong to fill slots, 0..1."""
    bad: tuple[BadSample, ...] = ()
    """Of this rank's cut."""
