"""What the checks of a gang share: the ranks, the model, fixed batches, one step, and how states are compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from fake_dataset import WIDTH

from consumers.ema import Ema
from consumers.engine import build_engine
from consumers.ranks import Ranks
from consumers.zero_engine import KINDS, Engine
from qwenimg_dist.compose import load_config
from qwenimg_dist.config import Config
from qwenimg_dist.models import transformer as qwen
from qwenimg_dist.models.safetensors_directory import SafetensorsDirectory

GLOBAL_BATCH = 8
EMA_DECAY = 0.9
SETTINGS = ["engine.precision=fp32", "optim.weight_decay=0.1", "optim.clip_grad_norm=0.5"]


@dataclass(frozen=True, kw_only=True)
class World:
    """What the checks share."""

    ranks: Ranks
    pipeline: Path
    out: Path

    @property
    def source(self) -> SafetensorsDirectory:
        return SafetensorsDirectory(self.pipeline / "transformer")

    def engine(self, *settings: str) -> tuple[Engine, Config]:
        config = load_config([*SETTINGS, *settings])
        model = qwen.load_transformer_config(self.pipeline / "transformer")
        return build_engine(model, config, self.ranks, self.source), config

    def plain(self) -> Any:
        return QwenImageTransformer2DModel.from_pretrained(self.pipeline / "transformer").train()


def samples(step: int) -> tuple[torch.Tensor, ...]:
    """The global batch of a step: noisy latents, sigma, text, target."""
    generator = torch.Generator().manual_seed(step)
    height, width = ((8, 8), (8, 16))[step % 2]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(GLOBAL_BATCH, *shape, generator=generator)

    noisy, target = draw(16, height, width), draw(16, height, width)
    return noisy, torch.rand(GLOBAL_BATCH, generator=generator), draw(5 + step % 3, WIDTH), target


def errors(predict: Callable[..., torch.Tensor], part: tuple[torch.Tensor, ...]) -> torch.Tensor:
    noisy, sigma, text, target = part
    return (predict(noisy, sigma, text, None) - target).square().mean(dim=(1, 2, 3)).sum()


def engine_step(engine: Engine, ema: Ema | None, step: int, lr: float) -> tuple[float, float]:
    """One step on this rank's cut, in as many micro-batches as the step says; (loss, gradient norm)."""
    ranks = engine.ranks
    size = GLOBAL_BATCH // ranks.world_size
    cut = [tensor[ranks.rank * size : (ranks.rank + 1) * size] for tensor in samples(step)]
    num_micro = min(size, 1 + step % 3)
    bounds = [size * i // num_micro for i in range(num_micro + 1)]
    total = 0.0
    for index in range(num_micro):
        part = tuple(tensor[bounds[index] : bounds[index + 1]] for tensor in cut)
        loss = errors(engine.predict, part)
        total += float(loss.detach())
        engine.backward(loss * ranks.world_size / GLOBAL_BATCH, last=index + 1 == num_micro)
    result = engine.step(lr)
    if ema is not None:
        ema.update()
    return ranks.sum([total])[0] / GLOBAL_BATCH, result.grad_norm


GROUPS = [
    "optim.groups={modulation:{pattern:'mod\\.1',lr_scale:0.5,weight_decay:0},all_mlp:{pattern:_mlp,weight_decay:0.3}}"
]
# All before the first block is frozen, so that its inputs have no gradient of their own; part of it trains.
FREEZE = ["optim.freeze=['^(img|txt)_(in|norm)','^time_text_embed','blocks\\.0\\.attn\\.to_q']"]


def max_difference(engine: Engine, state: Callable[..., torch.Tensor], expected: Any, shares: Any = None) -> float:
    found = 0.0
    for share in engine.shares if shares is None else shares:
        if share.stop > share.start:
            wanted = expected[share.name].detach().flatten()[share.start : share.stop]
            found = max(found, float((state(share) - wanted).abs().max()))
    return engine.ranks.max([found])[0]


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max()) if one.numel() else 0.0


def snapshot(engine: Engine, ema: Ema | None) -> list[torch.Tensor]:
    """Copies of all state of this rank."""
    state = [engine.flat(kind, i).clone() for kind in KINDS for i in range(engine.num_sub_groups)]
    state += [copy.deepcopy(ema.state(share)) for share in engine.shares] if ema else []
    return [*state, torch.tensor(engine.optimizer_steps)]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
