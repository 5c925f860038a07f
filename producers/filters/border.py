"""Rejects letterboxes, pillarboxes and frames: plain bars that end in one straight line. The score is their `border`.

`border` is the share of the picture that such bars take. A bar is a run of rows (or columns) from the edge that are
all of one colour, and it counts only where over 60 % of the next rows differ from it: so a thing on white paper, a
page of text or a clear sky has none. Not seen: blurred or patterned bars, black bars beside a mostly black scene, and
margins wider than a fifth of a side all round.
"""

from __future__ import annotations

from typing import Final

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field

from producers.filters.base import Facts, Filter, FilterParams, Rejection, Value, Values, number

_TOLERANCE: Final = 12
"""Levels per channel around the bar's colour: what JPEG does to it."""
_JUMP: Final = 24
"""Levels by which the picture must differ: a smooth sky leaves the tolerance too, but slowly."""
_PLAIN: Final = 0.95
_ENDED: Final = 0.4
_EDGE_ROWS: Final = 6
"""Within these the bar must be over, from plain to picture; JPEG and the preview smear the line."""


class Params(FilterParams):
    max_border: float = Field(default=0.04, ge=0.0, le=1.0)
    """Share of the picture's area."""


def score(facts: Facts) -> dict[str, Value]:
    picture = facts.preview
    height, width = picture.shape[:2]
    rows = sum(_bar(picture, axis=0, last=last) for last in (False, True))
    columns = sum(_bar(picture, axis=1, last=last) for last in (False, True))
    return {"border": 1.0 - max(0, height - rows) * max(0, width - columns) / (height * width)}


def _bar(picture: npt.NDArray[np.uint8], *, axis: int, last: bool) -> int:
    """Width of the bar at the first or last row (axis 0) or column (axis 1), px; 0 where there is none."""
    edge = np.take(picture, [-1] if last else [0], axis=axis)
    colour = np.median(edge, axis=(0, 1))
    if _share_near(edge, colour, _TOLERANCE, axis)[0] < _PLAIN:  # as in most photographs: no need to look further
        return 0
    plain, similar = (_share_near(picture, colour, levels, axis) for levels in (_TOLERANCE, _JUMP))
    if last:
        plain, similar = plain[::-1], similar[::-1]
    ended = np.flatnonzero(similar < _ENDED)
    if len(ended) == 0 or ended[0] == 0:
        return 0
    width = int(ended[0])
    return width if plain[: max(1, width - _EDGE_ROWS)].min() >= _PLAIN else 0


def _share_near(
    picture: npt.NDArray[np.uint8], colour: npt.NDArray[np.float64], levels: int, axis: int
) -> npt.NDArray[np.float32]:
    """Share of each row (axis 0) or column (axis 1) that is within `levels` of the colour in every channel."""
    near = cv2.inRange(picture, colour - levels, colour + levels)  # 255 where it is
    return np.asarray(cv2.reduce(near, 1 - axis, cv2.REDUCE_AVG, dtype=cv2.CV_32F).ravel() / 255.0, dtype=np.float32)


def admit(values: Values, params: Params) -> Rejection | None:
    border = number(values, "border")
    if border > params.max_border:
        return Rejection(
            reason="border", detail=f"{border:.1%} of the picture is border > max_border={params.max_border:g}"
        )
    return None


FILTER = Filter(params=Params, stage=5, looks_at="pixels", scores=("border",), score=score, admit=admit)
