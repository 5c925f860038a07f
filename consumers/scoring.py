"""Asks for the rewards of this rank's pictures while it draws the next ones, and waits for them a bounded time.

Place in the flow: each rollout begins a `Judging`, hands over every micro-batch's pictures as they are drawn, and
collects what has come. The reward is called in a thread that may be left behind: what hangs in it, or raises, costs
the pictures their rewards and nothing else, so that the ranks meet in the next collective whatever happens on one of
them. A reward that did not come back is not asked again until it has. Deliberately left out: ending the thread, which
Python cannot; `rewards.service` puts a process between, which can be ended.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from qwenimg_dist.rewards.base import Prompt, Score, Scores, Values

_Job = tuple[Sequence[Image.Image], Sequence[Prompt]]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a rank knows of its n pictures, in the order in which they were handed over."""

    total: Values
    """(n,) NaN where there is no reward."""
    components: dict[str, Values]
    """Name -> (n,)"""
    failures: int
    """Rewards that were not given, of single components too."""
    timeouts: int
    """Rewards that did not come in time, as `failures`."""
    notes: tuple[str, ...]
    """For a person: what went wrong."""
    busy_s: float
    """Seconds in which the reward was at work."""


class Scorer:
    """The reward of one rank."""

    def __init__(self, score: Score, *, timeout_s: float) -> None:
        self._score = score
        self._timeout_s = timeout_s
        self._newest: Judging | None = None

    def begin(self) -> Judging:
        """A round begins."""
        stuck = self._newest is not None and self._newest.is_alive()
        judging = Judging(self._score, timeout_s=self._timeout_s, ask=not stuck)
        if not stuck:
            self._newest = judging
            judging.start()
        return judging


class Judging(threading.Thread):
    """One round's rewards. Made by `Scorer.begin`."""

    def __init__(self, score: Score, *, timeout_s: float, ask: bool) -> None:
        super().__init__(daemon=True, name="rewards")  # a process may end while one hangs
        self._score = score
        self._timeout_s = timeout_s
        self._ask = ask
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._sizes: list[int] = []
        self._answers: list[Scores | str] = []
        self._left = threading.Event()
        self._busy_s = 0.0

    def put(self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> None:
        """Hand over pictures; returns at once."""
        self._sizes.append(len(pictures))
        self._jobs.put((pictures, prompts))

    def collect(self) -> Judged:
        """All there is of the pictures handed over, after at most the time-out."""
        self._jobs.put(None)
        if self._ask:
            self.join(self._timeout_s)
            self._left.set()
        return self._combined(list(self._answers))

    def run(self) -> None:
        while (job := self._jobs.get()) is not None and not self._left.is_set():
            begin = time.perf_counter()
            try:
                scores = self._score(*job)
                if scores.total.shape != (len(job[0]),):
                    raise ValueError(f"{scores.total.shape} rewards for {len(job[0])} pictures")
                answer: Scores | str = scores
            except Exception as error:  # whatever an injected reward raises must not end the rank
                answer = f"{type(error).__name__}: {error}"
            self._busy_s += time.perf_counter() - begin
            self._answers.append(answer)

    def _combined(self, answers: Sequence[Scores | str]) -> Judged:
        scores = [answer for answer in answers if isinstance(answer, Scores)]
        names = sorted({name for one in scores for name in one.components})
        parts: dict[str, list[Values]] = {name: [] for name in ("", *names)}
        failures = timeouts = 0
        for index, size in enumerate(self._sizes):
            answer = answers[index] if index < len(answers) else None
            if isinstance(answer, Scores):
                failures += sum(answer.failures.values())
                timeouts += sum(answer.timeouts.values())
            elif answer is None:
                timeouts += size
            else:
                failures += size
            nothing = np.full(size, np.nan)
            for name, part in parts.items():
                if not isinstance(answer, Scores):
                    part.append(nothing)
                else:
                    part.append(answer.components.get(name, nothing) if name else answer.total)
        joined = {name: np.concatenate([np.zeros(0), *part]) for name, part in parts.items()}
        total = np.where(np.isfinite(joined[""]), joined[""], np.nan)
        notes = [answer if isinstance(answer, str) else note for answer in answers for note in _notes(answer)]
        if len(answers) < len(self._sizes):
            why = f"no answer within objective.reward_timeout_s={self._timeout_s:g}"
            notes.append(why if self._ask else "the reward has not come back from an earlier step, and was not asked")
        return Judged(
            total=total,
            components={name: joined[name] for name in names},
            failures=failures,
            timeouts=timeouts,
            notes=tuple(dict.fromkeys(notes)),
            busy_s=self._busy_s,
        )


def _notes(answer: Scores | str) -> Sequence[str]:
    return answer.notes if isinstance(answer, Scores) else [answer]
