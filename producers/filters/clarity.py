"""Rejects blurred pictures. The score is `clarity`: the finest detail in the clearest part of the picture.

The energy of the Laplacian is the usual measure of focus (Pech-Pacheco 2000; "LAPV" in Pertuz 2013, Pattern Recognition
46), but it also grows with contrast and with how much there is to see. Divided by the energy of the gradient both fall
out, and a bandwidth is left: an edge that a Gaussian of s px has blurred gives about 1 / (2 s^2), whatever its height.
The picture is cut into 4 x 4 tiles and the clearest counts, so that a sharp subject before a soft background passes.
Measured on the preview (long side 512 px), hence the same for every file size: blur below about one pixel there is not
seen, nor is a picture that was enlarged to more than 512 px. Noise passes for detail here; `texture` looks for it.
"""

from __future__ import annotations

import cv2
import numpy as np
from pydantic import NonNegativeFloat

from producers.filters.base import Facts, Filter, FilterParams, Rejection, Value, Values, number

_TILES = 4
# Gradient energy of a flat area's noise and rounding, in grey levels squared: without it they would count as detail.
_FLOOR = 4.0


class Params(FilterParams):
    min_clarity: NonNegativeFloat = 0.7
    """Sharp photographs have 1.3 to 13; a blur of s = 2 px leaves 0.2 to 0.45."""


def score(facts: Facts) -> dict[str, Value]:
    grey = facts.grey.astype(np.float32)
    laplacian = cv2.Laplacian(grey, cv2.CV_32F, ksize=1)
    across, down = (cv2.Sobel(grey, cv2.CV_32F, *step, ksize=1, scale=0.5) for step in ((1, 0), (0, 1)))
    height, width = grey.shape
    tiles = (min(_TILES, width), min(_TILES, height))
    fine, coarse = (
        cv2.resize(energy, tiles, interpolation=cv2.INTER_AREA) for energy in (laplacian**2, across**2 + down**2)
    )
    return {"clarity": float((fine / (coarse + _FLOOR)).max())}


def admit(values: Values, params: Params) -> Rejection | None:
    clarity = number(values, "clarity")
    if clarity < params.min_clarity:
        return Rejection(reason="blurred", detail=f"clarity {clarity:.2f} < min_clarity={params.min_clarity:g}")
    return None


FILTER = Filter(params=Params, stage=2, looks_at="pixels", scores=("clarity",), score=score, admit=admit)
