"""A run of one phase at 64 px, for tests of what it holds out."""

from __future__ import annotations

from pathlib import Path

from fake_dataset import FakeProducer

from qwenimg_dist.data.generations import Generations
from qwenimg_dist.data.ledger_config import LedgerConfig
from qwenimg_dist.data.phases import PlannedPhase


def held_out_run(folder: Path, producer: FakeProducer, *, held_out: float, max_held_out: int) -> Generations:
    """Its first generation is there: all that the producer has made, `held_out` of it but at most so many rows."""
    phase = PlannedPhase(
        index=0,
        first_step=0,
        last_step=9,
        weights={64: 1.0},
        global_batch=4,
        micro_batch_tokens=80,
        lr_scale=1.0,
        where=None,
    )
    config = LedgerConfig(
        phases=(phase,), seed=1, caption_dropout=0.0, where=None, held_out=held_out, max_held_out=max_held_out
    )
    made = Generations(folder, producer.dataset, producer.facets, config, follow=False)
    made.advance(0)
    return made
