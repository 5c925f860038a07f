"""The ranks' cuts together are the global batch, tensors are what was written, and faults arrive where they belong."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_dataset import (
    WIDTH,
    FakeProducer,
    FakeRow,
    fake_features,
    fake_latents,
    fake_logvar,
    fake_rejected,
    make_rows,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from consumers.batch import RankBatch
from consumers.reference_errors import ReferenceErrors
from consumers.stream import Stream, cut_for
from qwenimg_dist.data.catalog import Ints
from qwenimg_dist.data.catalog_build import build_catalog
from qwenimg_dist.data.catalogs import Catalogs
from qwenimg_dist.data.facets import DataError
from qwenimg_dist.data.generations import Generations
from qwenimg_dist.data.ledger_config import LedgerConfig
from qwenimg_dist.data.phases import PlannedPhase
from qwenimg_dist.data.pins import ready_units
from qwenimg_dist.data.reader import TarReader
from qwenimg_dist.schema import caption_key

SIZES = ((256, 256), (64, 130), (150, 70))
STEPS = 24


def make_run(
    root: Path,
    *,
    batch: int = 6,
    dtype: str = "bfloat16",
    follow: bool = False,
    num: int = 30,
    logvar: bool = False,
    pairs: bool = False,
) -> tuple[FakeProducer, Generations]:
    sizes = {"unit_size": 8, "max_shard_bytes": 20_000}
    producer = FakeProducer(root / "data", resolutions=(32, 64), dtype=dtype, logvar=logvar, pairs=pairs, **sizes)
    if logvar:
        producer.facets = replace(producer.facets, further=("logvar",))
    producer.add(make_rows(num, captions=2, sizes=SIZES))
    producer.produce(complete=not follow)
    phase = PlannedPhase(
        index=0,
        first_step=0,
        last_step=STEPS,
        weights={32: 0.5, 64: 0.5},
        global_batch=batch,
        micro_batch_tokens=30,
        lr_scale=1.0,
        where=None,
    )
    config = LedgerConfig(phases=(phase,), seed=1, caption_dropout=0.2, where=None, held_out=0.3, max_held_out=7)
    run = Generations(root / "run", producer.dataset, producer.facets, config, follow=follow)
    run.advance(0)
    return producer, run


def captions_by_key(producer: FakeProducer) -> dict[str, str]:
    return {caption_key(caption): caption for row in producer.rows for caption in ("", *row.captions)}


def check(batch: RankBatch, run: Generations, producer: FakeProducer, compute: torch.dtype) -> list[tuple[int, float]]:
    """Every tensor of a rank's batch against the fake encoders; returns (slot, weight)."""
    rows = {row.key: row for row in producer.rows}
    captions = captions_by_key(producer)
    texts: dict[int, str] = {}
    for _, where, places in run.ledger.catalogs.text_places(batch.batch.texts):
        found = [captions[key.decode()] for key in places.keys]
        texts.update(zip(batch.batch.texts[where].tolist(), found, strict=True))
    seen = []
    for micro in (one.to("cpu") for one in batch.micro_batches):
        size = len(micro.weights)
        assert micro.latents.dtype == torch.float32
        assert micro.text.dtype == compute
        assert micro.bucket == batch.batch.bucket
        lengths = []
        for i in range(size):
            slot = int(micro.slots[i])
            at = min(slot, len(batch.keys) - 1)
            row = rows[batch.keys[at]]
            assert np.array_equal(micro.latents[i].numpy(), fake_latents(row.key, micro.bucket))
            features = fake_features(texts[int(batch.batch.texts[at])])
            assert np.array_equal(micro.text[i, : len(features)].float().numpy(), features)
            assert not micro.text[i, len(features) :].any()
            lengths.append(len(features))
            expected = batch.batch.weights[at] if slot < len(batch.keys) else 0.0
            assert float(micro.weights[i]) == expected
            seen.append((slot, float(micro.weights[i])))
        assert micro.text.shape == (size, max(lengths), WIDTH)
        if len(set(lengths)) == 1:
            assert micro.text_mask is None
        else:
            assert micro.text_mask is not None
            assert micro.text_mask.dtype == torch.bool
            assert micro.text_mask.sum(1).tolist() == lengths
    return seen


