"""Rejects what a classifier takes for pornography or nudity. The score is the probability of the labels named."""

from __future__ import annotations

from typing import ClassVar

from producers.filters.classifier import ClassifierParams, classifier_filter


class Params(ClassifierParams):
    example: ClassVar[str] = "Falconsai/nsfw_image_detection"
    labels: tuple[str, ...] = ("nsfw",)


FILTER = classifier_filter(Params, "nsfw", stage=1)
