"""Rejects pictures whose short side is too short, or that have more pixels than are worth decoding."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import PositiveInt

from producers.filters.base import Facts, Filter, FilterParams, Rejection


class Params(FilterParams):
    min_side: PositiveInt = 64
    """px, upright, before any resize."""
    max_pixels: PositiveInt = 178_956_970


def score(facts: Facts) -> dict[str, float]:
    return {"min_side": float(min(facts.width, facts.height)), "pixels": float(facts.width * facts.height)}


def admit(scores: Mapping[str, float], params: Params) -> Rejection | None:
    if scores["min_side"] < params.min_side:
        return Rejection(
            reason="too_small", detail=f"short side {scores['min_side']:.0f} px < min_side={params.min_side}"
        )
    if scores["pixels"] > params.max_pixels:
        return Rejection(
            reason="too_many_pixels", detail=f"{scores['pixels']:.0f} pixels > max_pixels={params.max_pixels}"
        )
    return None


FILTER = Filter(params=Params, scores=("min_side", "pixels"), score=score, admit=admit)