@pytest.mark.parametrize(
    ("world", "stored", "compute"),
    [(1, "bfloat16", torch.float32), (2, "float32", torch.bfloat16), (4, "bfloat16", torch.bfloat16)],
)
def test_the_ranks_together_are_the_global_batch(tmp_path: Path, world: int, stored: str, compute: torch.dtype) -> None:
    producer, run = make_run(tmp_path, dtype=stored)
    streams = [Stream(run.ledger, rank=rank, world=world, compute_dtype=compute) for rank in range(world)]
    for step in range(STEPS):
        batches = [stream.get(step) for stream in streams]
        assert len({len(batch.micro_batches) for batch in batches}) == 1
        assert len({tuple(batch.keys) for batch in batches}) == 1
        seen = [pair for batch in batches for pair in check(batch, run, producer, compute)]
        assert [slot for slot, _ in seen] == list(range(-(-6 // world) * world))
        assert sum(weight for _, weight in seen) == batches[0].num_real
        for batch in batches:
            budget = max((m.bucket.image_tokens + m.text.shape[1]) * len(m.weights) for m in batch.micro_batches)
            assert budget <= 30 or all(len(m.weights) == 1 for m in batch.micro_batches)
            assert 0 <= batch.padding <= 1
            assert batch.read_bytes > 0
    for stream in streams:
        stream.close()


def test_log_variances_come_only_where_they_are_asked_for(tmp_path: Path) -> None:
    producer, run = make_run(tmp_path, logvar=True)
    stream = Stream(run.ledger, rank=0, world=1, compute_dtype=torch.float32, further=["logvar"])
    plain = Stream(run.ledger, rank=0, world=1, compute_dtype=torch.float32)
    for step in range(6):
        batch, without = stream.get(step), plain.get(step)
        assert check(batch, run, producer, torch.float32) == check(without, run, producer, torch.float32)
        assert all(micro.logvar is None for micro in without.micro_batches)
        for micro in (one.to("cpu") for one in batch.micro_batches):
            assert micro.logvar is not None
            assert micro.num_slots == len(batch.keys)
            for slot, latents in zip(micro.slots.tolist(), micro.logvar, strict=True):
                assert np.array_equal(latents.numpy(), fake_logvar(batch.keys[slot], micro.bucket))
        latents_bytes = len(batch.keys) * 16 * (batch.batch.bucket.height // 8) * (batch.batch.bucket.width // 8) * 2
        assert batch.read_bytes - without.read_bytes == latents_bytes
    held_out = stream.held_out_batches(run.held_out(32, 5), micro_batch_tokens=30)
    assert all(micro.logvar is None for micro in held_out)
    stream.close()
    plain.close()


def test_pairs_are_rows_with_two_pictures(tmp_path: Path) -> None:
    producer, run = make_run(tmp_path, pairs=True)
    numbers = {row.key: number for number, row in enumerate(producer.rows)}
    streams = [
        Stream(run.ledger, rank=rank, world=2, compute_dtype=torch.float32, further=["rejected"]) for rank in range(2)
    ]
    for step in range(6):
        batches = [stream.get(step) for stream in streams]
        assert len({len(batch.micro_batches) for batch in batches}) == 1
        seen = [pair for batch in batches for pair in check(batch, run, producer, torch.float32)]
        assert sum(weight for _, weight in seen) == batches[0].num_real
        for batch in batches:
            budget = run.ledger.phases[0].micro_batch_tokens
            for micro in (one.to("cpu") for one in batch.micro_batches):
                assert micro.rejected is not None
                assert micro.numbers is not None
                keys = [batch.keys[min(slot, len(batch.keys) - 1)] for slot in micro.slots.tolist()]
                assert micro.numbers.tolist() == [numbers[key] for key in keys]
                for key, latents in zip(keys, micro.rejected, strict=True):
                    assert np.array_equal(latents.numpy(), fake_rejected(key, micro.bucket))
                tokens = 2 * len(keys) * (micro.bucket.image_tokens + micro.text.shape[1])
                assert tokens <= budget or len(keys) == 1
            assert batch.image_tokens == 2 * sum(len(m.weights) for m in batch.micro_batches) * (
                batch.batch.bucket.image_tokens
            )
            assert 0 <= batch.padding <= 1
    for stream in streams:
        stream.close()


class NumberedErrors(ReferenceErrors):
    """Errors that are the pair's number in the listing; NaN for one pair."""

    def __init__(self, catalogs: Catalogs, unknown: int = -1) -> None:
        self._catalogs = catalogs
        self._unknown = unknown

    def of(self, rows: Ints, texts: Ints, resolution: int) -> np.ndarray:
        numbers = self._catalogs.numbers(rows)
        values = np.where(numbers == self._unknown, np.nan, numbers).astype(np.float32)
        return np.broadcast_to(values[:, None, None], (len(rows), 4, 2))


def test_each_pair_has_its_own_reference_errors(tmp_path: Path) -> None:
    _, run = make_run(tmp_path, pairs=True)
    strict = Stream(run.ledger, rank=0, world=1, compute_dtype=torch.float32, further=["rejected"], prefetch=0)
    first = dict(zip(*keys_and_numbers(strict.get(0)), strict=True))
    lost = next(iter(first.values()))
    streams = [
        Stream(run.ledger, rank=rank, world=2, compute_dtype=torch.float32, further=["rejected"], tolerant=True)
        for rank in range(2)
    ]
    for stream in streams:
        stream.reference = NumberedErrors(run.ledger.catalogs, unknown=lost)
    seen = 0
    for step in range(1, 8):
        for batch in (stream.get(step) for stream in streams):
            for micro in (one.to("cpu") for one in batch.micro_batches):
                assert micro.numbers is not None
                assert micro.reference is not None
                assert micro.reference.shape == (len(micro.numbers), 4, 2)
                known = micro.numbers != lost
                assert (micro.reference[known] == micro.numbers[known][:, None, None]).all()
                assert (micro.reference[~known] == 0).all()
                assert (micro.weights[~known] == 0).all()
                seen += len(known)
            told = {one.key for one in batch.bad}
            assert told <= {key for key, number in first.items() if number == lost}
            assert bool(told) == any(bool((m.numbers == lost).any()) for m in batch.micro_batches)
    assert seen > 30
    for stream in streams:
        stream.close()
    strict.reference = NumberedErrors(run.ledger.catalogs, unknown=lost)
    computed = r"pair \w+ could not be read when the reference's errors were computed"
    with pytest.raises(
        DataError, match=rf"{computed}, which data\.max_bad_samples allowed then: set it to what it was"
    ):
        strict.get(0)
    strict.close()


def keys_and_numbers(batch: RankBatch) -> tuple[list[str], list[int]]:
    """Of a rank's cut."""
    slots = [slot for micro in batch.micro_batches for slot in micro.slots.tolist()]
    numbers = [n for micro in batch.micro_batches if micro.numbers is not None for n in micro.numbers.tolist()]
    return [batch.keys[min(slot, len(batch.keys) - 1)] for slot in slots], numbers


def test_pairs_are_no_images_and_images_no_pairs(tmp_path: Path) -> None:
    producer, _ = make_run(tmp_path, pairs=True)
    units = ready_units(producer.dataset, producer.facets)
    with pytest.raises(DataError, match="holds samples of kind preference, this run trains on kind image"):
        build_catalog(producer.dataset, units, replace(producer.facets, kind="image", further=()), tmp_path / "index")
    images, _ = make_run(tmp_path / "images")
    facets = replace(images.facets, kind="preference", further=("rejected",))
    with pytest.raises(DataError, match="holds samples of kind image, this run trains on kind preference"):
        build_catalog(images.dataset, ready_units(images.dataset, facets), facets, tmp_path / "index")


def test_data_without_log_variances_is_refused(tmp_path: Path) -> None:
    producer, _ = make_run(tmp_path)
    producer.facets = replace(producer.facets, further=("logvar",))
    with pytest.raises(DataError, match=r"has no tensor 'logvar' \(produce with encode.posterior=mean_logvar\)"):
        build_catalog(
            producer.dataset, ready_units(producer.dataset, producer.facets), producer.facets, tmp_path / "index"
        )


def test_any_step_first_and_tensors_outlive_later_reads(tmp_path: Path) -> None:
    _, run = make_run(tmp_path)
    walking = Stream(run.ledger, rank=0, world=1, compute_dtype=torch.float32)
    kept = [walking.get(step) for step in range(STEPS)]
    for step in (17, 3, 23, 4):
        jumping = Stream(run.ledger, rank=0, world=1, compute_dtype=torch.float32)
        fresh = jumping.get(step)
        assert fresh.keys == kept[step].keys
        for a, b in zip(fresh.micro_batches, kept[step].micro_batches, strict=True):
            assert torch.equal(a.latents, b.latents)  # the reader's buffers were used again since
            assert torch.equal(a.text, b.text)
        jumping.close()
    assert walking.get(2).keys == kept[2].keys
    with pytest.raises(ValueError, match="outside the plan"):
        walking.get(STEPS)
    walking.close()


@settings(max_examples=200, deadline=None)
@given(
    slots=st.integers(1, 50), world=st.integers(1, 9), image=st.integers(1, 40), text=st.integers(1, 40),
    budget=st.integers(1, 200),
)  # fmt: skip
def test_cuts(slots: int, world: int, image: int, text: int, budget: int) -> None:
    cuts = [cut_for(slots, image, text, budget, rank=rank, world=world) for rank in range(world)]
    assert len({tuple(cut.sizes) for cut in cuts}) == 1
    joined = np.concatenate([cut.slots for cut in cuts])
    assert joined.tolist() == list(range(-(-slots // world) * world))
    for cut in cuts:
        assert sum(cut.sizes) == len(cut.slots)
        assert max(cut.sizes) * (image + text) <= max(budget, image + text)
        assert max(cut.sizes) - min(cut.sizes) <= 1
        assert (cut.source < slots).all()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_held_out_batches_are_the_same_on_any_number_of_ranks(tmp_path: Path, world: int) -> None:
    producer, run = make_run(tmp_path)
    held_out = run.held_out(32, 6)
    keys = [key for group in held_out for key in run.ledger.catalogs.keys(group.rows)]
    slots = [int(slot) for group in held_out for slot in group.slots]
    key_of = dict(zip(slots, keys, strict=True))
    streams = [Stream(run.ledger, rank=rank, world=world, compute_dtype=torch.float32) for rank in range(world)]
    made = [stream.held_out_batches(held_out, micro_batch_tokens=30) for stream in streams]
    assert len({len(batches) for batches in made}) == 1
    assert len({tuple((m.bucket, len(m.weights)) for m in batches) for batches in made}) == 1
    seen = []
    rows = {row.key: row for row in producer.rows}
    for batches in made:
        for micro in (one.to("cpu") for one in batches):
            for i, slot in enumerate(micro.slots.tolist()):
                row: FakeRow = rows[key_of[slot]]
                assert np.array_equal(micro.latents[i].numpy(), fake_latents(row.key, micro.bucket))
                features = fake_features(row.captions[0])
                assert np.array_equal(micro.text[i, : len(features)].numpy(), features)
                if micro.weights[i]:
                    seen.append(slot)
    assert sorted(seen) == sorted(slots)
    for stream in streams:
        stream.close()


def test_faults_of_the_background_thread_arrive_in_their_step(tmp_path: Path) -> None:
    producer, run = make_run(tmp_path)
    stream = Stream(run.ledger, rank=0, world=1, compute_dtype=torch.float32, prefetch=1)
    stream.get(0)
    stream.close()
    for tar in (producer.dataset.root / producer.facets.text).glob("*.tar"):
        os.truncate(tar, 100)
    broken = Stream(run.ledger, rank=0, world=1, compute_dtype=torch.float32)
    for _ in range(2):  # also when asked again
        with pytest.raises(DataError, match=r"\.tar has 100 bytes.*data verify"):
            broken.get(1)
    broken.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stream")]


def test_a_batch_asked_for_ahead_of_its_generation_is_made_when_it_has_come(tmp_path: Path) -> None:
    producer, run = make_run(tmp_path, follow=True, num=64, dtype="float32")
    stream = Stream(run.ledger, rank=0, world=1, compute_dtype=torch.float32)
    step = 0
    while run.advance(step) == "ready":
        stream.get(step)
        step += 1
    with pytest.raises(DataError, match="used up"):
        stream.get(step)
    producer.add(make_rows(64, start=64, captions=2, sizes=SIZES))
    producer.produce()
    mixed = 0
    while step < STEPS and run.advance(step) == "ready":
        batch = stream.get(step)
        assert batch.batch.step == step
        check(batch, run, producer, torch.float32)
        # What the first generation left over shares a batch with rows of the second one's catalog.
        mixed += len(np.unique(batch.batch.rows < run.ledger.catalogs.row_base(1))) == 2
        step += 1
    assert mixed
    stream.close()


class Clock:
    """Stands in for the module `time`: moves by 7 s when first read after `at_next_look` was set, and calls that."""

    def __init__(self) -> None:
        self.now = 0.0
        self.at_next_look: Callable[[], None] | None = None

    def perf_counter(self) -> float:
        seen, call = self.now, self.at_next_look
        if call is not None:
            self.now, self.at_next_look = seen + 7.0, None
            call()
        return seen


def test_waiting_is_measured_and_work_is_done_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, run = make_run(tmp_path)
    stream = Stream(run.ledger, rank=0, world=1, compute_dtype=torch.float32)
    assert stream.get(0).read_s > 0
    stream.get(1)
    stream._thread.submit(lambda: None).result(60)  # queued behind what is made ahead
    go_on, clock = threading.Event(), Clock()
    monkeypatch.setattr("consumers.stream.time", clock)
    stream._thread.submit(go_on.wait)  # from here on nothing is made: what can be had now was there
    assert [stream.get(step).wait_s for step in (2, 3)] == [0.0, 0.0]
    assert not stream._pending[4].done()
    clock.at_next_look = go_on.set
    assert stream.get(4).wait_s == 7.0
    stream.close()


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_what_cannot_be_read_is_told_at_weight_zero_and_the_rest_is_untouched(tmp_path: Path, stored: str) -> None:
    producer, run = make_run(tmp_path, dtype=stored)
    whole = [Stream(run.ledger, rank=rank, world=2, compute_dtype=torch.float32) for rank in range(2)]
    expected = {step: [stream.get(step) for stream in whole] for step in range(STEPS)}
    tars = sorted((producer.dataset.root / producer.facets.latents[32]).glob("*.tar"))
    os.truncate(tars[0], 100)
    tars[-1].unlink()
    sorted((producer.dataset.root / producer.facets.text).glob("*.tar"))[1].unlink()
    told: dict[str, str] = {}
    whole_after = 0
    for rank in range(2):
        stream = Stream(run.ledger, rank=rank, world=2, compute_dtype=torch.float32, tolerant=True)
        for step in range(STEPS):
            batch, sound = stream.get(step), expected[step][rank]
            assert batch.num_real == sound.num_real  # the ranks have not agreed yet
            bad = {one.slot: one for one in batch.bad}
            whole_after += not bad
            told |= {one.key: one.problem for one in batch.bad}
            assert len(batch.micro_batches) == len(sound.micro_batches)
            for ours, theirs in zip(batch.micro_batches, sound.micro_batches, strict=True):
                assert torch.equal(ours.slots, theirs.slots)
                for i, slot in enumerate(ours.slots.tolist()):
                    if slot in bad:
                        assert bad[slot].key == batch.keys[min(slot, len(batch.keys) - 1)]
                        assert float(ours.weights[i]) == 0
                        assert torch.isfinite(ours.latents[i]).all()
                        assert torch.isfinite(ours.text[i]).all()
                    else:
                        assert torch.equal(ours.latents[i], theirs.latents[i])
                        assert torch.equal(ours.text[i], theirs.text[i])
                        assert torch.equal(ours.weights[i], theirs.weights[i])
        stream.close()
    assert told
    assert whole_after
    assert {kind for problem in told.values() for kind in ("has 100 bytes", "cannot be opened") if kind in problem} == {
        "has 100 bytes",
        "cannot be opened",
    }
    assert all(".tar " in problem and " at byte " in problem for problem in told.values())
    for stream in whole:
        stream.close()


def test_in_a_long_run_few_buffers_serve_all_steps(tmp_path: Path) -> None:
    producer, run = make_run(tmp_path, dtype="float32")
    stream = Stream(run.ledger, rank=0, world=1, compute_dtype=torch.float32)
    places: set[int] = set()
    for step in range(STEPS):
        batch = stream.get(step)
        check(batch, run, producer, torch.float32)
        places |= {micro.latents.untyped_storage().data_ptr() for micro in batch.micro_batches}
    stream.close()
    assert len(places) < STEPS / 2


@pytest.mark.parametrize(
    ("stored", "compute", "copied"), [("bfloat16", torch.bfloat16, False), ("float32", torch.bfloat16, True)]
)
def test_bytes_are_read_into_the_batch_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: str, compute: torch.dtype, copied: bool
) -> None:
    producer, run = make_run(tmp_path, dtype=stored)
    read = TarReader.read
    targets: list[tuple[int, int]] = []

    def spied(self: TarReader, places: Any, out: Any) -> int:
        targets.extend((part.ctypes.data, part.ctypes.data + part.nbytes) for part in out)
        return read(self, places, out)

    monkeypatch.setattr(TarReader, "read", spied)
    stream = Stream(run.ledger, rank=0, world=1, compute_dtype=compute, prefetch=0)
    batch = stream.get(0)
    check(batch, run, producer, compute)
    for micro in batch.micro_batches:
        for kind in ("latents", "text"):
            tensor = getattr(micro, kind)
            low = tensor.data_ptr()
            inside = [low <= start and end <= low + tensor.nbytes for start, end in targets]
            assert any(inside) == (kind == "latents" or not copied)
    stream.close()
