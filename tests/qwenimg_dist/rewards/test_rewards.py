"""Every reward has its file in conf, with a weight of 0 and settings that its own model takes."""

from __future__ import annotations

import pytest

from qwenimg_dist.compose import ConfigError, groups, load_config
from qwenimg_dist.config import RewardConfig, training_identity
from qwenimg_dist.rewards import REWARDS, check_rewards, refusals, what_counts
from qwenimg_dist.rewards.base import Prompt


def test_conf_and_code_name_the_same_rewards_and_settings() -> None:
    config = load_config([]).reward
    assert groups()["reward"] == sorted(REWARDS) == sorted(config.weights) == sorted(config.settings)
    assert config.active == {}
    for name, kind in REWARDS.items():
        assert config.settings[name] == kind.params.model_validate(config.settings[name]).model_dump(mode="json")
        assert config.settings[name].keys() == kind.params.model_fields.keys()


def test_a_weight_is_all_it_takes_and_mistakes_are_named() -> None:
    config = load_config(["reward.weights.shapes=0.5", "reward.settings.shapes.batch_size=4"]).reward
    assert config.active == {"shapes": 0.5}
    assert check_rewards(config)["shapes"].batch_size == 4
    for wrong, hint in {
        "reward.weights.shape=1": "did you mean 'reward.weights.shapes'",
        "reward.settings.ocr.read_sid=1": "did you mean 'reward.settings.ocr.read_side'",
        "reward.timeout=1": "did you mean 'reward.timeout_s'",
    }.items():
        with pytest.raises(ConfigError, match=hint):
            load_config([wrong])
    with pytest.raises(ConfigError, match=r"reward\.settings\.shapes\.size: unknown key"):
        check_rewards(RewardConfig(weights={"shapes": 1.0}, settings={"shapes": {"size": 1}}))


def test_what_counts_is_what_moves_the_numbers() -> None:
    def counted(*words: str) -> object:
        return what_counts(load_config(["reward.weights.shapes=1", *words]).reward)

    assert counted() == counted("reward.settings.shapes.batch_size=7", "reward.timeout_s=1", "reward.num_threads=3")
    assert counted() != counted("reward.weights.shapes=2")

    def held_to(stage: str, *words: str) -> object:
        return training_identity(load_config([f"stage={stage}", "reward.weights.shapes=1", *words]))

    # A resumed run of GRPO is held to what it was rewarded for; other stages know no reward.
    assert held_to("grpo") == held_to("grpo", "reward.settings.shapes.batch_size=7", "reward.settings.ocr.read_side=99")
    assert held_to("grpo") != held_to("grpo", "reward.weights.shapes=2")
    assert held_to("sft") == held_to("sft", "reward.weights.shapes=2")


def test_prompts_that_no_picture_could_fit_are_found_beforehand() -> None:
    config = RewardConfig(weights={"shapes": 1.0})
    prompts = [Prompt(text="a red circle on a white background"), Prompt(text="a dog")] * 3
    found = refusals(config, prompts, most=2)
    assert [number for number, _ in found] == [1, 3]
    assert found[0][1].startswith("reward shapes: prompt 'a dog' names 0 colours")
    assert refusals(config, prompts[:1]) == []
