"""What one file of this package says about its reward, and how `REWARDS` is told of it.

Place in the flow: `rewards/__init__.py` validates the settings and loads what has a weight. Loading happens where
pictures are judged (a process of its own, or an actor); checking happens before, where the command was given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, TypeVar

from PIL import Image
from pydantic import PositiveInt

from qwenimg_dist.config import Section
from qwenimg_dist.rewards.base import Prompt

Judge = Callable[[Sequence[Image.Image], Sequence[Prompt]], list[float]]
"""RGB pictures and their prompts -> one number each; NaN where it cannot be judged."""


LOCATION: Final = ("path", "revision")
"""Settings that say where a reward's model lies."""


class RewardParams(Section):
    """Settings that every reward has."""

    batch_size: PositiveInt = 1
    """Pictures per call. A call that times out loses all of them, so rewards that gain nothing by batches take one."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a reward may use where it is loaded."""

    device: str
    """A torch device."""
    num_threads: int


Params = TypeVar("Params", bound=RewardParams)


def _usable(params: RewardParams) -> None:
    return None


def _judges_all(prompt: Prompt, params: RewardParams) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Kind(Generic[Params]):
    """One entry of `REWARDS`."""

    params: type[Params]
    load: Callable[[Params, Resources], Judge]
    """Raises ValueError for what the user can mend."""
    check: Callable[[Params], None] = _usable
    """Raises ValueError if something is missing; quick, loads nothing."""
    model: Callable[[Params], Path] | None = None
    """Folder of the model that judges, where there is one. Scores are then told apart by its fingerprint, and not by
    `LOCATION`."""
    device_bytes: float = 0.0
    """What the model that it names by default takes of a GPU with `reward.device=cuda`, for `plan`."""
    refuse: Callable[[Prompt, Params], str | None] = _judges_all
    """Why no picture of this prompt could be judged; None for a prompt that is right."""
