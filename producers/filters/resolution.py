"""Rejects pictures whose short side is too short, or that have more pixels than are worth decoding."""

from __future__ import annotations

from pydantic import PositiveInt

from producers.filters.base import Facts, Filter, FilterParams, Rejection, Value, Values, number


class Params(FilterParams):
    min_side: PositiveInt = 64
    """px, upright, before any resize."""
    max_pixels: PositiveInt = 178_956_970


def score(facts: Facts) -> dict[str, Value]:
    return {"min_side": float(min(facts.width, facts.height)), "pixels": float(facts.width * facts.height)}


def admit(values: Values, params: Params) -> Rejection | None:
    if number(values, "min_side") < params.min_side:
        return Rejection(
            reason="too_small", detail=f"short side {number(values, 'min_side'):.0f} px < min_side={params.min_side}"
        )
    if number(values, "pixels") > params.max_pixels:
        return Rejection(
            reason="too_many_pixels", detail=f"{number(values, 'pixels'):.0f} pixels > max_pixels={params.max_pixels}"
        )
    return None


FILTER = Filter(params=Params, stage=1, looks_at="header", scores=("min_side", "pixels"), score=score, admit=admit)
