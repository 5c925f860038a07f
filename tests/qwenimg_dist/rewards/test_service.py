"""Rewards in their own process: hanging, dying and talking ones cost numbers, time and counts, never the caller."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import trying_rewards
from PIL import Image

from qwenimg_dist.config import RewardConfig
from qwenimg_dist.demo.shapes import Scene, render
from qwenimg_dist.rewards.base import Prompt
from qwenimg_dist.rewards.service import RewardError, RewardService

TIMEOUT_S = 2.0


def config(*names: str, **more: float) -> RewardConfig:
    given = {"weights": dict.fromkeys(names, 1.0), "settings": {name: {"batch_size": 1} for name in names}}
    return RewardConfig.model_validate({**given, "timeout_s": TIMEOUT_S, **more})


def pictures(number: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 6), (255, 255, 255)) for _ in range(number)]


def test_a_hung_reward_costs_its_picture_and_the_others_go_on(tmp_path: Path) -> None:
    """Hanging, dying once, dying always, talking and raising: in one process's life."""
    with RewardService(config("bright", "trying"), load=trying_rewards.LOAD) as service:
        assert service.score(pictures(2), [Prompt(text="a"), Prompt(text="print")]).total.tolist() == [2.0, 2.0]
        assert service.num_starts == 1

        texts = ["a", "hang", "b", "raise"]
        scores = service.score(pictures(4), [Prompt(text=text) for text in texts])
        assert np.isnan(scores.total).tolist() == [False, True, False, True]
        assert scores.timeouts == {"bright": 0, "trying": 1}
        assert scores.failures == {"bright": 0, "trying": 1}
        assert any("reward.timeout_s=2 s" in note for note in scores.notes)
        assert any("no such picture" in note for note in scores.notes)
        assert service.num_starts == 2

        dies_once = Prompt(text="die", metadata={"once": str(tmp_path / "died")})
        scores = service.score(pictures(1), [dies_once])
        assert scores.total.tolist() == [2.0]
        assert service.num_starts == 3

        scores = service.score(pictures(2), [Prompt(text="die"), Prompt(text="a")])
        assert np.isnan(scores.total).tolist() == [True, False]
        assert scores.failures == {"bright": 0, "trying": 1}
        assert "exit code -9" in scores.notes[0]
        assert service.num_starts == 5


def test_a_reward_that_always_hangs_costs_two_timeouts_for_the_whole_call() -> None:
    with RewardService(config("trying", "other"), load=trying_rewards.LOAD) as service:
        began = time.monotonic()
        scores = service.score(pictures(20), [Prompt(text="hang", metadata={"only": "other"})] * 20)
        assert time.monotonic() - began < 20 * TIMEOUT_S
        assert service.num_starts == 3
    assert scores.timeouts == {"other": 20, "trying": 0}
    assert scores.components["trying"].tolist() == [1.0] * 20


def test_what_cannot_be_loaded_is_told_when_it_is_opened() -> None:
    with pytest.raises(ValueError, match="there are no weights in that directory"):
        RewardService(config("unusable"), load=trying_rewards.LOAD)
    with pytest.raises(RewardError, match="KeyError: 'a bug'"):
        RewardService(config("broken"), load=trying_rewards.LOAD)
    with pytest.raises(ValueError, match="no reward has a weight: set"):
        RewardService(config())
    with pytest.raises(ValueError, match="no such reward: did you mean 'shapes'"):
        RewardService(config("shape"))
    with pytest.raises(RewardError, match=r"not loaded within reward.start_timeout_s=0.01 s"):
        RewardService(config("bright", start_timeout_s=0.01), load=trying_rewards.LOAD)


def test_pictures_arrive_as_they_were_sent_and_larger_than_a_pipe() -> None:
    with RewardService(config("bright", timeout_s=60), load=trying_rewards.LOAD) as service:
        rng = np.random.default_rng(0)
        arrays = [rng.integers(0, 256, size=(900, 1100, 3), dtype=np.uint8) for _ in range(3)]
        arrays.append(np.zeros((16, 32, 3), np.uint8))
        scores = service.score([Image.fromarray(a) for a in arrays], [Prompt(text="x")] * 4)
    assert scores.total == pytest.approx([a.astype(np.float64).mean() / 255 for a in arrays], abs=1e-12)


def test_the_shipped_rewards_judge_there_as_here() -> None:
    scene = Scene("red", "circle", "white")
    image = render(scene, 64, np.random.default_rng(0))
    asked = [Prompt(text="a red circle on a white background"), Prompt(text="x", metadata={"colour": "red"})]
    with RewardService(config("shapes", timeout_s=60)) as service:
        scores = service.score([image, image], asked)
    assert scores.components["shapes"][0] == 1.0
    assert np.isnan(scores.total[1])
    assert "names 0 colours" in scores.notes[0]


def test_it_ends_with_who_started_it_even_while_it_hangs(tmp_path: Path) -> None:
    program = (
        "import trying_rewards, os; from PIL import Image; from qwenimg_dist.config import RewardConfig\n"
        "from qwenimg_dist.rewards.base import Prompt; from qwenimg_dist.rewards.service import RewardService\n"
        "service = RewardService(RewardConfig(weights={'trying': 1.0}, timeout_s=300), load=trying_rewards.LOAD)\n"
        "print(service._process.pid, flush=True)\n"
        "service.score([Image.new('RGB', (2, 2))], [Prompt(text='hang')])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment, text=True)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    time.sleep(0.5)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    deadline = time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)
