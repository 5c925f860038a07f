"""Rejects pictures with next to nothing in them, by the Shannon entropy of their 256 grey levels, in bits (0 to 8).

`entropy` = -sum p log2 p over the histogram (Shannon 1948). A photograph has 4.5 and more; two flat colours have at
most 1. It does not look at where the grey levels are: `texture` does.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from producers.filters.base import Facts, Filter, FilterParams, Rejection, Value, Values, number


class Params(FilterParams):
    min_entropy: float = Field(default=3.0, ge=0.0, le=8.0)
    """Bits. For design work with few flat colours take 1."""


def score(facts: Facts) -> dict[str, Value]:
    counts = np.bincount(facts.grey.ravel(), minlength=256)
    shares = counts[counts > 0] / facts.grey.size
    return {"entropy": max(0.0, float(-(shares * np.log2(shares)).sum()))}


def admit(values: Values, params: Params) -> Rejection | None:
    entropy = number(values, "entropy")
    if entropy < params.min_entropy:
        return Rejection(reason="low_entropy", detail=f"{entropy:.2f} bits < min_entropy={params.min_entropy:g}")
    return None


FILTER = Filter(params=Params, stage=2, looks_at="pixels", scores=("entropy",), score=score, admit=admit)
