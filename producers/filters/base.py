"""The protocol of a filter: scores are data, thresholds are config.

Place in the flow: `score` runs once per row and its numbers stay in the index for good; `admit` compares numbers with
thresholds, so a changed threshold needs no picture. Filters with `needs_pixels` are asked after the decode. Refuses
parameters that the filter's model does not name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from PIL import Image
from pydantic import BaseModel, ConfigDict


class FilterParams(BaseModel):
    """Base of each filter's parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool = True
    """Off, the filter neither scores nor rejects; scores from before stay in the index."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a filter may look at. Sides are upright, px."""

    num_bytes: int
    width: int
    height: int
    num_frames: int | None = None
    """None before the decode."""
    image: Image.Image | None = None
    """Upright sRGB picture; None before the decode."""


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """`reason` is a code to count by; `detail` says which number met which threshold."""

    reason: str
    detail: str


P = TypeVar("P", bound=FilterParams)


@dataclass(frozen=True, kw_only=True)
class Filter(Generic[P]):
    """One filter."""

    params: type[P]
    scores: tuple[str, ...]
    """What `score` returns; unique over all filters, column `score_<name>` of the index."""
    score: Callable[[Facts], dict[str, float]]
    admit: Callable[[Mapping[str, float], P], Rejection | None]
    needs_pixels: bool = False


@dataclass(frozen=True, kw_only=True)
class BoundFilter:
    """A filter with its validated parameters."""

    name: str
    filter: Filter[Any]
    params: FilterParams

    def score(self, facts: Facts) -> dict[str, float]:
        return self.filter.score(facts)

    def admit(self, scores: Mapping[str, float]) -> Rejection | None:
        return self.filter.admit(scores, self.params)
