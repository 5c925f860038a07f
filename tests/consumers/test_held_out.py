"""The frozen held-out set: the right tensors at every class, trained or not, on any number of ranks, from any data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fake_dataset import FakeProducer, FakeRow, bucket_of, facets_for, fake_features, fake_latents, make_rows

from consumers.held_out import HeldOutClass, Start, find_other_classes, make_held_out
from consumers.stream import Stream
from qwenimg_dist.compose import load_config
from qwenimg_dist.config import Config
from qwenimg_dist.data.facets import DataError, Dataset
from qwenimg_dist.data.generations import Generations
from qwenimg_dist.data.ledger_config import LedgerConfig
from qwenimg_dist.data.mix import Mix
from qwenimg_dist.data.phases import PlannedPhase

SIZES = ((256, 256), (128, 256), (40, 40))
TRAINED = {64: 30}


def produce(root: Path, start: int, num: int, resolutions: tuple[int, ...] = (32, 64, 128)) -> FakeProducer:
    producer = FakeProducer(root, unit_size=8, resolutions=resolutions)
    producer.add(make_rows(num, start=start, captions=2, sizes=SIZES))
    producer.produce(complete=True)
    return producer


def generations(run: Path, datasets: Dataset | dict[str, Dataset]) -> Generations:
    phase = PlannedPhase(
        index=0,
        first_step=0,
        last_step=10,
        weights={64: 1.0},
        global_batch=4,
        micro_batch_tokens=30,
        lr_scale=1.0,
        where=None,
    )
    config = LedgerConfig(
        phases=(phase,),
        seed=1,
        caption_dropout=0.2,
        where=None,
        held_out=0.5,
        max_held_out=20,
        mix=Mix(unit="weight", amounts=dict.fromkeys(datasets, 1.0)) if isinstance(datasets, dict) else None,
    )
    made = Generations(run, datasets, facets_for((64,)), config, follow=False)
    made.advance(0)
    return made


def held_out(
    run: Generations, *, rank: int = 0, world: int = 1, config: Config | None = None, start: Start | None = None
) -> dict[int, HeldOutClass]:
    config = config or load_config(["evaluate.num_samples=9"])
    stream = Stream(run.ledger, rank=rank, world=world, compute_dtype=torch.float32)
    try:
        return make_held_out(config, run, stream, start, TRAINED, find_other_classes(config, run, start, set(TRAINED)))
    finally:
        stream.close()


def check(found: dict[int, HeldOutClass], rows: list[FakeRow], names: dict[str, str]) -> dict[int, list[int]]:
    """Every tensor against the fake encoders; returns the slots with weight of each class, in order."""
    by_key = {names.get(row.uri, "") + row.key: row for row in rows}
    slots: dict[int, list[int]] = {}
    for resolution, one in found.items():
        slots[resolution] = []
        for micro in one.batches:
            for index, (slot, weight) in enumerate(zip(micro.slots.tolist(), micro.weights.tolist(), strict=True)):
                row = by_key[one.keys[slot]]
                bucket = bucket_of(row, resolution)
                assert bucket == micro.bucket
                assert str(bucket) == one.buckets[slot]
                assert np.array_equal(micro.latents[index].float().numpy(), fake_latents(row.key, micro.bucket))
                text = fake_features(row.captions[0])
                assert one.tokens[slot] == len(text)
                assert np.array_equal(micro.text[index, : len(text)].numpy(), text)
                slots[resolution] += [slot] * (weight > 0)
    return slots


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_ranks_have_every_sample_once_at_every_class_and_as_many_forwards(tmp_path: Path, world: int) -> None:
    producer = produce(tmp_path / "data", 0, 40)
    run = generations(tmp_path / "run", producer.dataset)
    found = [held_out(run, rank=rank, world=world) for rank in range(world)]
    slots = [check(one, producer.rows, {}) for one in found]
    for resolution in (32, 64, 128):
        union = sorted(slot for one in slots for slot in one[resolution])
        assert union == list(range(len(found[0][resolution].keys)))
        assert len({len(one[resolution].batches) for one in found}) == 1
        assert len({one[resolution].keys for one in found}) == 1
    assert len(found[0][32].keys) == 9  # all are large enough; at 128 px a third of the pictures is too small
    assert {row.width for row in producer.rows if row.key in found[0][128].keys} == {128, 256}


def test_several_data_sets_one_of_which_lacks_a_class(tmp_path: Path) -> None:
    one, other = produce(tmp_path / "one", 0, 30), produce(tmp_path / "other", 100, 30, (64, 128))
    run = generations(tmp_path / "run", {"one": one.dataset, "other": other.dataset})
    found = held_out(run)
    names = {row.uri: "one/" for row in one.rows} | {row.uri: "other/" for row in other.rows}
    slots = check(found, [*one.rows, *other.rows], names)
    for resolution in (32, 64, 128):
        assert sorted(slots[resolution]) == list(range(len(found[resolution].keys)))
    assert {key.split("/")[0] for key in found[32].keys} == {"one"}
    assert {key.split("/")[0] for key in found[128].keys} == {"one", "other"}


def test_a_run_keeps_its_set_when_the_data_set_gets_more(tmp_path: Path) -> None:
    producer = produce(tmp_path / "data", 0, 40, (64, 128))
    run = generations(tmp_path / "run", producer.dataset)
    config = load_config(["evaluate.num_samples=9", "evaluate.sigma_quantiles=[0.5]"])
    before = held_out(run, config=config)
    assert sorted(before) == [64, 128]
    start = Start(
        num_samples=9,
        quantiles=(0.5,),
        seed=0,
        keys={resolution: one.keys for resolution, one in before.items()},
        errors={resolution: np.zeros((len(one.keys), 1)) for resolution, one in before.items()},
    )
    producer.facets = facets_for((32, 64, 128))
    producer.produce(complete=True)  # 32 px is there now
    changed = load_config(["evaluate.num_samples=4"])
    again = generations(tmp_path / "run", producer.dataset)
    after = held_out(again, config=changed, start=start)
    assert {r: one.keys for r, one in after.items()} == {r: one.keys for r, one in before.items()}
    assert sorted(held_out(again)) == [32, 64, 128]

    lost = Start(**{**start.__dict__, "keys": {**start.keys, 128: ("gone", *start.keys[128][1:])}})
    with pytest.raises(ValueError, match=r"at 128 px is not what .* 1 of \d+ samples are gone \(first gone\)"):
        held_out(again, start=lost)
    assert sorted(held_out(again, start=lost, config=load_config(["evaluate.resolutions=[64]"]))) == [64]


def test_latents_of_another_encoder_are_no_other_class(tmp_path: Path) -> None:
    stranger = FakeProducer(tmp_path / "data", unit_size=8, resolutions=(128,), fingerprint="ffffffffffff")
    stranger.add(make_rows(40, captions=2, sizes=SIZES))
    stranger.produce(complete=True)
    producer = produce(tmp_path / "data", 0, 40, (64,))
    assert "latents-128-ffffffffffff" in producer.dataset.facets()
    run = generations(tmp_path / "run", producer.dataset)
    assert run.other_facets() == {}
    assert sorted(held_out(run)) == [64]


def test_a_held_out_sample_that_cannot_be_read_is_named_with_the_way_on(tmp_path: Path) -> None:
    producer = produce(tmp_path / "data", 0, 40)
    run = generations(tmp_path / "run", producer.dataset)
    for tar in (tmp_path / "data").glob("latents-64-*/*.tar"):
        tar.unlink()
    with pytest.raises(DataError, match=r"latents-64.*cannot be opened.* held out, .*evaluate\.every=0 trains without"):
        held_out(run)
