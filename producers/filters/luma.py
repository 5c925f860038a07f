"""Rejects pictures that are too dark, too bright, or without contrast.

Scores: `luma`, the mean of Rec. 601 luma of the sRGB values, and `contrast`, their standard deviation (RMS contrast,
Peli 1990, J. Opt. Soc. Am. A 7(10)); both in [0, 1].
"""

from __future__ import annotations

import cv2
from pydantic import Field

from producers.filters.base import Facts, Filter, FilterParams, Rejection, Value, Values, number


class Params(FilterParams):
    min_luma: float = Field(default=0.06, ge=0.0, le=1.0)
    """Hubble's deep field has 0.08, daylight photographs at a tenth of their exposure 0.02 to 0.06."""
    max_luma: float = Field(default=0.97, ge=0.0, le=1.0)
    """A small thing on white paper reaches 0.96."""
    min_contrast: float = Field(default=0.015, ge=0.0, le=0.5)


def score(facts: Facts) -> dict[str, Value]:
    mean, deviation = cv2.meanStdDev(facts.grey)
    return {"luma": float(mean[0, 0]) / 255.0, "contrast": float(deviation[0, 0]) / 255.0}


def admit(values: Values, params: Params) -> Rejection | None:
    luma, contrast = number(values, "luma"), number(values, "contrast")
    if luma < params.min_luma:
        return Rejection(reason="too_dark", detail=f"mean luma {luma:.3f} < min_luma={params.min_luma:g}")
    if luma > params.max_luma:
        return Rejection(reason="too_bright", detail=f"mean luma {luma:.3f} > max_luma={params.max_luma:g}")
    if contrast < params.min_contrast:
        return Rejection(
            reason="low_contrast", detail=f"contrast {contrast:.3f} < min_contrast={params.min_contrast:g}"
        )
    return None


FILTER = Filter(params=Params, stage=2, looks_at="pixels", scores=("luma", "contrast"), score=score, admit=admit)
