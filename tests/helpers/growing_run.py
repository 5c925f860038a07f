"""A rank 0 without ranks: it opens a run on a fake data set and walks through the ledger's batches."""

from __future__ import annotations

from pathlib import Path

from fake_dataset import FakeProducer, make_rows

from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.data.generations import Generations
from qwenimg_dist.data.ledger import GlobalBatch
from qwenimg_dist.data.ledger_config import LedgerConfig
from qwenimg_dist.data.phases import PlannedPhase

SIZES = ((256, 256), (64, 128))


def make_config(*, steps: int = 1000, phases: int = 1, batch: int = 3, held_out: float = 0.0) -> LedgerConfig:
    ends = [steps * (index + 1) // phases for index in range(phases)]
    return LedgerConfig(
        phases=tuple(
            PlannedPhase(
                index=index,
                first_step=ends[index - 1] if index else 0,
                last_step=ends[index],
                weights={32: 1.0},
                global_batch=batch,
                micro_batch_tokens=100,
                lr_scale=1.0,
                where=None,
            )
            for index in range(phases)
        ),
        seed=3,
        caption_dropout=0.2,
        where=None,
        held_out=held_out,
        max_held_out=4,
    )


def open_run(
    run: Path, producer: FakeProducer, config: LedgerConfig, *, follow: bool, early_steps: int = 0
) -> Generations:
    """What a rank 0 does at start. Without early looks, lines depend on what is ready when they are needed alone."""
    dataset = Dataset.open(producer.dataset.root)
    generations = Generations(run, dataset, producer.facets, config, follow=follow, early_steps=early_steps)
    generations.verify()
    return generations


def describe(generations: Generations, batch: GlobalBatch) -> tuple[object, ...]:
    """A batch in terms of the data set, not of positions."""
    keys = generations.ledger.catalogs.keys(batch.rows)
    tokens = generations.ledger.catalogs.text_tokens(batch.texts)
    return (batch.step, batch.epoch, batch.bucket, tuple(keys), tuple(tokens.tolist()), tuple(batch.weights.tolist()))


def train(generations: Generations, first: int, steps: int) -> list[tuple[object, ...]]:
    """Steps from `first` until `steps` were made or producers must be waited for."""
    seen = []
    for step in range(first, first + steps):
        if generations.advance(step) == "wait":
            break
        seen.append(describe(generations, generations.ledger.batch(step)))
    return seen


def produce_units(producer: FakeProducer, units: int) -> None:
    first = producer.num_units
    producer.add(make_rows(4 * units, start=len(producer.rows), captions=2, sizes=SIZES))
    producer.produce(range(first, producer.num_units))
