"""Rejects pictures that are all noise, or nearly all flat. Scores, both shares in [0, 1]:

`complexity`: pixels whose local binary pattern is not uniform, that is, where "brighter than me by over 8 levels"
changes more than twice on the way around the eight neighbours (Ojala 2002, IEEE PAMI 24(7)). Edges, corners and spots
are uniform; noise is not. Photographs have 0 to 0.17, close grass 0.23, noise of 20 levels on top 0.31 to 0.4.
`flatness`: blocks of 8 x 8 px whose grey levels deviate by less than 2.
"""

from __future__ import annotations

from typing import Final

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field

from producers.filters.base import Facts, Filter, FilterParams, Rejection, Value, Values, number

_STEP: Final = 8
_BLOCK: Final = 8
_FLAT: Final = 2.0
_AROUND: Final = ((0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0))
# Pattern -> 1 where its circle of bits changes more than twice.
_IS_COMPLEX: Final = np.array(
    [(bits ^ (bits >> 1 | (bits & 1) << 7)).bit_count() > 2 for bits in range(256)], dtype=np.uint8
)


class Params(FilterParams):
    max_complexity: float = Field(default=0.3, ge=0.0, le=1.0)
    max_flatness: float = Field(default=0.97, ge=0.0, le=1.0)


def score(facts: Facts) -> dict[str, Value]:
    return {"complexity": _complexity(facts.grey), "flatness": _flatness(facts.grey)}


def _complexity(grey: npt.NDArray[np.uint8]) -> float:
    height, width = grey.shape
    padded = cv2.copyMakeBorder(grey, 1, 1, 1, 1, cv2.BORDER_REPLICATE)
    bar = cv2.add(grey, np.full(grey.shape, _STEP, dtype=np.uint8))  # saturates: nothing is brighter than white
    pattern = np.zeros_like(grey)
    for bit, (down, right) in enumerate(_AROUND):
        brighter = padded[down : down + height, right : right + width] > bar
        pattern |= brighter.view(np.uint8) << bit
    return float(cv2.LUT(pattern, _IS_COMPLEX).mean())


def _flatness(grey: npt.NDArray[np.uint8]) -> float:
    rows, columns = max(1, grey.shape[0] // _BLOCK), max(1, grey.shape[1] // _BLOCK)
    whole = grey[: rows * _BLOCK, : columns * _BLOCK].astype(np.float32)
    mean, mean_square = (cv2.resize(one, (columns, rows), interpolation=cv2.INTER_AREA) for one in (whole, whole**2))
    return float((mean_square - mean**2 < _FLAT**2).mean())


def admit(values: Values, params: Params) -> Rejection | None:
    complexity, flatness = number(values, "complexity"), number(values, "flatness")
    if complexity > params.max_complexity:
        detail = f"complexity {complexity:.2f} > max_complexity={params.max_complexity:g}"
        return Rejection(reason="noisy", detail=detail)
    if flatness > params.max_flatness:
        detail = f"flatness {flatness:.3f} > max_flatness={params.max_flatness:g}"
        return Rejection(reason="flat", detail=detail)
    return None


FILTER = Filter(params=Params, stage=2, looks_at="pixels", scores=("complexity", "flatness"), score=score, admit=admit)
