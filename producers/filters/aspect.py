"""Rejects strips: pictures so long that any bucket would cut most of them away. The score is width / height."""

from __future__ import annotations

from pydantic import Field

from producers.filters.base import Facts, Filter, FilterParams, Rejection, Value, Values, number


class Params(FilterParams):
    max_ratio: float = Field(default=3.0, ge=1.0)
    """Long side / short side."""


def score(facts: Facts) -> dict[str, Value]:
    return {"aspect": facts.width / facts.height}


def admit(values: Values, params: Params) -> Rejection | None:
    ratio = max(number(values, "aspect"), 1.0 / number(values, "aspect"))
    if ratio > params.max_ratio:
        return Rejection(reason="extreme_aspect", detail=f"{ratio:.2f}:1 > max_ratio={params.max_ratio:g}")
    return None


FILTER = Filter(params=Params, stage=1, looks_at="header", scores=("aspect",), score=score, admit=admit)
