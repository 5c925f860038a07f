"""What one reward cannot say about one picture is NaN there, counted, and costs nobody else."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image
from trying_rewards import Bright, Trying, Wrong

from qwenimg_dist.rewards.base import MAX_LOST, Prompt, RewardLost, Scores, WeightedRewards, join


def greys(*levels: int) -> list[Image.Image]:
    return [Image.new("RGB", (4, 4), (level,) * 3) for level in levels]


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(text=text) for text in texts]


def same(scores: Scores, total: list[float]) -> bool:
    return bool(np.array_equal(scores.total, np.array(total), equal_nan=True))


def test_the_total_is_the_weighted_sum() -> None:
    rewards = WeightedRewards([Bright(), Trying()], {"bright": 2.0, "trying": -0.5})
    scores = rewards.score(greys(0, 255), prompts("a", "b"))
    assert same(scores, [-0.5, 1.5])
    assert scores.components["bright"].tolist() == [0.0, 1.0]
    assert scores.components["bright"].dtype == scores.total.dtype == np.float64
    assert scores.failures == scores.timeouts == {"bright": 0, "trying": 0}
    assert scores.num_failed == 0
    assert scores.notes == ()


@pytest.mark.parametrize("trouble", ["raise", "nan", "inf"])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_one_bad_picture_costs_itself_alone(trouble: str, batch_size: int) -> None:
    rewards = WeightedRewards([Bright(), Trying()], {"bright": 1.0, "trying": 1.0}, batch_sizes={"trying": batch_size})
    scores = rewards.score(greys(0, 255, 255), prompts("a", trouble, "b"))
    assert same(scores, [1.0, math.nan, 2.0])
    assert scores.components["bright"].tolist() == [0.0, 1.0, 1.0]
    assert scores.failures == {"bright": 0, "trying": 1}
    assert scores.num_failed == 1
    assert scores.notes


def test_wrong_numbers_of_numbers_are_a_failure() -> None:
    scores = WeightedRewards([Wrong()], {"wrong": 1.0}).score(greys(0, 0), prompts("a", "b"))
    assert scores.failures == {"wrong": 2}
    assert "(0,) for 1 pictures" in scores.notes[0]


def test_a_lost_reward_is_given_up_for_the_call_but_not_for_good() -> None:
    asked = []

    class Lost:
        name = "lost"

        def __call__(self, images: list[Image.Image], given: list[Prompt]) -> list[float]:
            asked.append(len(images))
            raise RewardLost("no answer", timed_out=True)

    rewards = WeightedRewards([Lost(), Bright()], {"lost": 1.0, "bright": 1.0}, batch_sizes={"lost": 2})
    for call in range(2):
        scores = rewards.score(greys(*[0] * 9), prompts(*"abcdefghi"))
        assert asked == [2] * MAX_LOST * (call + 1)
        assert scores.timeouts == {"lost": 9, "bright": 0}
        assert scores.failures == {"lost": 0, "bright": 0}
        assert not np.isnan(scores.components["bright"]).any()


def test_no_pictures_have_no_scores() -> None:
    scores = WeightedRewards([Bright()], {"bright": 1.0}).score([], [])
    assert scores.total.shape == scores.components["bright"].shape == (0,)


def test_scores_of_several_calls_are_joined_in_order() -> None:
    rewards = WeightedRewards([Bright(), Trying()], {"bright": 1.0, "trying": 1.0})
    whole = rewards.score(greys(0, 51, 255), prompts("a", "nan", "raise"))
    parts = [rewards.score(greys(0), prompts("a")), rewards.score(greys(51, 255), prompts("nan", "raise"))]
    joined = join(parts)
    assert same(joined, whole.total.tolist())
    assert joined.failures == whole.failures == {"bright": 0, "trying": 2}


@pytest.mark.parametrize(
    "weights", [{}, {"bright": 0.0, "trying": 1.0}, {"bright": 1.0}, {"bright": math.inf, "trying": 1.0}]
)
def test_rewards_and_weights_that_do_not_belong_together_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="each needs one that is not 0"):
        WeightedRewards([Bright(), Trying()], weights)


def test_pictures_and_prompts_must_be_equally_many() -> None:
    with pytest.raises(ValueError, match="1 pictures for 2 prompts"):
        WeightedRewards([Bright()], {"bright": 1.0}).score(greys(0), prompts("a", "b"))
