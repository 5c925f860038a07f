"""The transformer under DeepSpeed ZeRO-3, as the rest of the consumers sees it: state by parameter name and range.

Place in the flow: `engine.py` builds these; the trainer calls `predict`, `backward`, `step`; checkpoint and EMA read
and write the fp32 partitions through `Engine.state`. Facts that this file rests on (deepspeed 0.19.8): a parameter of n
elements is cut into equal shares of ceil(n / ranks); sub-groups of shares form flat fp32 masters; gradients accumulate
in fp32 shares over as many backwards as one likes, `step` clips and updates.

Refuses: DeepSpeed's own checkpoints (torn, pickled, bound to a world size), and its gradient norm as the alarm for NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import torch

from consumers.parameter_groups import FROZEN, ParameterGroup
from consumers.ranks import Ranks
from qwenimg_dist.models import transformer as qwen

Kind = Literal["master", "exp_avg", "exp_avg_sq"]
KINDS: Final[tuple[Kind, ...]] = ("master", "exp_avg", "exp_avg_sq")
_EXCHANGE_ELEMENTS: Final = 1 << 24


class WeightSource(Protocol):
    """Where initial weights come from (`models.weights.SafetensorsDirectory`)."""

    @property
    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read_flat_range(self, name: str, start: int, stop: int) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Share:
    """This rank's part of one parameter: elements [start, stop) of the flattened tensor; empty if start == stop."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    group: str
    """Name of its `ParameterGroup`."""
    sub_group: int
    """-1 where it is frozen."""
    offset: int
    """First element within the sub-group's flat tensors."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    grad_norm: float
    """Over all ranks, before clipping; inf where the step was skipped."""
    skipped: bool


class Engine:
    """A ZeRO-3 engine whose state is addressed by parameter name and global element range. Made by `build_engine`."""

    def __init__(self, deepspeed_engine: Any, groups: Sequence[ParameterGroup], ranks: Ranks) -> None:
        self.ranks = ranks
        self.groups = tuple(groups)
        self._engine = deepspeed_engine
        self._zero = deepspeed_engine.optimizer
        self._adam: torch.optim.Optimizer = self._zero.optimizer
        self._flats: list[torch.Tensor] = self._zero.fp32_partitioned_groups_flat
        self._create_moments()
        self._parameters: dict[str, Any] = dict(self._engine.module.named_parameters())
        self.shares = tuple(self._list_shares())
        """Every trained parameter, in order of sub-groups; the same names in the same order on every rank."""
        self.frozen = tuple(self._list_frozen())
        """Every other parameter."""

    @property
    def transformer(self) -> Any:
        """What `models.transformer.predict_velocity` calls. All ranks must call it equally often."""
        return self._engine

    @property
    def num_parameters(self) -> int:
        """Frozen ones included."""
        return sum(group.num_elements for group in self.groups)

    @property
    def num_frozen(self) -> int:
        return sum(group.num_elements for group in self.groups if group.frozen)

    def predict(
        self,
        noisy: torch.Tensor,
        sigma: torch.Tensor,
        text: torch.Tensor,
        text_mask: torch.Tensor | None,
        conditions: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """Velocity (B,16,h,w) fp32 of latents (B,16,h,w), sigma (B,), text (B,T,D), conditions (B,16,h_i,w_i)."""
        return qwen.predict_velocity(self._engine, noisy, sigma, text, text_mask, conditions)

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    def checkpoint_activations(self, enabled: bool) -> None:
        """Whether blocks are recomputed in the backward pass; between steps, the same on all ranks.

        ZeRO-3's fetch order changes with it: DeepSpeed notices, and does not prefetch for two steps.
        """
        if self.checkpoints_activations != enabled:
            qwen.activation_checkpointing(self._engine.module, enabled)

    @property
    def checkpoints_activations(self) -> bool:
        return bool(self._engine.module.gradient_checkpointing)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradients of one micro-batch, averaged over the ranks, not divided by the number of micro-batches.

        Any number of calls may precede `step`; `last` marks the one right before it.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def gradients(self) -> Iterator[tuple[Share, torch.Tensor]]:
        """Each share with its part of the gradient, (stop - start,) fp32, averaged over the ranks and not clipped.

        Between the `backward` that was the last and `step`; views, not to be kept.
        """
        if self._zero.offload_optimizer:
            if self.ranks.device.type == "cuda":
                torch.cuda.synchronize()  # they are on their way to host memory
            for share in self.shares:
                whole: Any = self._flats[share.sub_group].grad
                yield share, whole[share.offset : share.offset + share.stop - share.start]
            return
        partitions = (part for index in range(self.num_sub_groups) for part in self._zero.averaged_gradients[index])
        for share, partition in zip(self.shares, partitions, strict=True):
            yield share, partition[: share.stop - share.start]

    def discard_gradients(self) -> None:
        """Forget what was accumulated since the last step."""
        self._zero.zero_grad()

    def step(self, lr: float) -> StepResult:
        """Clip, update the masters, renew the bf16 partitions. A non-finite gradient skips the update on all ranks.

        `lr` is multiplied by each group's `lr_scale`.
        """
        for group in self._adam.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.step()
        skipped = bool(self._zero.overflow)
        norm = float("inf") if skipped else float(self._engine.get_global_grad_norm())
        return StepResult(grad_norm=norm, skipped=skipped)

    @property
    def optimizer_steps(self) -> int:
        """Updates that AdamW has made; what its bias correction counts."""
        return int(self._adam.state[self._flats[0]]["step"].item())

    @optimizer_steps.setter
    def optimizer_steps(self, count: int) -> None:
        for flat in self._flats:
            self._adam.state[flat]["step"].fill_(float(count))

    def flat(self, kind: Kind, sub_group: int) -> torch.Tensor:
        """The whole flat fp32 tensor of a sub-group, padding included; writable."""
        flat = self._flats[sub_group]
        return flat.detach() if kind == "master" else self._adam.state[flat][kind]

    @property
    def num_sub_groups(self) -> int:
        return len(self._flats)

    def state(self, kind: Kind, share: Share) -> torch.Tensor:
        """The fp32 elements of one share, (stop - start,), as a writable view. After writing masters, `publish`."""
        return self.flat(kind, share.sub_group)[share.offset : share.offset + share.stop - share.start]

    def frozen_values(self, share: Share) -> torch.Tensor:
        """The elements of a frozen share, (stop - start,) in the compute dtype; writable, before `publish`."""
        values: torch.Tensor = self._parameters[share.name].ds_tensor.detach()
        return values[: share.stop - share.start]

    def weights(self, share: Share) -> torch.Tensor:
        """The elements of any share, (stop - start,): fp32 masters, or what a frozen one holds. To read only."""
        return self.frozen_values(share) if share.group == FROZEN else self.state("master", share)

    @torch.no_grad()
    def publish(self) -> None:
        """Renew the partitions that forwards gather from the masters, and the parameters kept gathered."""
        self._zero._partition_all_parameters()
        for parameter in self._parameters.values():
            parameter.ds_secondary_tensor = None  # hpZ's second copy, made again by the next gathering
        for flat, gathered_from in zip(self._flats, self._zero.fp16_partitioned_groups_flat, strict=True):
            if flat.data_ptr() != gathered_from.data_ptr():
                gathered_from.copy_(flat)
        persistent = self._zero.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)

    @contextmanager
    def swapped(self, flats: list[torch.Tensor]) -> Iterator[None]:
        """Run with other masters (the EMA); exchanged in place without a copy, and back bit for bit."""
        self._exchange(flats)
        try:
            yield
        finally:
            self._exchange(flats)

    @torch.no_grad()
    def _exchange(self, others: list[torch.Tensor]) -> None:
        for flat, other in zip(self._flats, others, strict=True):
            for start in range(0, flat.numel(), _EXCHANGE_ELEMENTS):
                mine, theirs = (t.detach()[start : start + _EXCHANGE_ELEMENTS] for t in (flat, other))
                kept = mine.clone()
                mine.copy_(theirs)
                theirs.copy_(kept)
        self.publish()

    def fill(self, source: WeightSource) -> None:
        """Set the masters to the source's weights, range by range, and `publish`. Collective."""

        def read() -> None:
            for share in self.shares:
                if share.stop > share.start:
                    values = source.read_flat_range(share.name, share.start, share.stop)
                    self.state("master", share).copy_(values.float())

        self.ranks.together(read)
        self.publish()

    def close(self) -> None:
        """Remove hooks and free the buffers."""
        self._engine.destroy()

    def _create_moments(self) -> None:
        # AdamW makes its state at the first step; made here, a checkpoint finds it from the start.
        for flat in self._flats:
            self._adam.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                "exp_avg": torch.zeros_like(flat, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(flat, requires_grad=False),
            }

    def _list_shares(self) -> Iterator[Share]:
        groups = {name: group.name for group in self.groups for name in group.names}
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        for sub_group, parameters in enumerate(self._zero.fp16_groups):
            offset = 0
            for parameter in parameters:
                size = int(parameter.partition_numel())
                start = min(self.ranks.rank * size, parameter.ds_numel)
                name = names[id(parameter)]
                yield Share(
                    name=name,
                    shape=tuple(parameter.ds_shape),
                    start=start,
                    stop=min(start + size, parameter.ds_numel),
                    group=groups[name],
                    sub_group=sub_group,
                    offset=offset,
                )
                offset += size

    def _list_frozen(self) -> Iterator[Share]:
        for name in (name for group in self.groups if group.frozen for name in group.names):
            parameter = self._parameters[name]
            size = int(parameter.partition_numel())
            start = min(self.ranks.rank * size, parameter.ds_numel)
            yield Share(
                name=name,
                shape=tuple(parameter.ds_shape),
                start=start,
                stop=min(start + size, parameter.ds_numel),
                group=FROZEN,
                sub_group=-1,
                offset=0,
            )


class FrozenModel:
    """A second transformer, sharded as the trained one, without optimiser or gradients. Made by `build_frozen`."""

    def __init__(self, deepspeed_engine: Any, ranks: Ranks) -> None:
        self.ranks = ranks
        self._engine = deepspeed_engine

    @property
    def transformer(self) -> Any:
        """As `Engine.transformer`; call it without gradients."""
        return self._engine

    def train(self, mode: bool = True) -> None:
        """There is nothing to train: it stays as it is, whoever measures it."""

    @torch.no_grad()
    def predict(
        self,
        noisy: torch.Tensor,
        sigma: torch.Tensor,
        text: torch.Tensor,
        text_mask: torch.Tensor | None,
        conditions: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """As `Engine.predict`, without a graph. All ranks must call it equally often."""
        return qwen.predict_velocity(self._engine, noisy, sigma, text, text_mask, conditions)

    def close(self) -> None:
        """Remove hooks and free the buffers."""
        self._engine.destroy()
