"""Rewards as Ray actors: what hangs, dies or stops there costs numbers, never the rank that asked."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ray
import trying_rewards
from PIL import Image
from ray.exceptions import RayError

from producers.ray_cluster import ray_session
from qwenimg_dist.commands import reward_actors as module
from qwenimg_dist.commands.reward_actors import RewardClient, reward_actors
from qwenimg_dist.compose import load_config
from qwenimg_dist.config import Config
from qwenimg_dist.rewards.base import Prompt


def config(*names: str, actors: int = 2) -> Config:
    base = load_config([f"cluster.reward_actors={actors}", "cluster.ranks=1", "cluster.producers=3"])
    reward = {
        "weights": dict.fromkeys(names, 1.0),
        "settings": {name: {"batch_size": 1} for name in names},
        "timeout_s": 2.0,
    }
    return Config.model_validate({**base.model_dump(), "reward": reward})


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the actors find the tests' rewards
        with ray_session(config("bright").cluster):
            yield


def greys(number: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (level, level, level)) for level in range(number)]


def await_actor(actor: Any) -> None:
    """Until it is there again with its rewards loaded."""
    deadline = time.monotonic() + 200
    while True:
        try:
            assert ray.get(actor.fault.remote()) is None
        except RayError:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        else:
            return


@pytest.mark.slow
def test_actors_judge_and_what_happens_to_them_costs_numbers_alone(
    session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 2 * 8 * 8 * 3)
    monkeypatch.setattr(module, "_SILENT_S", 6.0)
    chosen = config("bright", "trying")
    with reward_actors(chosen, load=trying_rewards.LOAD) as actors:
        clients = [RewardClient(actors, chosen.reward, rank=rank) for rank in range(2)]
        for client in clients:
            scores = client.score(greys(7), [Prompt(text="a")] * 7)
            assert scores.components["bright"] == pytest.approx(np.arange(7) / 255)  # seven pictures, four calls
            assert scores.num_failed == 0

        texts = ["a", "hang", "raise", "nan", "die", "b"]
        scores = clients[0].score(greys(6), [Prompt(text=text) for text in texts])
        assert np.isnan(scores.total).tolist() == [False, True, True, True, True, False]
        assert scores.timeouts == {"bright": 0, "trying": 1}
        assert scores.failures == {"bright": 0, "trying": 3}

        pids = [ray.get(actor.alive.remote()) for actor in actors]
        os.kill(pids[0], signal.SIGKILL)
        scores = clients[0].score(greys(5), [Prompt(text="a")] * 5)
        assert scores.num_failed == 0
        assert scores.components["bright"] == pytest.approx(np.arange(5) / 255)

        await_actor(actors[0])  # Ray starts it anew
        os.kill(pids[1], signal.SIGSTOP)
        try:
            began = time.monotonic()
            for client in [RewardClient(actors, chosen.reward, rank=1)] * 2:
                scores = client.score(greys(3), [Prompt(text="a")] * 3)
                assert scores.num_failed == 0  # the other one answers
            assert time.monotonic() - began < 120
        finally:
            os.kill(pids[1], signal.SIGCONT)

        for actor in actors:
            ray.kill(actor, no_restart=True)
        scores = clients[1].score(greys(3), [Prompt(text="a")] * 3)
        assert scores.num_failed == 3
        assert scores.failures == {"bright": 3, "trying": 3}
        assert scores.timeouts == {"bright": 0, "trying": 0}
        assert "a reward actor" in scores.notes[0]
        assert clients[0].score([], []).total.shape == (0,)


@pytest.mark.slow
def test_actors_that_cannot_judge_or_be_placed_are_refused(session: None) -> None:
    with (
        pytest.raises(ValueError, match="reward actor 0: there are no weights in that directory"),
        reward_actors(config("unusable", actors=1), load=trying_rewards.LOAD),
    ):
        pass
    large = config("bright")
    large = large.model_copy(update={"cluster": large.cluster.model_copy(update={"gpus_per_reward_actor": 64.0})})
    with pytest.raises(ValueError, match="64 GPUs on one machine"), reward_actors(large):
        pass
    with (
        pytest.raises(ValueError, match="60 reward actors beside 1 ranks need 61 CPUs"),
        reward_actors(config("bright", actors=60)),
    ):
        pass


def test_chunks_are_bounded_and_in_order() -> None:
    pictures = [np.full((side, 10, 3), number, np.uint8) for number, side in enumerate([10, 200, 5, 5, 300_000, 1])]
    chunks = module._chunks(pictures)
    assert [one for chunk in chunks for one in chunk] == pictures
    assert [len(chunk) for chunk in chunks] == [4, 1, 1]
    assert module._chunks([]) == []
