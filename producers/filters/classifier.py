"""Filters that reject by a picture classifier: the sum of the probabilities of some labels against a threshold.

`nsfw.py` and `watermark.py` say which; another of the kind is one more such file. Refuses labels that the model does
not have, and says which it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pydantic import Field

from producers.filters.base import Facts, Filter, Rejection, Resources, Scorer, Value, Values, number
from producers.filters.model_params import ModelParams, check
from qwenimg_dist.models.hub import find_model


class ClassifierParams(ModelParams):
    labels: tuple[str, ...] = Field(min_length=1)
    """Of the model; their probabilities are added up."""
    max_probability: float = Field(default=0.5, ge=0, le=1)


def classifier_filter(params: type[ClassifierParams], name: str, stage: int) -> Filter[ClassifierParams]:
    """The filter whose score and reason are `name`."""
    return Filter(
        params=params,
        stage=stage,
        looks_at="pixels",
        scores=(name,),
        load=_loader(name),
        check=check,
        scored_by=("path", "revision", "labels"),
        admit=_judge(name),
    )


def _loader(name: str) -> Callable[[ClassifierParams, Resources], Scorer]:
    def load(params: ClassifierParams, resources: Resources) -> Scorer:
        from qwenimg_dist.models.image_classifier import ImageClassifier  # torch: only where it is wanted

        model = ImageClassifier.load(find_model(params.where, params.revision), resources.device)
        chosen = model.indices(params.labels)

        def score(facts: Sequence[Facts]) -> list[dict[str, Value]]:
            images = [one.image for one in facts if one.image is not None]
            return [{name: float(one)} for one in model.probabilities(images)[:, chosen].sum(-1).clamp(max=1)]

        return score

    return load


def _judge(name: str) -> Callable[[Values, ClassifierParams], Rejection | None]:
    def admit(values: Values, params: ClassifierParams) -> Rejection | None:
        if number(values, name) > params.max_probability:
            detail = f"{number(values, name):.3f} > max_probability={params.max_probability:g}"
            return Rejection(reason=name, detail=detail)
        return None

    return admit
