"""Rejects pictures that a head on CLIP or SigLIP features gives a low score.

The scale is the head's own: LAION's goes from 1 to 10. With the model of `similarity`, features are made once for both.
Refuses a head for features of another size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from producers.filters.base import Facts, Filter, Rejection, Resources, Scorer, Value, Values, number
from producers.filters.features import image_features
from producers.filters.model_params import ModelParams
from producers.filters.model_params import check as check_model


class Params(ModelParams):
    example: ClassVar[str] = "openai/clip-vit-large-patch14"
    head: str | None = Field(default=None, validate_default=True)
    head_revision: str | None = None
    activation: Literal["none", "relu", "gelu"] = "none"
    min_aesthetic: float = 4.5

    @field_validator("head")
    @classmethod
    def _has_head(cls, head: str | None, info: ValidationInfo) -> str | None:
        if head is None and info.data.get("enabled", True):
            raise ValueError("is not set: give a directory with the head's layers as one safetensors file")
        return head


def check(params: Params) -> None:
    """Raises ValueError saying which of model and head is missing."""
    from qwenimg_dist.models.aesthetic_head import AestheticHead, find_head

    check_model(params)
    assert params.head is not None
    AestheticHead.load(find_head(params.head, params.head_revision))


def load(params: Params, resources: Resources) -> Scorer:
    from qwenimg_dist.models.aesthetic_head import AestheticHead, find_head
    from qwenimg_dist.models.image_text import shared_model

    assert params.head is not None
    model = shared_model(params.where, params.revision, resources.device)
    head = AestheticHead.load(find_head(params.head, params.head_revision), params.activation)

    def score(facts: Sequence[Facts]) -> list[dict[str, Value]]:
        features = image_features(model, params, facts)
        if features.shape[1] != head.num_features:
            raise ValueError(
                f"filters.aesthetic: head {params.head} takes {head.num_features} features, "
                f"{params.path} gives {features.shape[1]}: they do not belong together"
            )
        return [{"aesthetic": float(one)} for one in head(features)]

    return score


def admit(values: Values, params: Params) -> Rejection | None:
    score = number(values, "aesthetic")
    if score < params.min_aesthetic:
        return Rejection(reason="unaesthetic", detail=f"{score:.2f} < min_aesthetic={params.min_aesthetic:g}")
    return None


FILTER = Filter(
    params=Params,
    stage=5,
    looks_at="pixels",
    scores=("aesthetic",),
    load=load,
    check=check,
    scored_by=("path", "revision", "head", "head_revision", "activation"),
    admit=admit,
)
