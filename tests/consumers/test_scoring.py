"""Rewards in a thread: what hangs, raises or answers wrongly costs its pictures their rewards, and nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
from PIL import Image

from consumers.scoring import Scorer
from qwenimg_dist.rewards.base import Prompt, Scores, WeightedRewards

PICTURES = [Image.new("L", (4, 4), level) for level in range(6)]
PROMPTS = [Prompt(text=str(level)) for level in range(6)]


class Level:
    """The picture's grey level."""

    name = "level"

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[float]:
        return [float(image.getpixel((0, 0)) or 0) for image in images]


REWARDS = WeightedRewards([Level()], {"level": 2.0})


def test_answers_come_in_order() -> None:
    judging = Scorer(REWARDS.score, timeout_s=10).begin()
    judging.put(PICTURES[:2], PROMPTS[:2])
    judging.put([], [])
    judging.put(PICTURES[2:], PROMPTS[2:])
    judged = judging.collect()
    assert judged.total.tolist() == [0, 2, 4, 6, 8, 10]
    assert judged.components["level"].tolist() == [0, 1, 2, 3, 4, 5]
    assert (judged.failures, judged.timeouts, judged.notes) == (0, 0, ())


def test_what_raises_or_answers_wrongly_costs_its_own_pictures() -> None:
    def score(images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        if prompts[0].text == "2":
            raise RuntimeError("no such word")
        if prompts[0].text == "4":
            return REWARDS.score(images[:1], prompts[:1])
        return REWARDS.score(images, prompts)

    judging = Scorer(score, timeout_s=10).begin()
    for start in (0, 2, 4):
        judging.put(PICTURES[start : start + 2], PROMPTS[start : start + 2])
    judged = judging.collect()
    assert judged.total[:2].tolist() == [0, 2]
    assert np.isnan(judged.total[2:]).all()
    assert (judged.failures, judged.timeouts) == (4, 0)
    assert any("no such word" in note for note in judged.notes)
    assert any("rewards for 2 pictures" in note for note in judged.notes)


def test_what_hangs_is_left_behind_and_not_asked_again_until_it_is_back() -> None:
    gate, asked = threading.Event(), []

    def score(images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        asked.append(prompts[0].text)
        if prompts[0].text == "1":
            gate.wait(30)
        return REWARDS.score(images, prompts)

    scorer = Scorer(score, timeout_s=0.3)
    judging = scorer.begin()
    for picture, prompt in zip(PICTURES[:3], PROMPTS[:3], strict=True):
        judging.put([picture], [prompt])
    begin = time.perf_counter()
    judged = judging.collect()
    assert time.perf_counter() - begin < 5
    assert judged.total[0] == 0
    assert np.isnan(judged.total[1:]).all()
    assert judged.timeouts == 2
    again = scorer.begin()
    again.put(PICTURES[:1], PROMPTS[:1])
    told = again.collect()
    assert told.timeouts == 1
    assert "not asked" in told.notes[0]
    gate.set()
    judging.join(10)
    assert asked == ["0", "1"]  # what was left of its round is dropped
    back = scorer.begin()
    back.put(PICTURES[3:4], PROMPTS[3:4])
    assert back.collect().total.tolist() == [6]
