"""A stream over two data sets, on files: tensors are those of the right data set, whatever was stopped when."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from fake_dataset import FakeProducer, FakeRow, fake_features, fake_latents
from fake_mix import make_producers, mix_config, open_mix

from consumers.batch import RankBatch
from consumers.stream import Stream
from qwenimg_dist.data.generations import Generations
from qwenimg_dist.schema import caption_key

STEPS = 8
Slots = dict[int, tuple[str, float]]


def check(batch: RankBatch, run: Generations, producers: dict[str, FakeProducer]) -> Slots:
    """Every tensor against the fake encoders; returns slot -> key and weight."""
    rows: dict[str, FakeRow] = {f"{name}/{row.key}": row for name, p in producers.items() for row in p.rows}
    captions = {caption_key(text): text for row in rows.values() for text in ("", *row.captions)}
    texts: dict[int, str] = {}
    for _, where, places in run.ledger.catalogs.text_places(batch.batch.texts):
        texts.update(zip(batch.batch.texts[where].tolist(), (captions[k.decode()] for k in places.keys), strict=True))
    seen: Slots = {}
    for micro in (one.to("cpu") for one in batch.micro_batches):
        for i, slot in enumerate(micro.slots.tolist()):
            at = min(slot, len(batch.keys) - 1)
            key, text = batch.keys[at], texts[int(batch.batch.texts[at])]
            assert np.array_equal(micro.latents[i].numpy(), fake_latents(rows[key].key, micro.bucket))
            features = fake_features(text)
            assert np.array_equal(micro.text[i, : len(features)].numpy(), features)
            assert text in ("", *rows[key].captions)
            seen[slot] = (key, float(micro.weights[i]))
    return seen


def test_stopped_at_every_step_and_gone_on_with_other_ranks(tmp_path: Path) -> None:
    producers = make_producers(tmp_path)
    run = open_mix(tmp_path / "run", producers, mix_config(steps=STEPS))
    run.advance(0)
    unbroken = Stream(run.ledger, rank=0, world=1, compute_dtype=torch.float32)
    expected = [check(unbroken.get(step), run, producers) for step in range(STEPS)]
    unbroken.close()
    names = {key.partition("/")[0] for slots in expected for key, _ in slots.values()}
    assert names == {"photos", "text"}
    assert sum(len({key.partition("/")[0] for key, _ in slots.values()}) == 2 for slots in expected) > STEPS // 2
    for stop in range(STEPS):
        world = 1 + stop % 4
        resumed = open_mix(tmp_path / "run", producers, mix_config(steps=STEPS))
        resumed.advance(stop)
        streams = [Stream(resumed.ledger, rank=rank, world=world, compute_dtype=torch.float32) for rank in range(world)]
        for step in range(stop, min(stop + 2, STEPS)):
            batches = [stream.get(step) for stream in streams]
            assert len({tuple(len(micro.weights) for micro in batch.micro_batches) for batch in batches}) == 1
            together = {s: v for batch in batches for s, v in check(batch, resumed, producers).items()}
            assert {s: v for s, v in together.items() if s in expected[step]} == expected[step]
            assert all(weight == 0 for s, (_, weight) in together.items() if s not in expected[step])
            assert sum(weight for _, weight in together.values()) == batches[0].num_real
        for stream in streams:
            stream.close()
