"""How much memory a training rank needs on its device, from the architecture, the settings and the largest micro-batch.

Place in the flow: `plan`, the check before a run, and benchmarks that put it beside what they measured. Pure
arithmetic: it imports neither the engine nor a device. Deliberately left out: what the allocator loses to
fragmentation, kernels' own workspaces, the CUDA context and NCCL's buffers; `plan.headroom` is for these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Literal

_STATE_BYTES: Final = 12
"""fp32 master, first and second moment of AdamW, per parameter."""
_GRADIENT_BYTES: Final = 4
"""Gradients are reduced and kept in fp32."""
_OFFLOADED_GRADIENTS: Final = 2
"""With offloaded states DeepSpeed keeps gradients twice in host memory: accumulated, and as the masters' `.grad`."""
_EMA_BYTES: Final = 4
_STORED_VALUES: Final = 27.7
"""Values of the inner width that a block keeps per token for its backward: 170 KB at width 3072 in bf16."""
_STORED_COMPILED: Final = 20.3
"""The same of a compiled block: two images of 1024 px through 60 compiled blocks took 106 GB on an H200, weights
included (`tests/bench/gpu.py`)."""


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Bytes on one rank's device. The peak is in a backward pass or in the optimiser's update."""

    weights: float
    """Partition of the weights as the forward gathers them (in fp32 the masters of what trains serve)."""
    secondary: float = 0.0
    """hpZ's second partition."""
    states: float
    gradients: float
    ema: float
    reference: float = 0.0
    """A frozen second model's partition."""
    other: float = 0.0
    """Further frozen models, whole on every rank: the VAE of rollouts."""
    gathered: float
    """Weights gathered at once (the block at work, the next one flat and in parts), and a block's full gradients."""
    buffers: float = 0.0
    """What gradients pass through on their way into the reduction."""
    activations: float
    update: float = 0.0
    """The copy of a sub-group's gradients that the optimiser's update makes; there is no graph then."""

    @property
    def persistent(self) -> float:
        """What is there between steps."""
        return self.weights + self.secondary + self.states + self.gradients + self.ema + self.reference + self.other

    @property
    def total(self) -> float:
        """The peak."""
        return self.persistent + max(self.gathered + self.buffers + self.activations, self.update)

    def parts(self) -> dict[str, float]:
        """Part -> bytes, for tables."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def device_memory(
    transformer_config: Mapping[str, Any],
    num_parameters: int,
    *,
    num_ranks: int,
    precision: Literal["bf16", "fp32"],
    ema: bool,
    tokens: int,
    activation_checkpointing: bool,
    num_trained: int | None = None,
    offloaded: bool = False,
    hpz_partition: int = 1,
    reference: bool = False,
    compiled: bool = False,
    gathered_elements: int | None = None,
    gradient_elements: int | None = None,
    bucket_elements: int = 0,
    update_elements: int = 0,
    graph: bool = True,
    other: float = 0.0,
) -> DeviceMemory:
    """`tokens`: image and text tokens of one micro-batch, padding included.

    `num_trained` parameters have gradients and states (None: all). `gathered_elements` of the weights are whole at once
    (None: three blocks), `gradient_elements` of a module's full gradients (None: one block); `bucket_elements` is
    DeepSpeed's bucket of the reduction, `update_elements` its sub-group. Without a `graph` nothing is kept for a
    backward pass. `other` bytes are added as they are.
    """
    size = 2 if precision == "bf16" else 4
    dim = int(transformer_config["num_attention_heads"]) * int(transformer_config["attention_head_dim"])
    num_layers = int(transformer_config["num_layers"])
    trained = num_parameters if num_trained is None else num_trained
    held = num_parameters if precision == "bf16" else num_parameters - trained
    block = num_parameters // num_layers  # what is outside of the blocks is below 1 % of any model of use
    gathered = 3 * block if gathered_elements is None else gathered_elements
    # A single rank gathers nothing: its partition is the whole.
    gathered = (gathered if num_ranks > 1 else 0) + (block if gradient_elements is None else gradient_elements)
    one_block = tokens * dim * size * (_STORED_COMPILED if compiled else _STORED_VALUES)
    kept = tokens * dim * size * num_layers
    activations = one_block if not graph else one_block + kept if activation_checkpointing else one_block * num_layers
    return DeviceMemory(
        weights=held * size / num_ranks,
        secondary=num_parameters * size / hpz_partition * (1 + reference) if hpz_partition > 1 else 0.0,
        states=0.0 if offloaded else trained * _STATE_BYTES / num_ranks,
        gradients=0.0 if offloaded else trained * _GRADIENT_BYTES / num_ranks,
        ema=trained * _EMA_BYTES / num_ranks if ema and not offloaded else 0.0,
        reference=num_parameters * size / num_ranks if reference else 0.0,
        other=other,
        gathered=gathered * size,
        # The bucket itself in fp32, and the flat copy that the reduce-scatter sends.
        buffers=2 * _GRADIENT_BYTES * bucket_elements,
        activations=activations,
        update=0.0 if offloaded else _GRADIENT_BYTES * (update_elements + bucket_elements),
    )


def offloaded_bytes(num_trained: int, *, num_ranks: int, ema: bool) -> float:
    """Host memory of one rank's offloaded states: masters, moments, gradients twice, EMA."""
    each = _STATE_BYTES + _OFFLOADED_GRADIENTS * _GRADIENT_BYTES + (_EMA_BYTES if ema else 0)
    return num_trained * each / num_ranks
