"""Rejects unnaturally vivid pictures, and pale ones if told so.

Scores: `colourfulness`, M3 of Hasler and Suesstrunk 2003 ("Measuring colourfulness in natural images", SPIE 5007): with
rg = R - G and yb = (R + G) / 2 - B on 0..255, the length of their standard deviations + 0.3 x the length of their
means. Their viewers called 0 not, 45 averagely, 82 highly and 109 extremely colourful. And `vivid`, the share of pixels
whose largest channel is over 200 above the smallest: next to none in photographs, many once a saturation slider has
driven channels to their ends. Black and white photographs are admitted: a caption can say so.
"""

from __future__ import annotations

from typing import Final

import cv2
import numpy as np
from pydantic import Field, NonNegativeFloat

from producers.filters.base import Facts, Filter, FilterParams, Rejection, Value, Values, number

_VIVID: Final = 200


class Params(FilterParams):
    min_colourfulness: NonNegativeFloat = 0.0
    """3 rejects black and white."""
    max_vivid: float = Field(default=0.4, ge=0.0, le=1.0)


def score(facts: Facts) -> dict[str, Value]:
    red, green, blue = cv2.split(facts.preview)
    chroma = cv2.subtract(cv2.max(cv2.max(red, green), blue), cv2.min(cv2.min(red, green), blue))
    yellow = cv2.addWeighted(red, 0.5, green, 0.5, 0, dtype=cv2.CV_32F)
    opponents = (cv2.subtract(red, green, dtype=cv2.CV_16S), cv2.subtract(yellow, blue, dtype=cv2.CV_32F))
    means, deviations = zip(*(cv2.meanStdDev(plane) for plane in opponents), strict=True)
    return {
        "colourfulness": float(np.linalg.norm(deviations) + 0.3 * np.linalg.norm(means)),
        "vivid": float((chroma > _VIVID).mean()),
    }


def admit(values: Values, params: Params) -> Rejection | None:
    colourfulness, vivid = number(values, "colourfulness"), number(values, "vivid")
    if colourfulness < params.min_colourfulness:
        detail = f"colourfulness {colourfulness:.1f} < min_colourfulness={params.min_colourfulness:g}"
        return Rejection(reason="too_pale", detail=detail)
    if vivid > params.max_vivid:
        detail = f"{vivid:.0%} of the pixels are vivid > max_vivid={params.max_vivid:g}"
        return Rejection(reason="oversaturated", detail=detail)
    return None


FILTER = Filter(params=Params, stage=2, looks_at="pixels", scores=("colourfulness", "vivid"), score=score, admit=admit)
