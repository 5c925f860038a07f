"""Before the first picture: only prompts that will be drawn are asked whether their pictures could be judged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_dataset import FakeProducer, make_rows

from consumers.rollout import Rollouts
from qwenimg_dist.compose import load_config
from qwenimg_dist.data.generations import Generations
from qwenimg_dist.data.ledger_config import LedgerConfig
from qwenimg_dist.data.phases import PlannedPhase


def opened(root: Path, phase_where: str | None, where: str | None) -> Generations:
    producer = FakeProducer(root / "data", unit_size=8, resolutions=(32,), prompts=True)
    signs = [replace(row, captions=(f'a sign that says "{row.captions[0]}"',)) for row in make_rows(16)]
    signs[3] = replace(signs[3], captions=("a tree",))
    producer.add(signs)
    producer.produce(complete=True)
    phase = PlannedPhase(
        index=0,
        first_step=0,
        last_step=4,
        weights={32: 1.0},
        global_batch=2,
        micro_batch_tokens=60,
        lr_scale=1.0,
        where=phase_where,
    )
    config = LedgerConfig(phases=(phase,), seed=1, caption_dropout=0.0, where=where, held_out=0.0, max_held_out=0)
    run = Generations(root / "run", producer.dataset, producer.facets, config, follow=False)
    run.advance(0)
    return run


def check(generations: Generations) -> None:
    rollouts: Any = SimpleNamespace(_generations=generations, _config=load_config(["reward.weights.ocr=1"]))
    Rollouts.check_prompts(rollouts)


def test_unquoted_prompts_are_refused_where_they_would_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'a tree': .* Leave them out"):
        check(opened(tmp_path / "all", None, None))
    check(opened(tmp_path / "where", None, "row != 3"))
    check(opened(tmp_path / "phase", "row != 3", None))


def test_a_wait_for_rewards_stays_below_the_watchdog_s() -> None:
    words = ["stage=grpo", "reward.weights.ocr=1", "objective.reward_timeout_s=100"]
    load_config([*words, "train.stall_timeout_s=101"])
    with pytest.raises(ValueError, match=r"objective.reward_timeout_s=100 is not below train.stall_timeout_s=100"):
        load_config([*words, "train.stall_timeout_s=100"])
