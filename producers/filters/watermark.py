"""Rejects pictures with a watermark, by a classifier. The score is the probability of the labels named."""

from __future__ import annotations

from typing import ClassVar

from producers.filters.classifier import ClassifierParams, classifier_filter


class Params(ClassifierParams):
    example: ClassVar[str] = "a ViT, Swin or SigLIP finetuned to tell watermarked pictures"
    labels: tuple[str, ...] = ("watermark",)


FILTER = classifier_filter(Params, "watermark", stage=5)
