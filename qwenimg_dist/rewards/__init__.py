"""Rewards, one file each: each judges pictures against their prompts.

    with RewardService(config.reward) as service:      # rewards/service.py
        scores = service.score(images, prompts)

To add one: a file with a `Kind`, an entry here, a YAML in `conf/reward` (its weight of 0 and its settings), a test.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from PIL import Image
from pydantic import ValidationError

from qwenimg_dist.compose import ConfigError, did_you_mean
from qwenimg_dist.config import RewardConfig
from qwenimg_dist.rewards import clip, ocr, pickscore, shapes
from qwenimg_dist.rewards.base import Prompt, Reward
from qwenimg_dist.rewards.kind import LOCATION, Judge, Kind, Resources, RewardParams

REWARDS: Final[dict[str, Kind[Any]]] = {
    "shapes": shapes.REWARD,
    "ocr": ocr.REWARD,
    "clip": clip.REWARD,
    "pickscore": pickscore.REWARD,
}


class _Loaded:
    """A `Reward` made of a file's judge."""

    def __init__(self, name: str, judge: Judge) -> None:
        self.name = name
        self._judge = judge

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[float]:
        return self._judge(images, prompts)


def check_rewards(config: RewardConfig) -> dict[str, RewardParams]:
    """Settings of the rewards in use, by name. Raises ValueError for what is unknown, wrong or not installed, and if
    no reward has a weight; loads nothing."""
    for name in [*config.weights, *config.settings]:
        if name not in REWARDS:
            raise ConfigError(f"reward.weights.{name}: there is no such reward{did_you_mean(name, list(REWARDS))}")
    if not config.active:
        offered = " or ".join(f"reward.weights.{name}=1" for name in REWARDS)
        raise ConfigError(f"no reward has a weight: set {offered}")
    params = {name: _validate(name, config.settings.get(name, {})) for name in config.active}
    for name, one in params.items():
        try:
            REWARDS[name].check(one)
            if (find := REWARDS[name].model) is not None:
                find(one)
        except ValueError as error:
            raise ConfigError(f"reward.settings.{name}: {error}") from error
    return params


def load_rewards(config: RewardConfig, resources: Resources) -> list[Reward]:
    """The rewards in use, loaded here. Raises ValueError for what the user can mend."""
    return [_Loaded(name, REWARDS[name].load(one, resources)) for name, one in check_rewards(config).items()]


def refusals(config: RewardConfig, prompts: Iterable[Prompt], most: int = 3) -> list[tuple[int, str]]:
    """(position, why) of the first `most` prompts of which no picture could be judged: data for these rewards has
    none. Ask before the first picture is drawn."""
    params = check_rewards(config)
    found: list[tuple[int, str]] = []
    for number, prompt in enumerate(prompts):
        for name, one in params.items():
            if why := REWARDS[name].refuse(prompt, one):
                found.append((number, f"reward {name}: {why}"))
        if len(found) >= most:
            break
    return found[:most]


def what_counts(config: RewardConfig) -> dict[str, Any]:
    """What scores depend on: weights and settings of the rewards in use, but for how they are batched.

    A model counts by its fingerprint: a copy elsewhere is the same reward, other weights under its path are another."""
    return {
        name: {"weight": config.active[name], **_settings(REWARDS[name], one)}
        for name, one in check_rewards(config).items()
    }


def _settings(kind: Kind[Any], params: RewardParams) -> dict[str, Any]:
    if kind.model is None:
        return params.model_dump(mode="json", exclude={"batch_size"})
    from qwenimg_dist.models.hub import MODEL_PATTERNS
    from qwenimg_dist.models.pipeline import fingerprint_component  # brings torch

    told = params.model_dump(mode="json", exclude={"batch_size", *LOCATION})
    return {**told, "model": fingerprint_component(kind.model(params), MODEL_PATTERNS)}


def _validate(name: str, given: dict[str, Any]) -> RewardParams:
    kind = REWARDS[name].params
    try:
        params: RewardParams = kind.model_validate(given)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            message = f"{item['msg']} (got {item['input']!r})".removeprefix("Value error, ")
            if item["type"] == "extra_forbidden":
                message = f"unknown key{did_you_mean(key, list(kind.model_fields))}"
            problems.append(f"reward.settings.{name}.{key}: {message}")
        raise ConfigError("invalid config:\n  " + "\n  ".join(problems)) from error
    return params
