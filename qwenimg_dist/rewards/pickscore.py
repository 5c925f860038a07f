"""PickScore: how people would choose among pictures of one prompt, by a CLIP-H that was trained on their choices.

The score is the model's logit, its learned scale times the cosine (Kirstain et al. 2023, arXiv 2305.01569): about 16 to
24, of which differences count; a difference of 1 is a preference of e to 1. Loaded from a directory or from the hub at
a pinned revision.
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
    batch_size: PositiveInt = 4
    path: str = "yuvalkirstain/PickScore_v1"
    """A directory, or a hub id."""
    revision: str | None = None
    """Commit of the hub repository."""


def _model(params: Params) -> Path:
    return find_model(params.path, params.revision)


def _load(params: Params, resources: Resources) -> Judge:
    from qwenimg_dist.models.image_text import ImageTextModel  # torch and transformers: only where pictures are judged

    model = ImageTextModel.load(_model(params), resources.device)
    scale = model.logit_scale

    def judge(images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[float]:
        return (scale * model.cosines(images, [prompt.text for prompt in prompts])).tolist()

    return judge


REWARD = Kind(params=Params, load=_load, model=_model, device_bytes=3.9e9)
