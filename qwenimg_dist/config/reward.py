"""How pictures are judged, by GRPO, `eval` and `pairs`: which rewards, their weights, and what a call may take.

Each reward's own settings are validated by its file in `qwenimg_dist/rewards`; its defaults and its weight of 0 stand
in `conf/reward/NAME.yaml`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from qwenimg_dist.config.section import Section


class RewardConfig(Section):
    """Rewards as a weighted sum."""

    weights: dict[str, float] = Field(default_factory=dict)
    """Reward -> its weight in the sum; 0 is off and loads nothing. A weight counts in the reward's own unit: `ocr` and
    `shapes` run from 0 to 1, cosines of `clip` vary by some 0.05, `pickscore` by 1 or 2."""
    settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Reward -> its own settings, such as `reward.settings.ocr.read_side=768`."""
    timeout_s: PositiveFloat = 120.0
    """How long one reward may take for one of its batches. What takes longer is ended with its process, counted, and
    NaN; after two such batches the reward is given up for the rest of that call. Too short a time loses good pictures
    on a busy machine, a long one is what a hung reward costs each time."""
    start_timeout_s: PositiveFloat = 600.0
    """How long the rewards' process may take to load its models, at the start and after it had to be ended."""
    num_threads: PositiveInt = 1
    """CPU threads of the rewards' process. There is one such process per rank or actor, and its threads are taken from
    what else works there."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where models such as `clip` and `pickscore` run. On a rank's GPU they need 2 to 4 GB beside the training, which
    `plan` counts."""

    @field_validator("weights")
    @classmethod
    def _finite(cls, weights: dict[str, float]) -> dict[str, float]:
        for name, weight in weights.items():
            if not math.isfinite(weight):
                raise ValueError(f"the weight of {name} is {weight}: give a finite number, 0 turns it off")
        return weights

    @property
    def active(self) -> dict[str, float]:
        """Weights of the rewards that are in use."""
        return {name: weight for name, weight in sorted(self.weights.items()) if weight}
