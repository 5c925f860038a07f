"""Before the first picture: only prompts that will be drawn are asked whether their pictures could be judged, and what
a rank cannot look up of them is told on all of them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_dataset import FakeProducer, make_rows

from consumers.grids import saved_or_said
from consumers.ranks import AgreedError, Ranks
from consumers.rollout import Rollouts
from consumers.stream import Stream
from qwenimg_dist.compose import load_config
from qwenimg_dist.data.facets import DataError
from qwenimg_dist.data.generations import Generations
from qwenimg_dist.data.ledger_config import LedgerConfig
from qwenimg_dist.data.phases import PlannedPhase
from qwenimg_dist.patience import StorageAwayError


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


@pytest.mark.parametrize(
    ("met", "raised"), [(DataError("prompts are torn"), AgreedError), (StorageAwayError("away"), StorageAwayError)]
)
def test_prompts_that_cannot_be_looked_up_are_told_before_the_first_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, met: Exception, raised: type[Exception]
) -> None:
    generations = opened(tmp_path, None, None)
    stream = Stream(generations.ledger, rank=0, world=1, compute_dtype=torch.float32)
    batch = stream.get(0)
    stream.close()
    config, began = load_config(["stage=grpo", "reward.weights.ocr=1"]), []
    rollouts: Any = SimpleNamespace(
        _generations=generations,
        _config=config,
        _objective=config.objective,
        _ranks=Ranks(rank=0, world_size=1, device=torch.device("cpu")),
        _engine=SimpleNamespace(train=lambda mode=True: began.append("forwards")),
        _scorer=SimpleNamespace(begin=lambda: began.append("rewards")),
    )
    rollouts._prompts = partial(Rollouts._prompts, rollouts)
    assert [one.text for one in rollouts._prompts(batch, batch.micro_batches[0])]

    def fails(rows: Any) -> Any:
        raise met

    monkeypatch.setattr(generations.catalogs, "prompts", fails)
    with pytest.raises(raised, match=str(met)) as told:
        Rollouts.play(rollouts, batch, step=0, tell=lambda what: None)
    assert type(told.value) is raised
    assert began == []


def test_a_grid_whose_words_are_away_ends_no_rank_alone_and_is_said_where_it_is_heard() -> None:
    def save() -> Path:
        raise StorageAwayError("away")

    said: list[str] = []
    assert saved_or_said(save, said.append) is None
    assert said == ["warning: a grid of samples was not written (StorageAwayError: away)"]
