"""The protocol of a filter: scores and labels are data, thresholds are config.

Place in the flow: a filter scores each row once, and its numbers and labels stay in the index for good; `admit`
compares them with thresholds, so a changed threshold needs no picture. What a filter looks at decides when it is
asked: `header` and `captions` before the decode; `pixels` after it; those with a model (`load`) last, in batches, and
only for rows that all filters before them admit. A filter that is asked `per_caption` takes captions away, and rejects
a row only when none is left. Refuses parameters that the filter's model does not name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Generic, Literal, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ConfigDict

from producers.halving import halving
from qwenimg_dist.config import stable_hash

Value = float | str
"""A score is a number, a label a word."""
Values = Mapping[str, Value]

PREVIEW_SIDE: Final = 512


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
    orientation: int = 1
    """EXIF orientation of the file, 1 to 8; `image` is upright already."""
    captions: tuple[str, ...] = ()
    num_frames: int | None = None
    """None before the decode."""
    image: Image.Image | None = None
    """Upright sRGB picture; None before the decode."""
    shared: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """What filters with the same model have made of the picture; gone with it."""

    @cached_property
    def preview(self) -> npt.NDArray[np.uint8]:
        """(h, w, 3) sRGB, long side at most 512 px: what classical operators measure, made once for all of them."""
        assert self.image is not None  # asked after the decode
        small, longest = self.image, max(self.image.size)
        if longest > PREVIEW_SIDE:
            width, height = (max(1, round(side * PREVIEW_SIDE / longest)) for side in small.size)
            small = small.resize((width, height), Image.Resampling.BOX, reducing_gap=1.0)
        return np.asarray(small, dtype=np.uint8)

    @cached_property
    def grey(self) -> npt.NDArray[np.uint8]:
        """(h, w) Rec. 601 luma of the preview."""
        return np.asarray(cv2.cvtColor(self.preview, cv2.COLOR_RGB2GRAY), dtype=np.uint8)


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """`reason` is a code to count by; `detail` says which number met which threshold."""

    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a filter with a model may load from and compute on."""

    pipeline_dir: Path
    device: Literal["cpu", "cuda"]
    num_threads: int = 1
    """Of the worker; torch knows it already."""


Scorer = Callable[[Sequence[Facts]], list[dict[str, Value]]]
"""A loaded model: a batch of facts -> scores and labels of each."""

P = TypeVar("P", bound=FilterParams)


@dataclass(frozen=True, kw_only=True)
class Filter(Generic[P]):
    """One filter. It has either `score` or `load`."""

    params: type[P]
    stage: int
    """Of the report's seven stages; the funnel counts by it."""
    looks_at: Literal["header", "captions", "pixels"]
    scores: tuple[str, ...]
    """Numbers that scoring gives; unique over all filters, column `score_<name>` of the index."""
    labels: tuple[str, ...] = ()
    """Words that it gives; column `label_<name>`."""
    score: Callable[[Facts], dict[str, Value]] | None = None
    load: Callable[[P, Resources], Scorer] | None = None
    """Load the model (once per worker) and return what scores with it."""
    check: Callable[[P], None] | None = None
    """Whether the model can be had, asked before any work. Raises ValueError saying what is missing and the way out."""
    per_caption: bool = False
    """With `looks_at="captions"`: asked for each caption alone (`Facts.captions` has one). What it does not admit is
    left out of training; the row keeps the values of the first caption that is left."""
    reads_captions: bool = False
    """With `looks_at="pixels"`: the scores depend on the captions too, and are made again for rows whose captions
    changed or are no longer the same ones left by the caption filters."""
    scored_by: tuple[str, ...] = ()
    """Parameters that change scores, a model's path for example: rows scored with others are scored again."""
    version: int = 1
    """Raise it when the same picture would be scored otherwise for another reason."""
    admit: Callable[[Values, P], Rejection | None]

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.scores, *self.labels)


@dataclass(frozen=True, kw_only=True)
class BoundFilter:
    """A filter with its validated parameters."""

    name: str
    filter: Filter[Any]
    params: FilterParams

    @property
    def fingerprint(self) -> str:
        """Of what makes the scores; recorded with them."""
        given = json.loads(self.params.model_dump_json(include=set(self.filter.scored_by)))
        return stable_hash([self.filter.version, given], digits=8)

    def check(self) -> None:
        """Raises ValueError naming the filter if its model cannot be had."""
        if self.filter.check is not None:
            with self._named():
                self.filter.check(self.params)

    def load(self, resources: Resources) -> Scorer:
        """Load the model. Raises ValueError naming the filter."""
        assert self.filter.load is not None
        with self._named():
            return self.filter.load(self.params, resources)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(f"filters.{self.name}: {error}; or set filters.{self.name}.enabled=false") from error

    def scored(self, values: Values) -> bool:
        """Whether the row has all of this filter's scores and labels."""
        return all(name in values for name in self.filter.names)

    def score(self, facts: Facts) -> dict[str, Value]:
        assert self.filter.score is not None  # filters with a model are scored in batches
        return self.filter.score(facts)

    def admit(self, values: Values) -> Rejection | None:
        return self.filter.admit(values, self.params)


def fingerprint_of(filters: Sequence[BoundFilter]) -> str:
    """Of all that these filters' verdicts depend on: their versions and thresholds."""
    given = {one.name: [one.filter.version, json.loads(one.params.model_dump_json())] for one in filters}
    return stable_hash({"filters": given}, digits=8)


class Scorers:
    """The filters' models of one worker, loaded at the first row that needs them."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._loaded: dict[tuple[str, str], Scorer] = {}

    def load(self, filters: Sequence[BoundFilter]) -> None:
        """Load the models of these filters, where they are not."""
        for one in filters:
            made_by = (one.name, one.fingerprint)
            if made_by not in self._loaded:
                self._loaded[made_by] = one.load(self._resources)

    def score(self, one: BoundFilter, facts: Sequence[Facts]) -> list[dict[str, Value]]:
        """Scores and labels of each, by the filter's model."""
        self.load([one])
        return halving(self._loaded[one.name, one.fingerprint], facts)


def number(values: Values, name: str) -> float:
    """A score as the number it is."""
    value = values[name]
    assert isinstance(value, float | int)
    return float(value)
