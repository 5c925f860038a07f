"""What DeepSpeed and AdamW are told: sizes from the model, fp32 reduction, AdamW's groups.

Place in the flow: `engine.py` builds with it. Imports no DeepSpeed, so that settings can be looked at without it.
Refuses DeepSpeed's defaults: a 5e7-element prefetch and a 5e8-element bucket suit neither 2.5 M nor 20 B parameters,
and with bf16 they would reduce and accumulate gradients in bf16.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch

from consumers.parameter_groups import ParameterGroup
from consumers.ranks import Ranks
from qwenimg_dist.config import Config

_SMALL_ELEMENTS: Final = 1 << 22
"""Buffers of 16 MB cost nothing anywhere; below that a tiny model would only make more and smaller collectives."""


def check_hpz(config: Config, world_size: int) -> None:
    """Raise ValueError if the ranks cannot be cut into groups for hpZ."""
    if world_size % config.engine.hpz_partition:
        raise ValueError(
            f"engine.hpz_partition={config.engine.hpz_partition} does not divide the {world_size} ranks: give the GPUs "
            "of a node"
        )


def deepspeed_config(config: Config, shapes: Mapping[str, tuple[int, ...]], ranks: Ranks) -> dict[str, Any]:
    """DeepSpeed's settings, with every size derived from the model unless the config gives it.

    Raises ValueError if the ranks cannot be cut into groups for hpZ.
    """
    check_hpz(config, ranks.world_size)
    hpz = config.engine.hpz_partition
    numels = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    block = sum(numel for name, numel in numels.items() if name.startswith("transformer_blocks.0."))
    total, largest = sum(numels.values()), max(numels.values())
    share = -(-total // ranks.world_size)
    offloaded = config.engine.offload_optimizer == "cpu"
    on_gpu, whole_blocks = config.cluster.device == "cuda", config.engine.gather == "block"
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.clip_grad_norm,
        "bf16": {"enabled": config.engine.precision == "bf16"},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": on_gpu,
            # A GPU's allocator fragments without the contiguous bucket; elsewhere it is only one buffer more.
            "contiguous_gradients": on_gpu,
            "reduce_scatter": True,
            "reduce_bucket_size": max(largest, _SMALL_ELEMENTS, min(50_000_000, total // 16) if whole_blocks else 0),
            "stage3_prefetch_bucket_size": block if whole_blocks else 0,
            # Nothing is kept gathered: vectors travel with their block, instead of in one collective each per step.
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": max(3 * block, 2 * largest) if whole_blocks else largest,
            "stage3_max_reuse_distance": block if whole_blocks else 0,
            # The step copies one sub-group's gradients; this bounds the copy.
            "sub_group_size": max(largest // ranks.world_size, min(500_000_000, share // 16), _SMALL_ELEMENTS),
            **config.engine.zero,
            **({"zero_hpz_partition_size": hpz} if hpz > 1 else {}),
            **({"offload_optimizer": {"device": "cpu", "pin_memory": on_gpu}} if offloaded else {}),
        },
    }


def adamw(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], groups: Sequence[ParameterGroup], config: Config
) -> torch.optim.Optimizer:
    """torch's AdamW over the groups that train. The learning rate is set anew at every step, times `lr_scale`."""
    optim = config.optim
    named = dict(parameters)
    parameter_groups = [
        {
            "params": [named[name] for name in group.names],
            "weight_decay": group.weight_decay,
            "lr_scale": group.lr_scale,
        }
        for group in groups
        if not group.frozen
    ]
    # torch's own fused kernel, there for CPU too and so for offloaded states: no temporaries, and nothing is compiled.
    return torch.optim.AdamW(parameter_groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
