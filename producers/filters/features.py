"""Features of pictures that several filters use: made once per picture and model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from producers.filters.base import Facts
from producers.filters.model_params import ModelParams

if TYPE_CHECKING:
    import torch

    from qwenimg_dist.models.image_text import ImageTextModel


def image_features(model: ImageTextModel, params: ModelParams, facts: Sequence[Facts]) -> torch.Tensor:
    """(B, D) of length 1, of the pictures; those that another filter has asked for are there already."""
    import torch

    key = f"{params.path}@{params.revision}"
    new = [one for one in facts if key not in one.shared]
    if new:
        images = [one.image for one in new if one.image is not None]
        for one, features in zip(new, model.image_features(images), strict=True):
            one.shared[key] = features
    return torch.stack([one.shared[key] for one in facts])
