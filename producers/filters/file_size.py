"""Rejects files that are too small to be a photo or too large to be worth it, by their bytes."""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveInt

from producers.filters.base import Facts, Filter, FilterParams, Rejection, Value, Values, number


class Params(FilterParams):
    min_bytes: NonNegativeInt = 256
    max_bytes: PositiveInt = 256 * 1024**2


def score(facts: Facts) -> dict[str, Value]:
    return {"bytes": float(facts.num_bytes)}


def admit(values: Values, params: Params) -> Rejection | None:
    size = number(values, "bytes")
    if size < params.min_bytes:
        return Rejection(reason="file_too_small", detail=f"{size:.0f} bytes < min_bytes={params.min_bytes}")
    if size > params.max_bytes:
        return Rejection(reason="file_too_large", detail=f"{size:.0f} bytes > max_bytes={params.max_bytes}")
    return None


FILTER = Filter(params=Params, stage=1, looks_at="header", scores=("bytes",), score=score, admit=admit)
