"""The degradation guard: has training made the model worse than it was, at any resolution?

Place in the flow: the trainer hands it every evaluation; it compares each class, trained or not, with the starting
model's loss on the same frozen samples, noise and sigmas, counts the evaluations in a row that were worse than
`evaluate.guard_tolerance` allows, and warns or asks for a stop after `evaluate.guard_patience` of them. Its counts are
part of every checkpoint. A run that it stopped does not go on by itself: the same command says so again, and
`evaluate.guard=warn` overrules it. Refuses to judge a class whose starting loss is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwenimg_dist.config import EvaluateConfig

_WAY_OUT = (
    "Lower optim.lr or raise the share of the data that got worse (curriculum.phases.*.resolutions); `ckpt list` shows "
    "the checkpoints from before, `ckpt export` exports one. evaluate.guard=warn goes on as it is"
)


class Guard:
    """Counts per resolution class; the same on every rank, since losses are all-reduced."""

    def __init__(self, config: EvaluateConfig, start: Mapping[int, float], state: Mapping[str, Any] | None) -> None:
        """`start`: class -> the starting model's loss. `state` is what a checkpoint kept."""
        self._config = config
        self._start = start
        kept = state or {}
        self._step = int(kept.get("step", 0))
        self._words: Mapping[int, str] = {}
        self._now = {int(r): float(loss) for r, loss in kept.get("losses", {}).items() if int(r) in start}
        # Tolerance and patience may have been changed since: a class within the new tolerance begins at nought.
        self._counts = {r: int(kept["counts"][str(r)]) if self._worse(r) else 0 for r in self._now}

    @property
    def verdict(self) -> str:
        """Why the run must stop; empty as long as it may go on."""
        return f"{self._told()}. {_WAY_OUT}" if self._config.guard == "stop" and self._over() else ""

    def look(self, step: int, losses: Mapping[int, float], words: Mapping[int, str]) -> str:
        """Take in an evaluation; returns a warning, or nothing. `words` says of a class whether it is trained."""
        if self._config.guard == "off":
            return ""
        self._step = step
        self._words = words
        self._now = {r: loss for r, loss in losses.items() if r in self._start}
        self._counts = {r: self._counts.get(r, 0) + 1 if self._worse(r) else 0 for r in self._now}
        return self._told() if self._over() and self._config.guard == "warn" else ""

    def metrics(self) -> dict[str, float]:
        """`eval/guard`: the largest number of evaluations in a row that were worse, over the classes."""
        if self._config.guard == "off" or not self._counts:
            return {}
        return {"eval/guard": max(self._counts.values())}

    def state(self) -> dict[str, Any]:
        """For the checkpoint; JSON."""
        return {
            "step": self._step,
            # As text: JSON has no NaN, and a loss that is not finite is what must not be forgotten.
            "losses": {str(r): repr(loss) for r, loss in self._now.items()},
            "counts": {str(r): count for r, count in self._counts.items()},
        }

    def _worse(self, resolution: int) -> bool:
        # Written so that a NaN is worse than anything.
        return not self._now[resolution] <= self._start[resolution] * (1 + self._config.guard_tolerance)

    def _over(self) -> list[int]:
        return [r for r, count in sorted(self._counts.items()) if count >= self._config.guard_patience]

    def _told(self) -> str:
        config = self._config
        classes = "; ".join(
            f"{r} px {self._now[r]:.4f} against {self._start[r]:.4f} ({self._now[r] / self._start[r] - 1:+.1%}"
            + (f", {self._words[r]})" if r in self._words else ")")
            for r in self._over()
        )
        return (
            f"degradation at step {self._step}: the held-out loss is above the starting model's by more than "
            f"evaluate.guard_tolerance={config.guard_tolerance:g} in {config.guard_patience} evaluations in a row or "
            f"more: {classes}"
        )
