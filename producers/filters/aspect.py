"""Rejects strips: pictures so long that any bucket would cut most of them away. The score is width / height."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from producers.filters.base import Facts, Filter, FilterParams, Rejection


class Params(FilterParams):
    max_ratio: float = Field(default=3.0, ge=1.0)
    """Long side / short side."""


def score(facts: Facts) -> dict[str, float]:
    return {"aspect": facts.width / facts.height}


def admit(scores: Mapping[str, float], params: Params) -> Rejection | None:
    ratio = max(scores["aspect"], 1.0 / scores["aspect"])
    if ratio > params.max_ratio:
        return Rejection(reason="extreme_aspect", detail=f"{ratio:.2f}:1 > max_ratio={params.max_ratio:g}")
    return None


FILTER = Filter(params=Params, scores=("aspect",), score=score, admit=admit)
