"""Rejects pictures by the EXIF orientation of their file; the score is that orientation, 1 to 8.

The report's stage 2 drops what EXIF calls turned or mirrored. Here every picture is turned upright at the decode, so
all orientations are admitted unless told otherwise: for sources whose tags lie (rewritten by tools that had turned the
pixels already), take `[1]`. Numbers as in Exif 2.3, tag 0x0112: 1 upright, 3 upside down, 6 and 8 sideways, the others
mirrored besides.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from producers.filters.base import Facts, Filter, FilterParams, Rejection, Value, Values, number

Orientation = Annotated[int, Field(ge=1, le=8)]


class Params(FilterParams):
    allowed: tuple[Orientation, ...] = Field(default=(1, 2, 3, 4, 5, 6, 7, 8), min_length=1)
    """EXIF orientations that are admitted."""


def score(facts: Facts) -> dict[str, Value]:
    return {"orientation": float(facts.orientation)}


def admit(values: Values, params: Params) -> Rejection | None:
    orientation = int(number(values, "orientation"))
    if orientation not in params.allowed:
        return Rejection(
            reason="rotated", detail=f"EXIF orientation {orientation} is not in allowed={list(params.allowed)}"
        )
    return None


FILTER = Filter(params=Params, stage=2, looks_at="header", scores=("orientation",), score=score, admit=admit)
