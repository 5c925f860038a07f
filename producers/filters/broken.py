"""Rejects what decodes, but not as one still picture: animations and multi-page files.

A file that does not decode at all is a fault whatever is configured, since there is nothing to encode; `load.py` names
it. With `max_frames` raised, the first frame is taken.
"""

from __future__ import annotations

from pydantic import PositiveInt

from producers.filters.base import Facts, Filter, FilterParams, Rejection, Value, Values, number


class Params(FilterParams):
    max_frames: PositiveInt = 1


def score(facts: Facts) -> dict[str, Value]:
    assert facts.num_frames is not None  # asked after the decode
    return {"frames": float(facts.num_frames)}


def admit(values: Values, params: Params) -> Rejection | None:
    if number(values, "frames") > params.max_frames:
        return Rejection(
            reason="animated", detail=f"{number(values, 'frames'):.0f} frames > max_frames={params.max_frames}"
        )
    return None


FILTER = Filter(params=Params, stage=1, looks_at="pixels", scores=("frames",), score=score, admit=admit)
