"""A loaded pipeline that draws one prompt after the other, for commands that draw thousands.

Place in the flow: every actor of `pairs` holds one. Noise belongs to (prompt, seed), as in `sample`. It keeps the text
encoder (14 GB at full size) beside the transformer, since prompts come one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from qwenimg_dist.commands.inputs import usable_device, wanted_weights
from qwenimg_dist.commands.sample import conditions, load_transformer
from qwenimg_dist.config import Config

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from qwenimg_dist.models.text_encoder import TextEncoder
    from qwenimg_dist.models.vae import LatentCodec


@dataclass(frozen=True, kw_only=True)
class Painter:
    """Transformer, text encoder and VAE on one device."""

    config: Config
    transformer: Any
    encoder: TextEncoder
    codec: LatentCodec
    scheduler: dict[str, Any]
    device: torch.device

    @classmethod
    def load(cls, config: Config) -> Self:
        """`sample.path`, `export.path` or the checkpoint of `run.path`, as `sample` finds them. Raises ValueError."""
        import torch

        from qwenimg_dist.models.generate import load_scheduler_config
        from qwenimg_dist.models.text_encoder import TextEncoder
        from qwenimg_dist.models.vae import LatentCodec

        device = usable_device(config.cluster.device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        folder, transformer = load_transformer(config, dtype, device)
        longest = config.model.max_text_tokens
        return cls(
            config=config,
            transformer=transformer,
            encoder=TextEncoder.load(folder, dtype=dtype, device=device, max_sequence_length=longest),
            codec=LatentCodec.load(folder, dtype=dtype, device=device),
            scheduler=load_scheduler_config(folder),
            device=device,
        )

    def draw(self, prompt: str, seeds: Sequence[int]) -> list[Image.Image]:
        """One picture per seed."""
        from qwenimg_dist.models.generate import generate

        sample = self.config.sample
        height, width = size_of(self.config)
        texts, negative = conditions(self.config, [prompt])
        features, without = self.encoder.encode([*texts, negative])
        return generate(
            self.transformer,
            self.codec,
            [features] * len(seeds),
            without,
            height=height,
            width=width,
            num_steps=sample.num_steps,
            guidance=sample.guidance,
            seeds=seeds,
            scheduler_config=self.scheduler,
            batch_size=self.config.pairs.batch_size,
            device=self.device,
        )


def size_of(config: Config) -> tuple[int, int]:
    """(height, width) of drawn pictures, px."""
    side = max(config.resolutions)
    return config.sample.height or side, config.sample.width or side


def what_draws(config: Config, step: int | None) -> dict[str, Any]:
    """What the pictures' contents depend on, as plain JSON: the weights' fingerprints and the sampler's settings.

    `step` is the checkpoint's, of a run. Raises ValueError for a model that is not there.
    """
    from qwenimg_dist.models.pipeline import fingerprint_component

    folder, checkpoint = model_of(config, step)
    sample = config.sample
    height, width = size_of(config)
    parts = ("text_encoder", "vae") if checkpoint is not None else ("transformer", "text_encoder", "vae")
    return {
        "weights": {
            **{name: fingerprint_component(folder / name) for name in parts},
            **({"checkpoint": checkpoint} if checkpoint is not None else {}),
        },
        "height": height,
        "width": width,
        "num_steps": sample.num_steps,
        "guidance": sample.guidance,
        "negative_prompt": sample.negative_prompt,
        "enhance": sample.enhance,
        "max_text_tokens": config.model.max_text_tokens,
    }


def model_of(config: Config, step: int | None) -> tuple[Path, str | None]:
    """(pipeline directory, hash of the checkpoint's manifest and which weights, where it is a run's)."""
    import hashlib

    from consumers.checkpoint_files import MANIFEST
    from consumers.checkpoint_reader import open_checkpoint
    from qwenimg_dist.models.pipeline import pipeline_dir, resolve_pipeline

    given = config.sample.path or config.export.path
    if given is not None:
        return resolve_pipeline(given, config.model.revision), None
    if config.run.path is None:
        return pipeline_dir(config.model), None
    run_dir = Path(config.run.path)
    reader = open_checkpoint(run_dir, step)
    wanted_weights(config, reader)  # refused before any worker is started
    digest = hashlib.sha256((reader.path / MANIFEST).read_bytes()).hexdigest()[:16]
    return pipeline_dir(config.model), f"{digest} {config.export.weights}"


def newest_step(config: Config) -> int | None:
    """The checkpoint that `run.path` means now; None where pictures are not drawn by a run's."""
    from consumers.checkpoint_reader import open_checkpoint

    if config.sample.path or config.export.path or config.run.path is None:
        return None
    return open_checkpoint(Path(config.run.path), config.export.step).step
