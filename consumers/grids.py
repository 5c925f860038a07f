"""Pictures along the way: fixed prompts, fixed seeds, by EMA or raw weights on the running engine.

Place in the flow: the trainer calls `draw` when due; `samples/step-NNNNNNNN.png` appears, and `...-raw.png` beside it
where both weights are looked at. Edits are drawn by `edit_grids.py`, with the scheduler and VAE from here. Under ZeRO-3
a forward is collective, so every rank makes an equal number of pictures in lock-step and rank 0 decodes and lays them
out. The prompts are encoded once, by rank 0, before the engine is built: text encoder and VAE never enter `zero.Init`,
and the encoder is gone when training begins. Refuses nothing; a rank without a picture of its own repeats one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from consumers.ema import Ema
from consumers.ranks import Ranks
from consumers.zero_engine import Engine
from qwenimg_dist.config import Config
from qwenimg_dist.models.generate import generate_latents, load_scheduler_config, save_grid, seeded_noise, to_pictures
from qwenimg_dist.models.text_encoder import TextEncoder
from qwenimg_dist.models.vae import LatentCodec
from qwenimg_dist.patience import StorageAwayError


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A grid of the fixed prompts, on rank 0."""

    file: Path
    prompts: tuple[str, ...]
    pictures: tuple[Image.Image, ...]
    """One per prompt."""


class Grids:
    """The fixed prompts' features on every rank, and the VAE on rank 0."""

    def __init__(self, config: Config, pipeline: Path, ranks: Ranks, say: Callable[[str], None]) -> None:
        """Collective; call before the engine is built."""
        self._say = say
        self._config = config
        self._ranks = ranks
        self.scheduler = ranks.together(lambda: load_scheduler_config(pipeline))
        self._text: list[torch.Tensor] = []
        if config.evaluate.prompts:
            prompts = [*config.evaluate.prompts, config.evaluate.negative_prompt]
            features = ranks.together(
                lambda: _encode(config, pipeline, ranks.device, prompts) if ranks.is_first else None
            )
            *self._text, self._negative = _broadcast(features, ranks)
        self.codec = ranks.together(lambda: LatentCodec.load(pipeline, device=ranks.device) if ranks.is_first else None)
        """Rank 0's."""

    @torch.no_grad()
    def draw(
        self, engine: Engine, ema: Ema | None, *, step: int, resolution: int, batch_size: int, suffix: str = ""
    ) -> Drawn | None:
        """One picture per prompt, by the EMA's weights if given; the grid on rank 0. Collective."""
        if not self._text:
            return None
        evaluate, ranks = self._config.evaluate, self._ranks
        height, width = evaluate.height or resolution, evaluate.width or resolution
        per_rank = -(-len(self._text) // ranks.world_size)
        mine = [min(ranks.rank * per_rank + i, len(self._text) - 1) for i in range(per_rank)]
        parts = []
        engine.train(False)
        with ema.applied() if ema is not None else contextlib.nullcontext():
            for start in range(0, per_rank, batch_size):
                chosen = mine[start : start + batch_size]
                noise = seeded_noise([evaluate.seed + i for i in chosen], height, width)
                parts.append(
                    generate_latents(
                        engine.transformer,
                        [self._text[i] for i in chosen],
                        self._negative,
                        noise.to(ranks.device),
                        num_steps=evaluate.num_steps,
                        guidance=evaluate.guidance,
                        scheduler_config=self.scheduler,
                    )
                )
        engine.train()
        latents = ranks.gather_tensor(torch.cat(parts))[: len(self._text)]
        if self.codec is None:
            return None
        pictures = [picture for one in latents for picture in to_pictures(self.codec.decode(one[None]))]
        file = Path(self._config.run.path or ".") / "samples" / f"step-{step:08d}{suffix}.png"
        saved = saved_or_said(lambda: save_grid(pictures, list(evaluate.prompts), file, columns=4), self._say)
        return Drawn(file=saved, prompts=tuple(evaluate.prompts), pictures=tuple(pictures)) if saved else None


def saved_or_said(save: Callable[[], Path], say: Callable[[str], None]) -> Path | None:
    """What rank 0 alone does at the end of a grid: failing there, it would leave the others in their next collective.

    A disk without room ends the run through its logs, on all ranks.
    """
    try:
        return save()
    except (OSError, ValueError, StorageAwayError) as error:
        say(f"warning: a grid of samples was not written ({type(error).__name__}: {error})")
        return None


def _encode(config: Config, pipeline: Path, device: torch.device, prompts: list[str]) -> list[torch.Tensor]:
    dtype = torch.bfloat16 if config.encode.compute_dtype == "bfloat16" else torch.float32
    encoder = TextEncoder.load(pipeline, dtype=dtype, device=device, max_sequence_length=config.model.max_text_tokens)
    features = [encoder.encode([prompt])[0].float().cpu() for prompt in prompts]
    del encoder
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return features


def _broadcast(features: list[torch.Tensor] | None, ranks: Ranks) -> list[torch.Tensor]:
    shapes = ranks.broadcast_json([list(one.shape) for one in features] if features is not None else None)
    sources: list[torch.Tensor | None] = list(features) if features is not None else [None] * len(shapes)
    return [ranks.broadcast_tensor(one, shape, torch.float32) for one, shape in zip(sources, shapes, strict=True)]
