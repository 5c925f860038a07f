"""Rejects files that hold next to nothing per pixel, before they are decoded: blank scans, and bombs that pass for
large pictures. Deflate packs blank RGB 1,000:1, to 0.03 bits per pixel; photographs pressed to quality 10 take 0.25 to
0.7 as JPEG, and the emptiest 0.035 as AVIF.
"""

from __future__ import annotations

from pydantic import NonNegativeFloat

from producers.filters.base import Facts, Filter, FilterParams, Rejection, Value, Values, number


class Params(FilterParams):
    min_bits: NonNegativeFloat = 0.03


def score(facts: Facts) -> dict[str, Value]:
    return {"bits_per_pixel": 8 * facts.num_bytes / (facts.width * facts.height)}


def admit(values: Values, params: Params) -> Rejection | None:
    bits = number(values, "bits_per_pixel")
    if bits < params.min_bits:
        return Rejection(reason="too_few_bits", detail=f"{bits:.3f} bits per pixel < min_bits={params.min_bits:g}")
    return None


FILTER = Filter(params=Params, stage=1, looks_at="header", scores=("bits_per_pixel",), score=score, admit=admit)
