"""Two fake data sets that mix, and a run on them: other sizes, stored types and uris that stand in both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fake_dataset import FakeProducer, make_rows

from qwenimg_dist.data.generations import Generations
from qwenimg_dist.data.ledger_config import DatasetConfig, LedgerConfig
from qwenimg_dist.data.mix import Mix
from qwenimg_dist.data.phases import PlannedPhase

SIZES = ((256, 256), (64, 130), (150, 70))
NUM_ROWS = {"photos": 30, "text": 12}


def make_producers(root: Path) -> dict[str, FakeProducer]:
    """Producers that have written `root/photos` and `root/text`."""
    made = {}
    for name, dtype in (("photos", "bfloat16"), ("text", "float32")):
        producer = FakeProducer(root / name, unit_size=8, resolutions=(32, 64), dtype=dtype, max_shard_bytes=20_000)
        producer.add(make_rows(NUM_ROWS[name], captions=2, sizes=SIZES))
        producer.produce(complete=True)
        made[name] = producer
    return made


def mix_config(
    *, steps: int = 24, batch: int = 6, held_out: float = 0.3, takedown: str | None = None, **of_dataset: DatasetConfig
) -> LedgerConfig:
    """Half of the samples from each, at two resolutions."""
    phase = PlannedPhase(
        index=0,
        first_step=0,
        last_step=steps,
        weights={32: 0.5, 64: 0.5},
        global_batch=batch,
        micro_batch_tokens=30,
        lr_scale=1.0,
        where=None,
    )
    return LedgerConfig(
        phases=(phase,),
        seed=1,
        caption_dropout=0.2,
        where=None,
        held_out=held_out,
        max_held_out=4,
        mix=Mix(unit="weight", amounts={"photos": 1.0, "text": 1.0}),
        of_dataset=of_dataset,
        takedown=takedown,
    )


def open_mix(run: Path, producers: Mapping[str, FakeProducer], config: LedgerConfig) -> Generations:
    """What a rank 0 does at start."""
    facets = next(iter(producers.values())).facets
    datasets = {name: producer.dataset for name, producer in producers.items()}
    generations = Generations(run, datasets, facets, config, follow=False)
    generations.verify()
    return generations
