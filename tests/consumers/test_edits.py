"""Edits from files to micro-batches: conditions of any number and size, texts that saw them, and beside images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_dataset import (
    FakeProducer,
    FakeRow,
    bucket_of,
    condition_sizes,
    fake_condition,
    fake_features,
    fake_latents,
    make_rows,
    seen_with,
)

from consumers.batch import MicroBatch, RankBatch
from consumers.data_sets import check_ready
from consumers.held_out import find_other_classes, make_held_out
from consumers.stream import Stream
from consumers.throughput import micro_batch_flops
from qwenimg_dist.compose import load_config
from qwenimg_dist.data.catalog_build import build_catalog
from qwenimg_dist.data.facets import DataError
from qwenimg_dist.data.generations import Generations
from qwenimg_dist.data.ledger_config import LedgerConfig
from qwenimg_dist.data.mix import Mix
from qwenimg_dist.data.phases import PlannedPhase
from qwenimg_dist.data.pins import ready_units
from qwenimg_dist.models.transformer import forward_flops
from qwenimg_dist.schema import EDIT, IMAGE, Bucket, caption_key

SIZES = ((256, 256), (64, 130), (150, 70))
STEPS = 24
BUDGET = 60
Slots = dict[int, tuple[str, float]]


def make_producers(root: Path, *, dtype: str = "bfloat16", posterior: bool = False) -> dict[str, FakeProducer]:
    """Images and edits, each a data set of its own, of facets of their own."""
    made = {}
    for name, fingerprint, num in (("edits", "eeeeeeeeeeee", 40), ("photos", "0123456789ab", 24)):
        producer = FakeProducer(
            root / name,
            unit_size=8,
            resolutions=(32, 64, 128),
            dtype=dtype,
            max_shard_bytes=20_000,
            logvar=posterior,
            edits=name == "edits",
            fingerprint=fingerprint,
        )
        producer.add(make_rows(num, start=0 if name == "edits" else 100, captions=2, sizes=SIZES))
        producer.produce(complete=True)
        made[name] = producer
    return made


def open_run(
    run: Path, producers: Mapping[str, FakeProducer], *, resolutions: tuple[int, ...] = (32, 64), seed: int = 1
) -> Generations:
    """Half of the samples from each data set, if there are two; what a rank 0 does at start."""
    several = len(producers) > 1
    phase = PlannedPhase(
        index=0,
        first_step=0,
        last_step=STEPS,
        weights=dict.fromkeys(resolutions, 0.5),
        global_batch=6,
        micro_batch_tokens=BUDGET,
        lr_scale=1.0,
        where=None,
    )
    config = LedgerConfig(
        phases=(phase,),
        seed=seed,
        caption_dropout=0.3,
        where=None,
        held_out=0.3,
        max_held_out=6,
        mix=Mix(unit="weight", amounts=dict.fromkeys(producers, 1.0)) if several else None,
    )
    facets = {
        name: replace(p.facets, latents={r: p.facets.latents[r] for r in resolutions}) for name, p in producers.items()
    }
    first, *others = facets.items()
    named = replace(first[1], of_dataset=dict(others)) if several else first[1]
    datasets = {name if several else "": producer.dataset for name, producer in producers.items()}
    made = Generations(run, datasets if several else datasets[""], named, config, follow=False)
    made.verify()
    made.advance(0)
    return made


def rows_of(producers: Mapping[str, FakeProducer]) -> dict[str, tuple[FakeRow, FakeProducer]]:
    several = len(producers) > 1
    return {
        (f"{name}/" if several else "") + row.key: (row, producer)
        for name, producer in producers.items()
        for row in producer.rows
    }


def check(batch: RankBatch, run: Generations, producers: Mapping[str, FakeProducer]) -> Slots:
    """Every tensor against the fake encoders; returns slot -> key and weight."""
    rows = rows_of(producers)
    seen: Slots = {}
    text_keys: dict[int, str] = {}
    for _, where, places in run.ledger.catalogs.text_places(batch.batch.texts):
        text_keys.update(zip(batch.batch.texts[where].tolist(), (key.decode() for key in places.keys), strict=True))
    for micro in (one.to("cpu") for one in batch.micro_batches):
        bucket = micro.bucket
        assert bucket == batch.batch.bucket
        for index, slot in enumerate(micro.slots.tolist()):
            at = min(slot, len(batch.keys) - 1)
            row, producer = rows[batch.keys[at]]
            check_pictures(micro, index, row, producer, batch.batch.resolution)
            # Its own words, or the empty prompt; of an edit the empty instruction that saw its own pictures.
            texts = {**producer.texts_of(row), **({} if producer.edits else {caption_key(""): ""})}
            features = fake_features(texts[text_keys[int(batch.batch.texts[at])]])
            assert np.array_equal(micro.text[index, : len(features)].float().numpy(), features)
            seen[slot] = (batch.keys[at], float(micro.weights[index]))
    return seen


def check_pictures(micro: MicroBatch, index: int, row: FakeRow, producer: FakeProducer, resolution: int) -> None:
    own = bucket_of(row, resolution)
    assert own is not None
    sizes = condition_sizes(row, resolution) if producer.edits else []
    assert micro.bucket == Bucket(height=own.height, width=own.width, conditions=tuple(sizes))
    assert np.array_equal(micro.latents[index].float().numpy(), fake_latents(row.key, own))
    assert len(micro.conditions) == len(sizes)
    for number, condition in enumerate(micro.conditions):
        assert condition.dtype == micro.latents.dtype
        assert np.array_equal(condition[index].float().numpy(), fake_condition(row, number, resolution))


@pytest.mark.parametrize(("world", "stored"), [(1, "bfloat16"), (3, "float32")])
def test_the_ranks_together_are_the_global_batch_and_no_micro_batch_exceeds_the_budget(
    tmp_path: Path, world: int, stored: str
) -> None:
    producers = {"edits": make_producers(tmp_path, dtype=stored)["edits"]}
    run = open_run(tmp_path / "run", producers)
    streams = [Stream(run.ledger, rank=rank, world=world, compute_dtype=torch.float32) for rank in range(world)]
    numbers, shapes = set(), set()
    for step in range(STEPS):
        batches = [stream.get(step) for stream in streams]
        assert len({tuple(len(micro.weights) for micro in batch.micro_batches) for batch in batches}) == 1
        seen = {slot: found for batch in batches for slot, found in check(batch, run, producers).items()}
        assert sorted(seen) == list(range(-(-6 // world) * world))
        assert sum(weight for _, weight in seen.values()) == batches[0].num_real
        bucket = batches[0].batch.bucket
        numbers.add(len(bucket.conditions))
        shapes.add(bucket)
        for batch in batches:
            for micro in batch.micro_batches:
                tokens = (
                    bucket.image_tokens + sum(h * w // 256 for h, w in bucket.conditions) + micro.text.shape[1]
                ) * (len(micro.weights))
                assert tokens <= BUDGET or len(micro.weights) == 1
            assert batch.image_tokens == bucket.tokens * sum(len(micro.weights) for micro in batch.micro_batches)
            assert 0 <= batch.padding <= 1
    assert numbers == {1, 2}
    assert len(shapes) > 6
    for stream in streams:
        stream.close()


def test_flops_count_the_tokens_of_conditions(tmp_path: Path) -> None:
    producers = {"edits": make_producers(tmp_path)["edits"]}
    run = open_run(tmp_path / "run", producers)
    stream = Stream(run.ledger, rank=0, world=1, compute_dtype=torch.float32)
    micro = stream.get(0).micro_batches[0]
    stream.close()
    model = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
    _, computed = micro_batch_flops(model, micro)
    tokens = sum(one.shape[2] * one.shape[3] // 4 for one in (micro.latents, *micro.conditions))
    assert tokens > micro.bucket.image_tokens
    assert computed == len(micro.weights) * forward_flops(model, tokens, micro.text.shape[1])


def test_beside_images_every_step_is_of_one_kind_on_any_number_of_ranks_and_from_any_step(tmp_path: Path) -> None:
    producers = make_producers(tmp_path)
    run = open_run(tmp_path / "run", producers)
    unbroken = Stream(run.ledger, rank=0, world=1, compute_dtype=torch.float32)
    expected = []
    for step in range(STEPS):
        batch = unbroken.get(step)
        expected.append(check(batch, run, producers))
        assert len({key.partition("/")[0] for key in batch.keys}) == 1  # a bucket has conditions or has none
    unbroken.close()
    counts = {
        name: sum(key.startswith(name) for slots in expected for key, w in slots.values() if w) for name in producers
    }
    assert min(counts.values()) > 0.3 * sum(counts.values())
    for stop in range(0, STEPS, 5):
        world = 1 + stop % 4
        resumed = open_run(tmp_path / "run", producers)
        streams = [Stream(resumed.ledger, rank=rank, world=world, compute_dtype=torch.float32) for rank in range(world)]
        for step in range(stop, min(stop + 2, STEPS)):
            batches = [stream.get(step) for stream in streams]
            together = {s: v for batch in batches for s, v in check(batch, resumed, producers).items()}
            assert {s: v for s, v in together.items() if s in expected[step]} == expected[step]
            assert all(weight == 0 for s, (_, weight) in together.items() if s not in expected[step])
        for stream in streams:
            stream.close()


def test_held_out_edits_at_every_class_beside_images(tmp_path: Path) -> None:
    producers = make_producers(tmp_path)
    run = open_run(tmp_path / "run", producers, resolutions=(64,))
    config = load_config(["evaluate.num_samples=8"])
    streams = [Stream(run.ledger, rank=rank, world=2, compute_dtype=torch.float32) for rank in range(2)]
    others = find_other_classes(config, run, None, {64})
    rows = rows_of(producers)
    for resolution in (32, 64):
        found = [make_held_out(config, run, stream, None, {64: 60}, others)[resolution] for stream in streams]
        assert {key.partition("/")[0] for key in found[0].keys} == {"edits", "photos"}
        slots = []
        for one in found:
            for micro in one.batches:
                for index, (slot, weight) in enumerate(zip(micro.slots.tolist(), micro.weights.tolist(), strict=True)):
                    row, producer = rows[one.keys[slot]]
                    check_pictures(micro, index, row, producer, resolution)
                    first = list(producer.texts_of(row).values())[1 if producer.edits else 0]
                    features = fake_features(first)
                    assert np.array_equal(micro.text[index, : len(features)].numpy(), features)
                    slots += [slot] * (weight > 0)
        assert sorted(slots) == list(range(len(found[0].keys)))
        assert len({len(one.batches) for one in found}) == 1
    for stream in streams:
        stream.close()


def test_samples_of_the_posterior_are_of_the_target_alone(tmp_path: Path) -> None:
    producers = {"edits": make_producers(tmp_path, posterior=True)["edits"]}
    producers["edits"].facets = replace(producers["edits"].facets, further=("logvar",))
    run = open_run(tmp_path / "run", producers)
    stream = Stream(run.ledger, rank=0, world=1, compute_dtype=torch.float32, further=["logvar"])
    for step in range(4):
        batch = stream.get(step)
        check(batch, run, producers)
        assert all(m.logvar is not None and m.logvar.shape == m.latents.shape for m in batch.micro_batches)
    stream.close()


def test_what_cannot_be_trained_on_is_named(tmp_path: Path) -> None:
    producers = make_producers(tmp_path)
    edits, photos = producers["edits"], producers["photos"]
    as_images = replace(edits.facets, kind=IMAGE)
    with pytest.raises(
        DataError, match=r"holds samples of kind edit, this run trains on kind image: .*data\.kind=edit"
    ):
        check_ready({"": edits.dataset.root}, as_images)
    with pytest.raises(DataError, match=r"data\.mix\.b: .*holds samples of kind image, this run trains on kind edit"):
        check_ready({"a": edits.dataset.root, "b": photos.dataset.root}, edits.facets)
    units = ready_units(edits.dataset, edits.facets)
    with pytest.raises(DataError, match="holds samples of kind edit, this run trains on kind image"):
        build_catalog(edits.dataset, units, as_images, tmp_path / "index")
    units = ready_units(photos.dataset, photos.facets)
    with pytest.raises(DataError, match="holds samples of kind image, this run trains on kind edit"):
        build_catalog(photos.dataset, units, replace(photos.facets, kind=EDIT), tmp_path / "index")


def test_dropped_instructions_leave_the_pictures(tmp_path: Path) -> None:
    producers = {"edits": make_producers(tmp_path)["edits"]}
    run = open_run(tmp_path / "run", producers)
    rows = {row.key: row for row in producers["edits"].rows}
    empty = {
        seen_with("", [f"{k}{row.key}" for k in range(2)][: len(condition_sizes(row, 32))]) for row in rows.values()
    }
    stream = Stream(run.ledger, rank=0, world=1, compute_dtype=torch.float32)
    dropped = 0
    for step in range(STEPS):
        batch = stream.get(step)
        for micro in batch.micro_batches:
            for index in range(len(micro.weights)):
                features = micro.text[index].numpy()
                dropped += any(
                    np.array_equal(features[: len(made)], made) and not features[len(made) :].any()
                    for made in map(fake_features, empty)
                )
    stream.close()
    assert 0.15 < dropped / (6 * STEPS) < 0.45
