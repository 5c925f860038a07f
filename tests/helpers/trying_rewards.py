"""Rewards that do what a prompt's text says: for tests of what stands between rewards and training."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from qwenimg_dist.config import RewardConfig
from qwenimg_dist.rewards.base import Prompt
from qwenimg_dist.rewards.kind import Resources

LOAD = "trying_rewards:load"


class Bright:
    """Mean grey, 0 to 1."""

    name = "bright"

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[float]:
        return [float(np.asarray(image, dtype=np.float64).mean() / 255) for image in images]


class Trying:
    """1, unless the prompt says otherwise. A prompt with `once` in its metadata, a file, does so only the first time;
    `only` says for which reward it is meant."""

    def __init__(self, name: str = "trying") -> None:
        self.name = name

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[float]:
        return [self._one(prompt) for prompt in prompts]

    def _one(self, prompt: Prompt) -> float:
        if prompt.metadata.get("only", self.name) != self.name:
            return 1.0
        if (once := prompt.metadata.get("once")) is not None:
            if Path(once).exists():
                return 1.0
            Path(once).touch()
        if prompt.text == "hang":
            time.sleep(3600)
        if prompt.text == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if prompt.text == "raise":
            raise RuntimeError("no such picture")
        if prompt.text == "print":
            print("a library that talks", flush=True)
        return {"nan": float("nan"), "inf": float("inf")}.get(prompt.text, 1.0)


class Wrong:
    """Too few numbers."""

    name = "wrong"

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[float]:
        return [1.0] * (len(images) - 1)


def load(config: RewardConfig, resources: Resources) -> list[Bright | Trying | Wrong]:
    """Those that have a weight."""
    if "unusable" in config.active:
        raise ValueError("there are no weights in that directory")
    if "broken" in config.active:
        raise KeyError("a bug")
    known: list[Bright | Trying | Wrong] = [Bright(), Trying(), Trying("other"), Wrong()]
    return [one for one in known if one.name in config.active]
