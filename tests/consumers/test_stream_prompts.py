"""Prompts in batches: each fills a group's slots in a row, whatever the ranks, with its words, meta and no latents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fake_dataset import WIDTH, FakeProducer, fake_features, make_rows, num_tokens

from consumers.run_plan import make_plan
from consumers.stream import Stream
from qwenimg_dist.compose import load_config
from qwenimg_dist.data.facets import DataError
from qwenimg_dist.data.generations import Generations
from qwenimg_dist.data.ledger_config import LedgerConfig
from qwenimg_dist.data.phases import PlannedPhase
from qwenimg_dist.schema import Bucket

GROUP, PROMPTS = 3, 5


def make_run(root: Path, *, shapes: tuple[Bucket, ...] = ()) -> tuple[FakeProducer, Generations]:
    producer = FakeProducer(root / "data", unit_size=8, resolutions=(32, 64), prompts=True)
    producer.add(make_rows(24))
    producer.produce(complete=True)
    phase = PlannedPhase(
        index=0,
        first_step=0,
        last_step=8,
        weights={32: 1.0},
        global_batch=PROMPTS,
        micro_batch_tokens=60,
        lr_scale=1.0,
        where="row != 3",
        drawn={32: shapes} if shapes else {},
    )
    config = LedgerConfig(phases=(phase,), seed=1, caption_dropout=0.0, where=None, held_out=0.1, max_held_out=2)
    run = Generations(root / "run", producer.dataset, producer.facets, config, follow=False)
    run.advance(0)
    return producer, run


@pytest.mark.parametrize("world", [1, 2, 4])
def test_groups_fill_the_ranks_slots_in_order(tmp_path: Path, world: int) -> None:
    producer, run = make_run(tmp_path)
    texts = {row.captions[0]: number for number, row in enumerate(producer.rows)}
    seen: dict[int, int] = {}
    for rank in range(world):
        stream = Stream(run.ledger, rank=rank, world=world, compute_dtype=torch.float32, repeat=GROUP, guided=True)
        for step in range(5):
            batch = stream.get(step)
            assert batch.batch.rows.shape == (PROMPTS * GROUP,)
            assert batch.num_real == run.ledger.batch(step).num_real * GROUP
            words = run.catalogs.prompts(batch.batch.rows)
            for micro in batch.micro_batches:
                assert micro.num_slots == PROMPTS * GROUP
                assert micro.latents.shape == (len(micro.slots), 16, 4, 4)
                assert micro.pictures_per_row == 2
                assert 2 * len(micro.slots) * (4 + micro.text.shape[1]) <= max(60, 2 * (4 + micro.text.shape[1]))
                assert micro.negative is not None
                np.testing.assert_array_equal(micro.negative.numpy(), fake_features(""))
                for row, slot in enumerate(micro.slots.tolist()):
                    if slot >= PROMPTS * GROUP:
                        assert micro.weights[row] == 0
                        continue
                    text, meta = words[slot]
                    number = texts[text]
                    assert meta == ({"number": number} if number % 2 else {})
                    assert number != 3
                    features = torch.from_numpy(fake_features(text))
                    assert torch.equal(micro.text[row, : num_tokens(text)], features)
                    if step == 0:
                        seen[slot] = number
                assert all(one.device.type == "cpu" for one in (micro.to("cpu").latents, micro.to("cpu").slots))
        stream.close()
    assert sorted(seen) == list(range(PROMPTS * GROUP))
    assert all(seen[slot] == seen[slot - slot % GROUP] for slot in seen)
    assert len(set(seen.values())) == PROMPTS


@pytest.mark.parametrize("world", [1, 2])
def test_shapes_come_in_turn_for_all_ranks_and_change_nothing_else(tmp_path: Path, world: int) -> None:
    shapes = (Bucket(height=16, width=64), Bucket(height=32, width=32), Bucket(height=64, width=16))
    _, square = make_run(tmp_path / "square")
    _, run = make_run(tmp_path / "shaped", shapes=shapes)
    made = {}
    for rank in range(world):
        stream = Stream(run.ledger, rank=rank, world=world, compute_dtype=torch.float32, repeat=GROUP, guided=True)
        for step in range(8):
            batch = stream.get(step)
            shape = shapes[step % 3]
            assert batch.batch.bucket == shape
            for micro in batch.micro_batches:
                assert micro.bucket == shape
                assert micro.latents.shape[2:] == (shape.height // 8, shape.width // 8)
            made[rank, step] = [len(micro.slots) for micro in batch.micro_batches]
            np.testing.assert_array_equal(run.ledger.batch(step).rows, square.ledger.batch(step).rows)
            np.testing.assert_array_equal(run.ledger.batch(step).weights, square.ledger.batch(step).weights)
        stream.close()
    assert all(made[0, step] == made[rank, step] for rank, step in made)  # as many forwards
    prompts = {step: set(run.ledger.batch(step).rows.tolist()) for step in range(8)}
    drawn_as = {
        row: {step % 3 for step, rows in prompts.items() if row in rows} for row in set().union(*prompts.values())
    }
    assert max(map(len, drawn_as.values())) > 1  # a prompt is not bound to a shape


def test_the_plan_counts_shapes_as_they_come(tmp_path: Path) -> None:
    shapes = (Bucket(height=16, width=48), Bucket(height=48, width=16))
    _, run = make_run(tmp_path, shapes=shapes)
    plan = make_plan(
        run.ledger, load_config(["stage=grpo", "optim.ema_decay=0.2"]).optim, world_size=2, pictures=2, repeat=GROUP
    )
    tally = plan.phases[0].streams[0].tally
    batches = [run.ledger.batch(step) for step in range(8)]
    for shape in shapes:
        mine = [batch for batch in batches if batch.bucket == shape]
        assert (tally.buckets[shape].batches, tally.buckets[shape].images) == (4, sum(one.num_real for one in mine))
    assert (
        tally.samples
        == make_plan(make_run(tmp_path / "square")[1].ledger, load_config([]).optim, world_size=2)
        .phases[0]
        .streams[0]
        .tally.samples
    )
    assert tally.left_over == tally.samples % PROMPTS
    assert plan.warnings() == []


def test_the_plan_counts_groups_and_both_prompts(tmp_path: Path) -> None:
    _, run = make_run(tmp_path)
    optim = load_config(["stage=grpo"]).optim
    plan = make_plan(run.ledger, optim, world_size=2, pictures=2, repeat=GROUP)
    (cut,) = plan.phases[0].streams[0].micro_batches.values()
    assert sum(cut.long) == -(-PROMPTS * GROUP // 2)
    assert max(cut.long) * 2 * (4 + max(num_tokens(row.captions[0]) for row in make_rows(24))) <= 60


def test_prompts_are_no_images_and_images_no_prompts(tmp_path: Path) -> None:
    producer = FakeProducer(tmp_path / "images", unit_size=8, resolutions=(32,))
    producer.add(make_rows(8))
    producer.produce(complete=True)
    _, run = make_run(tmp_path)
    mixed = Generations(tmp_path / "other", producer.dataset, run.facets, run.config, follow=False)
    with pytest.raises(DataError, match="holds samples of kind image, this run trains on kind prompt"):
        mixed.advance(0)


def test_a_catalog_of_images_has_no_prompts(tmp_path: Path) -> None:
    producer = FakeProducer(tmp_path / "images", unit_size=8, resolutions=(32,))
    producer.add(make_rows(8))
    producer.produce(complete=True)
    _, run = make_run(tmp_path)
    images = Generations(tmp_path / "other", producer.dataset, producer.facets, run.config, follow=False)
    images.advance(0)
    assert fake_features("").shape == (2, WIDTH)
    with pytest.raises(DataError, match="compiled without prompts"):
        images.catalogs.prompts(np.array([0]))
