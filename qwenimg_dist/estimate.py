"""How much memory a training rank needs on its device, from the architecture, the settings and the largest micro-batch.

Place in the flow: benchmarks put it beside what they measured. Pure arithmetic: it imports neither the engine nor a
device. Deliberately left out: what the allocator loses to fragmentation, and kernels' own workspaces.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

_STATE_BYTES: Final = 12
"""fp32 master, first and second moment of AdamW, per parameter."""
_GRADIENT_BYTES: Final = 4
"""Gradients are reduced and kept in fp32."""
_EMA_BYTES: Final = 4
_STORED_VALUES: Final = 27.7
"""Values of the inner width that a block keeps per token for its backward: 170 KB at width 3072 in bf16."""


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Bytes on one rank's device at the peak of a step."""

    weights: float
    """Partition of the weights as the forward gathers them."""
    states: float
    gradients: float
    ema: float
    gathered: float
    """Two blocks at once, the one at work and the next, and the full gradients of one."""
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.states + self.gradients + self.ema + self.gathered + self.activations


def device_memory(
    transformer_config: Mapping[str, Any],
    num_parameters: int,
    *,
    num_ranks: int,
    precision: Literal["bf16", "fp32"],
    ema: bool,
    tokens: int,
    activation_checkpointing: bool,
) -> DeviceMemory:
    """`tokens`: image and text tokens of one micro-batch, padding included."""
    size = 2 if precision == "bf16" else 4
    dim = int(transformer_config["num_attention_heads"]) * int(transformer_config["attention_head_dim"])
    num_layers = int(transformer_config["num_layers"])
    share = num_parameters / num_ranks
    block = num_parameters / num_layers * size  # what is outside of the blocks is below 1 % of any model of use
    one_block = tokens * dim * size * _STORED_VALUES
    kept = tokens * dim * size * num_layers
    return DeviceMemory(
        weights=share * size,
        states=share * _STATE_BYTES,
        gradients=share * _GRADIENT_BYTES,
        ema=share * _EMA_BYTES if ema else 0.0,
        gathered=3 * block,
        activations=one_block + kept if activation_checkpointing else one_block * num_layers,
    )
