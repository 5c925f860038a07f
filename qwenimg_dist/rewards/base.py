"""What a reward is, and how several become one number per picture without ever ending the training that asked.

    prompts + pictures -> each reward, in its batches -> components (n,) -> weighted sum `total` (n,)

Place in the flow: GRPO, `eval` and `pairs` hold a `Score` (`WeightedRewards.score`, `RewardService.score`, or what a
command injected) and see `Scores` only. What one reward cannot say about one picture is NaN there, in its component and
in the total, and counted; the other pictures keep theirs. Refuses misconfiguration, when it is built: a call that has
begun raises nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

Values = npt.NDArray[np.float64]

MAX_LOST: Final = 2
"""So many batches of one call may be lost to time-outs or dead processes; then this reward is given up for the call:
a reward that always hangs costs two time-outs, not one for every picture."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a picture was asked to show."""

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What came with the prompt: plain JSON, of which a reward reads the keys that it knows."""


class Reward(Protocol):
    """Judges pictures. One file of this package each."""

    @property
    def name(self) -> str:
        """Its key in `REWARDS`, in the config's weights and in `Scores.components`."""
        ...

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[float]:
        """One number per picture, more is better; NaN where it cannot be judged. The same for the same input."""
        ...


class RewardLost(Exception):
    """A reward's process gave no answer for a batch: asking again for its pictures one by one is of no use."""

    def __init__(self, message: str, *, timed_out: bool) -> None:
        super().__init__(message)
        self.timed_out = timed_out


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of n pictures, in the order in which they were given."""

    components: dict[str, Values]
    """Name -> (n,) float64, without its weight; NaN where the reward could not judge. Only rewards with a weight."""
    total: Values
    """(n,) float64: sum of weight times component; NaN where any of these is."""
    failures: dict[str, int]
    """Name -> pictures that are NaN, for whatever reason but a time-out."""
    timeouts: dict[str, int]
    """Name -> pictures that are NaN since the reward did not answer in time."""
    notes: tuple[str, ...] = ()
    """A sentence for each kind of trouble, for a person; few."""

    @property
    def num_failed(self) -> int:
        """Pictures without a total."""
        return int(np.isnan(self.total).sum())


Score = Callable[[Sequence[Image.Image], Sequence[Prompt]], Scores]
"""What consumers hold (`Hooks.score`): never raises for what pictures and prompts are, answers in bounded time."""


class WeightedRewards:
    """Several rewards, here. A reward that hangs, hangs this: `RewardService` puts a process between."""

    def __init__(
        self,
        rewards: Sequence[Reward],
        weights: Mapping[str, float],
        *,
        batch_sizes: Mapping[str, int] | None = None,
    ) -> None:
        """Raises ValueError if rewards and weights do not belong together, or there are none."""
        by_name = {reward.name: reward for reward in rewards}
        wrong = by_name.keys() ^ weights.keys()
        if wrong or not weights or not all(math.isfinite(weight) and weight for weight in weights.values()):
            raise ValueError(
                f"rewards {', '.join(by_name) or 'none'} with weights {dict(weights)}: each needs one that is not 0"
            )
        self._rewards = {name: by_name[name] for name in sorted(weights)}  # one order, so that sums round alike
        self._weights = dict(weights)
        self._batch_sizes = dict(batch_sizes or {})

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._rewards)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """See `Scores`. Raises ValueError only where pictures and prompts are not equally many: a bug of the caller."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures for {len(prompts)} prompts")
        asked = {
            name: _ask(reward, images, prompts, self._batch_sizes.get(name, len(images) or 1))
            for name, reward in self._rewards.items()
        }
        return combine(
            {name: one.values for name, one in asked.items()},
            self._weights,
            timeouts={name: one.num_timeouts for name, one in asked.items()},
            notes=[f"{name}: {note}" for name, one in asked.items() for note in one.notes],
        )


def combine(
    components: Mapping[str, Values],
    weights: Mapping[str, float],
    *,
    timeouts: Mapping[str, int],
    notes: Sequence[str] = (),
) -> Scores:
    """The weighted sum and the counts; what is not finite is NaN."""
    clean = {name: np.where(np.isfinite(values), values, np.nan) for name, values in components.items()}
    total = np.zeros_like(next(iter(clean.values())))
    for name, values in clean.items():
        total = total + weights[name] * values
    return Scores(
        components=clean,
        total=total,
        failures={name: int(np.isnan(values).sum()) - timeouts.get(name, 0) for name, values in clean.items()},
        timeouts={name: timeouts.get(name, 0) for name in clean},
        notes=tuple(notes),
    )


def join(parts: Sequence[Scores]) -> Scores:
    """Scores of pictures that were judged in several calls with the same rewards, in order."""
    names = list(parts[0].components)
    return Scores(
        components={name: np.concatenate([part.components[name] for part in parts]) for name in names},
        total=np.concatenate([part.total for part in parts]),
        failures={name: sum(part.failures[name] for part in parts) for name in names},
        timeouts={name: sum(part.timeouts[name] for part in parts) for name in names},
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


def none_judged(names: Sequence[str], num_pictures: int, *, timed_out: bool, note: str) -> Scores:
    """Of pictures that nobody judged."""
    counts = dict.fromkeys(names, num_pictures)
    return Scores(
        components={name: np.full(num_pictures, np.nan) for name in names},
        total=np.full(num_pictures, np.nan),
        failures=dict.fromkeys(names, 0) if timed_out else counts,
        timeouts=counts if timed_out else dict.fromkeys(names, 0),
        notes=(note,) if note else (),
    )


@dataclass
class _Asked:
    """One reward's answers while they come in."""

    values: Values
    num_timeouts: int = 0
    losses: list[RewardLost] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def given_up(self) -> bool:
        return len(self.losses) >= MAX_LOST

    def note(self, text: str) -> None:
        if text not in self.notes and len(self.notes) < 3:
            self.notes.append(text)

    def lose(self, num_pictures: int, lost: RewardLost) -> None:
        self.num_timeouts += num_pictures if lost.timed_out else 0
        self.note(str(lost))


def _ask(reward: Reward, images: Sequence[Image.Image], prompts: Sequence[Prompt], batch_size: int) -> _Asked:
    asked = _Asked(np.full(len(images), np.nan))
    for start in range(0, len(images), batch_size):
        _ask_batch(reward, images, prompts, range(start, min(start + batch_size, len(images))), asked)
    return asked


def _ask_batch(
    reward: Reward, images: Sequence[Image.Image], prompts: Sequence[Prompt], batch: range, asked: _Asked
) -> None:
    """Fill in `asked.values` of the batch. Where the whole batch fails, one by one: a single picture that a reward
    cannot bear must not cost the others theirs."""
    if asked.given_up:
        asked.lose(len(batch), asked.losses[-1])
        return
    try:
        values = np.asarray(reward([images[i] for i in batch], [prompts[i] for i in batch]), dtype=np.float64)
        if values.shape != (len(batch),):
            raise ValueError(f"gave numbers of shape {values.shape} for {len(batch)} pictures")
        asked.values[batch.start : batch.stop] = values
        if not np.isfinite(values).all():
            asked.note("some pictures could not be judged")
    except RewardLost as lost:
        asked.losses.append(lost)
        asked.lose(len(batch), lost)
    except Exception as error:  # a reward is a plug-in: nothing that it raises may end a training
        if len(batch) == 1:
            asked.note(f"{type(error).__name__}: {error}")
            return
        for i in batch:
            _ask_batch(reward, images, prompts, range(i, i + 1), asked)
