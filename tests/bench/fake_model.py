"""Random models of any size as pipeline directories: the real transformer class beside the tiny twin's other parts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

TEXT_WIDTH: Final = 3584
HEAD_DIM: Final = 128


def architecture(num_layers: int, num_heads: int) -> dict[str, Any]:
    """Constructor arguments: Qwen-Image's own but for depth and width (`num_heads * 128`)."""
    return {
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": num_layers,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": num_heads,
        "joint_attention_dim": TEXT_WIDTH,
        "guidance_embeds": False,
        "axes_dims_rope": [16, 56, 56],
    }


def write_pipeline(folder: Path, model: Mapping[str, Any], precision: str) -> int:
    """Write a pipeline directory tensor by tensor (the model is never in memory); returns the parameters."""
    import torch

    from qwenimg_dist.models import transformer as qwen
    from qwenimg_dist.models.tiny import write_tiny_pipeline
    from qwenimg_dist.models.weights import write_sharded

    write_tiny_pipeline(folder)
    component = folder / "transformer"
    (component / "diffusion_pytorch_model.safetensors").unlink()
    head = json.loads((component / "config.json").read_text())
    (component / "config.json").write_text(json.dumps({**head, **model}))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in qwen.build_transformer(model).named_parameters()}
    seeded = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...]) -> Callable[[], torch.Tensor]:
        return lambda: torch.randn(shape, generator=seeded, dtype=dtype) * 0.02

    write_sharded(component, [(n, s, dtype, draw(s)) for n, s in shapes.items()], max_shard_bytes=500_000_000)
    return sum(torch.Size(shape).numel() for shape in shapes.values())
