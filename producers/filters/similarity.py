"""Rejects pictures that no caption describes, by the cosine of CLIP or SigLIP features.

A caption longer than the model's context (77 tokens of CLIP, 64 of SigLIP) is judged by its beginning;
`similarity_seen` says how much of the best caption that was, and `min_seen` keeps rows from being rejected by less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from producers.filters.base import Facts, Filter, Rejection, Resources, Scorer, Value, Values, number
from producers.filters.features import image_features
from producers.filters.model_params import ModelParams, check


class Params(ModelParams):
    example: ClassVar[str] = "google/siglip2-base-patch16-224"
    min_similarity: float = Field(default=-1.0, ge=-1, le=1)
    min_seen: float = Field(default=0.5, ge=0, le=1)


def load(params: Params, resources: Resources) -> Scorer:
    from qwenimg_dist.models.image_text import shared_model  # torch: only where it is wanted

    model = shared_model(params.where, params.revision, resources.device)

    def score(facts: Sequence[Facts]) -> list[dict[str, Value]]:
        pictures = image_features(model, params, facts)
        # A row without a caption is compared with the empty one, of which nothing is seen: it is not rejected by it.
        given = [one.captions or ("",) for one in facts]
        captions = model.caption_features([caption for of_row in given for caption in of_row])
        values: list[dict[str, Value]] = []
        start = 0
        for of_row, picture in zip(given, pictures, strict=True):
            stop = start + len(of_row)
            cosines = (captions.features[start:stop] @ picture).tolist()
            best = max(range(len(cosines)), key=cosines.__getitem__)
            values.append(
                {
                    "similarity": cosines[best],
                    "similarity_worst": min(cosines),
                    "similarity_seen": captions.seen[start + best],
                }
            )
            start = stop
        return values

    return score


def admit(values: Values, params: Params) -> Rejection | None:
    similarity = number(values, "similarity")
    if similarity < params.min_similarity and number(values, "similarity_seen") >= params.min_seen:
        return Rejection(reason="dissimilar", detail=f"{similarity:.3f} < min_similarity={params.min_similarity:g}")
    return None


FILTER = Filter(
    params=Params,
    stage=3,
    looks_at="pixels",
    scores=("similarity", "similarity_worst", "similarity_seen"),
    load=load,
    check=check,
    reads_captions=True,
    scored_by=("path", "revision"),
    admit=admit,
)
