"""The plan warns of what is rarely meant, and says how a rank cuts its batches."""

from __future__ import annotations

import json

import numpy as np
import pytest
from fake_catalog import MemoryCatalogs, memory_catalog

from consumers.curriculum import plan
from consumers.run_plan import RunPlan, dry_run, make_plan
from consumers.stream import cut_for
from qwenimg_dist.compose import load_config
from qwenimg_dist.data.ledger import Ledger
from qwenimg_dist.data.order import Segment
from qwenimg_dist.data.samples import Selection
from qwenimg_dist.data.where import compile_where


def planned(*overrides: str, buckets: tuple[int, ...] = (0,) * 40, world_size: int = 3) -> RunPlan:
    """Two phases at 64 and 128 px; every row has captions of 4 and 40 tokens."""
    short = ["optim.ema_decay=0.5", "optim.warmup_steps=1"]
    batches = ["curriculum.phases.low.global_batch=8", "curriculum.phases.high.global_batch=8"]
    config = load_config([*batches, *short, *overrides])
    columns = {"row": np.arange(len(buckets))}
    ledger = Ledger(
        phases=plan(config),
        seed=0,
        caption_dropout=0.1,
        catalogs=MemoryCatalogs(
            [memory_catalog(buckets, [[4, 40]] * len(buckets), resolutions=(64, 128), columns=columns)]
        ),
        selection=Selection(
            where=None,
            held_out_below=0,
            weights=tuple((compile_where(text), weight) for text, weight in config.data.weights.items()),
        ),
    )
    ledger.append(Segment(catalog=0, phase=None, epoch=0, last=True))
    return make_plan(ledger, config.optim, world_size=world_size)


def test_nothing_to_warn_of() -> None:
    found = planned("train.steps=10")
    assert found.warnings() == []
    assert [len(table.rows) for table in found.tables()] == [2, 2, 2]
    assert json.loads(json.dumps(found.json()))["phases"][0]["resolutions"]["64"]["epochs"] == pytest.approx(1.4)
    assert "warning" not in found.text()


@pytest.mark.parametrize(
    ("overrides", "buckets", "words"),
    [
        (["train.steps=1"], (0,) * 40, "phase 1 (high) has no step"),
        (
            ["train.steps=3", "+curriculum.phases.low.resolutions.128=0.1"],
            (0,) * 40,
            "phase 0 (low) at 128 px gets none of the 2 steps",
        ),
        (
            ["train.steps=10", "curriculum.phases.high.warmup_steps=3"],
            (0,) * 40,
            "phase 1 (high) has 3 steps and warmup_steps=3",
        ),
        (["train.steps=10"], (0,) * 37 + (1,) * 3, "16x32 (3 samples) fill less than half of a global batch of 8"),
        (
            ["train.steps=10", "curriculum.phases.low.micro_batch_tokens=41"],
            (0,) * 40,
            "up to 42 tokens, more than micro_batch_tokens=41",
        ),
        (["train.steps=10", "optim.ema_decay=0.99"], (0,) * 40, "is still 90% what the run started from"),
        (["train.steps=10", "optim.warmup_steps=6"], (0,) * 40, "over half of the run's 10 steps"),
    ],
)
def test_what_is_rarely_meant_is_said(overrides: list[str], buckets: tuple[int, ...], words: str) -> None:
    found = planned(*overrides, buckets=buckets).warnings()
    assert any(words in warning for warning in found), found
    half_full = (0,) * 36 + (1,) * 4
    assert planned("train.steps=10", buckets=half_full).warnings() == []


def test_weights_that_hold_for_no_row_are_said() -> None:
    """Of the run, where no phase has such a row; of a phase, where that one has none."""

    def told(*overrides: str) -> list[str]:
        return planned("train.steps=10", *overrides).warnings()

    assert told("data.weights={'row < 5': 2, 'row > 30': 0.5}", "curriculum.phases.low.weights={'row < 3': 2}") == []
    (found,) = told("data.weights={'row < 5': 2, 'row > 99': 3}")
    assert "data.weights='row > 99' holds for no row that is trained on" in found
    first = "curriculum.phases.low.where='row < 20'"
    (found,) = told(first, "curriculum.phases.low.weights={'row > 30': 3}")
    assert "phase 0 (low): weights='row > 30' holds for no row that it trains on" in found
    assert told(first, "data.weights={'row > 30': 3}") == []  # the other phase has such rows


def test_micro_batches_are_those_of_the_stream() -> None:
    found = planned("train.steps=10", "curriculum.phases.low.micro_batch_tokens=84", world_size=2)
    ((bucket, cut),) = found.phases[0].streams[0].micro_batches.items()
    assert (cut.long, cut.short, cut.over_budget) == ([2, 2], [4], 0)
    for rank in range(2):
        assert cut_for(8, bucket.image_tokens, 40, 84, rank=rank, world=2).sizes == cut.long


def test_rates_go_from_the_first_to_the_last_step_over_the_highest() -> None:
    found = planned(
        "train.steps=1000",
        "optim.warmup_steps=20",
        "optim.cooldown_steps=100",
        "curriculum.phases.high.warmup_steps=10",
    )
    low, high = (phase.lr for phase in found.phases)
    assert low == pytest.approx((1e-4, 2e-3, 2e-3))
    assert high == pytest.approx((1.5e-4, 1.5e-3, 1.5e-4))


def test_a_dry_run_refuses_groups_of_ranks_that_training_would() -> None:
    with pytest.raises(ValueError, match="hpz_partition=3 does not divide the 2 ranks"):
        dry_run(load_config(["engine.hpz_partition=3"]), world_size=2)
