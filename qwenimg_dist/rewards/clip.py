"""Cosine of picture and prompt in the space of CLIP or SigLIP, -1 to 1.

A prompt longer than the model's context (77 tokens of CLIP, 64 of SigLIP) is judged by its beginning. SigLIP 2 reads
Chinese too. Loaded from a directory or from the hub at a pinned revision.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from pydantic import PositiveInt

from qwenimg_dist.models.hub import find_model
from qwenimg_dist.rewards.base import Prompt
from qwenimg_dist.rewards.kind import Judge, Kind, Resources, RewardParams


class Params(RewardParams):
    batch_size: PositiveInt = 8
    path: str = "openai/clip-vit-large-patch14"
    """A directory, or a hub id."""
    revision: str | None = None
    """Commit of the hub repository."""


def _model(params: Params) -> Path:
    return find_model(params.path, params.revision)


def _load(params: Params, resources: Resources) -> Judge:
    from qwenimg_dist.models.image_text import ImageTextModel  # torch and transformers: only where pictures are judged

    model = ImageTextModel.load(_model(params), resources.device)

    def judge(images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[float]:
        return model.cosines(images, [prompt.text for prompt in prompts]).tolist()

    return judge


REWARD = Kind(params=Params, load=_load, model=_model, device_bytes=1.7e9)
