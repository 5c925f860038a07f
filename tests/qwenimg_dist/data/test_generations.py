"""Interrupted = uninterrupted: what joined a run is on disk before it is used, and decides the order alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_dataset import FakeProducer, facets_for, make_rows
from growing_run import SIZES, describe, make_config, open_run, produce_units, train
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from qwenimg_dist.data.facets import DataError
from qwenimg_dist.data.generation_log import FILE, read_lines
from qwenimg_dist.data.generations import Generations
from qwenimg_dist.data.held_out import held_out_threshold


@st.composite
def events(draw: st.DrawFn) -> list[tuple[str, int]]:
    kinds = st.sampled_from(["produce", "train", "train", "kill", "kill"])
    drawn = draw(st.lists(st.tuples(kinds, st.integers(1, 3)), min_size=3, max_size=8))
    return [("produce", 1), *drawn, ("complete", 0), ("train", 12), ("kill", 3), ("train", 5)]


@settings(
    max_examples=8,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # files make shrinking slow
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(story=events(), phases=st.integers(1, 2), torn=st.booleans(), where=st.randoms(use_true_random=False))
def test_a_run_killed_at_will_gives_the_sequence_of_an_undisturbed_one(
    tmp_path: Path, story: list[tuple[str, int]], phases: int, torn: bool, where: object
) -> None:
    root = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    producer = FakeProducer(root / "data", unit_size=4)
    config = make_config(steps=24, phases=phases)
    calm = open_run(root / "calm", producer, config, follow=True)
    killed = open_run(root / "killed", producer, config, follow=True)
    calm_seen: list[tuple[object, ...]] = []
    killed_seen: list[tuple[object, ...]] = []
    for kind, amount in story:
        if kind == "produce":
            produce_units(producer, amount)
        elif kind == "complete":
            producer.complete()
        elif kind == "train":
            left = 24 - len(calm_seen)
            calm_seen += train(calm, len(calm_seen), min(2 * amount, left))
            killed_seen += train(killed, len(killed_seen), min(2 * amount, left))
        else:
            if torn and (root / "killed" / FILE).exists():
                with open(root / "killed" / FILE, "ab") as file:
                    file.write(b'{"generation": 99, "ph')
            killed = open_run(root / "killed", producer, config, follow=True)
            # Resume from an older checkpoint: the steps since are made again, and must be the same.
            back = max(0, len(killed_seen) - where.randint(0, 6))  # type: ignore[attr-defined]
            again = train(killed, back, len(killed_seen) - back)
            assert again == killed_seen[back:]
    assert killed_seen == calm_seen
    assert len(calm_seen) >= 10
    assert read_lines(root / "killed" / FILE)[0] == read_lines(root / "calm" / FILE)[0]
    # Another run that replays the recorded generations has the same order.
    (root / "replay").mkdir()
    shutil.copy(root / "calm" / FILE, root / "replay" / FILE)
    replay = open_run(root / "replay", producer, config, follow=True)
    assert train(replay, 0, len(calm_seen)) == calm_seen


def test_follow_uses_every_sample_once_per_epoch_and_then_all_again(tmp_path: Path) -> None:
    producer = FakeProducer(tmp_path / "data", unit_size=4)
    run = open_run(tmp_path / "run", producer, make_config(), follow=True)
    assert run.advance(0) == "wait"
    seen: list[tuple[object, ...]] = []
    for _ in range(3):
        produce_units(producer, 1)
        seen += train(run, len(seen), 100)
    assert run.advance(len(seen)) == "wait"
    producer.complete()
    per_epoch = 2 * 2  # 6 rows of each of two buckets, batches of 3
    seen += train(run, len(seen), 3 * per_epoch - len(seen))
    for epoch in range(3):
        mine = [batch for batch in seen if batch[1] == epoch]
        keys = sorted(key for batch in mine for key, w in zip(batch[3], batch[5]) if w)  # type: ignore[call-overload]
        assert keys == sorted(row.key for row in producer.rows)
    # Later epochs cover the same units, so their catalog is made once.
    indices = [line.index for line in run.lines if line.units - line.first_unit == 3]
    assert len(indices) >= 2
    assert len(set(indices)) == 1


def test_slow_producers_do_not_give_a_generation_per_unit(tmp_path: Path) -> None:
    producer = FakeProducer(tmp_path / "data", unit_size=4)
    run = open_run(tmp_path / "run", producer, make_config(), follow=True)
    seen: list[tuple[object, ...]] = []
    for _ in range(32):
        produce_units(producer, 1)
        seen += train(run, len(seen), 100)
    # The first unit starts the run; an epoch of n units then grows by n / 10 at least, rounded up.
    assert [line.units for line in run.lines] == [*range(1, 12), 13, 15, 17, 19, 21, 24, 27, 30]
    resumed = open_run(tmp_path / "run", producer, make_config(), follow=True)
    assert resumed.advance(len(seen)) == "wait"
    producer.complete()
    seen += train(resumed, len(seen), 128 // 3 + 2 - len(seen))
    assert [(line.units, line.last) for line in resumed.lines[-2:]] == [(30, False), (32, True)]
    keys = sorted(key for batch in seen for key, w in zip(batch[3], batch[5]) if w)  # type: ignore[call-overload]
    assert keys == sorted(row.key for row in producer.rows)


def test_without_follow_one_generation_pins_everything_and_later_data_is_not_seen(tmp_path: Path) -> None:
    producer = FakeProducer(tmp_path / "data", unit_size=4)
    produce_units(producer, 3)
    run = open_run(tmp_path / "run", producer, make_config(), follow=False)
    before = train(run, 0, 10)
    assert run.settled
    assert run.count == 1
    producer.recaption(0, ("another caption of quite another length",))
    produce_units(producer, 1)
    producer.produce()
    resumed = open_run(tmp_path / "run", producer, make_config(), follow=False)
    assert train(resumed, 0, 10) == before
    # Also if the compiled catalog is gone, and compiled again from the pins.
    shutil.rmtree(tmp_path / "run" / "index")
    assert train(open_run(tmp_path / "run", producer, make_config(), follow=False), 0, 10) == before
    fresh = open_run(tmp_path / "fresh", producer, make_config(), follow=False)
    fresh.advance(0)
    assert fresh.lines[0].units == 4
    assert fresh.lines[0].rows_parts == {"0": 2}


def test_the_source_may_grow_between_epochs(tmp_path: Path) -> None:
    producer = FakeProducer(tmp_path / "data", unit_size=4)
    produce_units(producer, 2)
    producer.complete()
    run = open_run(tmp_path / "run", producer, make_config(), follow=True)
    first = train(run, 0, 4)  # two buckets of 4 rows, batches of 3
    assert {batch[1] for batch in first} == {0}
    (producer.dataset.root / "source-complete.json").unlink()
    produce_units(producer, 1)
    second = train(run, 4, 100)
    assert {batch[1] for batch in second} == {1}
    assert all(all(batch[5]) for batch in second)  # type: ignore[call-overload]
    producer.complete()
    rest = train(run, 4 + len(second), 100)
    keys = [key for b in second + rest if b[1] == 1 for key, w in zip(b[3], b[5]) if w]  # type: ignore[call-overload]
    assert sorted(keys) == sorted(row.key for row in producer.rows)


def test_other_ranks_read_what_rank_0_wrote(tmp_path: Path) -> None:
    producer = FakeProducer(tmp_path / "data", unit_size=4)
    produce_units(producer, 3)
    first = open_run(tmp_path / "run", producer, make_config(), follow=False)
    other = Generations(tmp_path / "run", producer.dataset, producer.facets, make_config(), follow=False)
    with pytest.raises(DataError, match="no generation yet"):
        _ = other.ledger
    first.advance(0)
    other.refresh(first.count)
    assert train(first, 0, 8) == [describe(other, other.ledger.batch(step)) for step in range(8)]


@pytest.mark.parametrize("damage", ["content", "gone", "tar_gone", "tar_cut", "same_size"])
def test_pinned_files_that_changed_are_named(tmp_path: Path, damage: str) -> None:
    producer = FakeProducer(tmp_path / "data", unit_size=4)
    produce_units(producer, 2)
    open_run(tmp_path / "run", producer, make_config(), follow=False).advance(0)
    folder = producer.dataset.root / producer.facets.latents[32]
    parquet = folder / "unit-000001.000.parquet"
    tar = next(folder.glob("unit-000001*.tar"))
    victim = tar if damage.startswith("tar") else parquet
    raw = bytearray(victim.read_bytes())
    if damage.endswith("gone"):
        victim.unlink()
    elif damage == "same_size":
        raw[len(raw) // 2] ^= 1
        victim.write_bytes(raw)
    else:
        victim.write_bytes(raw[:-8])
    with pytest.raises(DataError, match=victim.name):
        open_run(tmp_path / "run", producer, make_config(), follow=False)


def test_lines_damaged_in_the_middle_are_refused_and_other_facets_too(tmp_path: Path) -> None:
    producer = FakeProducer(tmp_path / "data", unit_size=4)
    produce_units(producer, 2)
    open_run(tmp_path / "run", producer, make_config(), follow=False).advance(0)
    producer.facets = facets_for((32,), "ffffffffffff")
    with pytest.raises(DataError, match=r"this run reads .*text-0123456789ab.*config asks for text-ffffffffffff"):
        open_run(tmp_path / "run", producer, make_config(), follow=False)
    file = tmp_path / "run" / FILE
    file.write_bytes(b"{broken}\n" + file.read_bytes())
    with pytest.raises(DataError, match="line 1 is damaged"):
        read_lines(file)


@pytest.mark.parametrize("follow", [False, True])
def test_data_of_another_encoder_is_named_with_the_way_out(tmp_path: Path, follow: bool) -> None:
    producer = FakeProducer(tmp_path / "data", unit_size=4)
    produce_units(producer, 1)
    producer.complete()
    producer.facets = facets_for((32,), "ffffffffffff")
    run = open_run(tmp_path / "run", producer, make_config(), follow=follow)
    with pytest.raises(DataError, match=r"has text-0123456789ab, this run needs text-ffffffffffff.*model\.path"):
        run.advance(0)
    assert not (tmp_path / "run" / FILE).exists()


def test_a_missing_resolution_and_an_empty_data_set_are_named(tmp_path: Path) -> None:
    producer = FakeProducer(tmp_path / "data", unit_size=4)
    run = open_run(tmp_path / "run", producer, make_config(), follow=False)
    with pytest.raises(DataError, match="produce"):
        run.advance(0)
    produce_units(producer, 1)
    producer.facets = facets_for((32, 64))
    run = open_run(tmp_path / "run", producer, make_config(), follow=False)
    with pytest.raises(DataError, match="has no latents-64-0123456789ab"):
        run.advance(0)


@pytest.mark.parametrize("follow", [False, True])
def test_a_stream_without_rows_ends_the_run_instead_of_waiting_for_ever(tmp_path: Path, follow: bool) -> None:
    producer = FakeProducer(tmp_path / "data", unit_size=4)
    producer.add(make_rows(4, sizes=((16, 16),)))
    producer.produce(complete=True)
    run = open_run(tmp_path / "run", producer, make_config(), follow=follow)
    with pytest.raises(DataError, match="nothing to train on: 4 rows were kept, 0 of them have latents"):
        run.advance(0)


def test_a_later_phase_without_rows_is_refused_at_the_start(tmp_path: Path) -> None:
    producer = FakeProducer(tmp_path / "data", unit_size=4)
    producer.add(make_rows(8))
    producer.produce()
    config = make_config(phases=2)
    late = replace(config, phases=(config.phases[0], replace(config.phases[1], where="width > 1000")))
    run = open_run(tmp_path / "run", producer, late, follow=False)
    with pytest.raises(DataError, match=r"phase 1 at 32 px has nothing to train on.*width > 1000"):
        run.advance(0)
    assert not (tmp_path / "run" / FILE).exists()


@pytest.mark.parametrize("follow", [False, True])
def test_an_unknown_column_is_refused_before_anything_is_recorded(tmp_path: Path, follow: bool) -> None:
    producer = FakeProducer(tmp_path / "data", unit_size=4)
    producer.add(make_rows(8))
    producer.produce()
    config = replace(make_config(), where="widht > 3")
    run = open_run(tmp_path / "run", producer, config, follow=follow)
    with pytest.raises(ValueError, match="no column 'widht', did you mean 'width'"):
        run.advance(0)
    assert not (tmp_path / "run" / FILE).exists()


def test_units_behind_a_gap_are_not_ready(tmp_path: Path) -> None:
    producer = FakeProducer(tmp_path / "data", unit_size=4)
    producer.add(make_rows(12))
    producer.produce([0, 2])
    run = open_run(tmp_path / "run", producer, make_config(), follow=False)
    run.advance(0)
    assert run.lines[0].units == 1


def test_held_out_rows_are_fixed_never_trained_on_and_nested(tmp_path: Path) -> None:
    producer = FakeProducer(tmp_path / "data", unit_size=16)
    producer.add(make_rows(64, captions=2, sizes=SIZES))
    producer.produce()
    config = make_config(held_out=0.2)
    run = open_run(tmp_path / "run", producer, config, follow=False)
    trained = {key for batch in train(run, 0, 40) for key in batch[3]}  # type: ignore[attr-defined]
    held = [key for group in run.held_out(32, 100) for key in run.ledger.catalogs.keys(group.rows)]
    assert 0 < len(held) <= 4
    assert not trained & set(held)
    assert trained | set(held) == {row.key for row in producer.rows}
    slots = sorted(int(slot) for group in run.held_out(32, 100) for slot in group.slots)
    assert slots == list(range(len(held)))
    assert sum(len(group.rows) for group in run.held_out(32, 2)) == 2
    again = open_run(tmp_path / "run", producer, config, follow=False)
    again.refresh()
    assert [g.rows.tolist() for g in again.held_out(32, 100)] == [g.rows.tolist() for g in run.held_out(32, 100)]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 300), st.integers(1, 300), st.integers(0, 20), st.floats(0, 1))
def test_more_data_never_holds_out_what_was_trained_on(
    seed: int, num: int, more: int, maximum: int, share: float
) -> None:
    hashes = np.random.default_rng(seed).integers(0, 2**64, num + more, dtype=np.uint64)
    before = held_out_threshold(hashes[:num], share, maximum)
    after = held_out_threshold(hashes, share, maximum)
    assert after <= before
    assert (hashes[:num] < np.uint64(before)).sum() <= maximum


def test_a_process_killed_while_it_records_leaves_a_run_that_goes_on(tmp_path: Path) -> None:
    """A real SIGKILL between the catalog and the line, and one between catalog files."""
    producer = FakeProducer(tmp_path / "data", unit_size=4)
    produce_units(producer, 3)
    calm = open_run(tmp_path / "calm", producer, make_config(), follow=False)
    expected = train(calm, 0, 12)
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    script = (
        "import sys; sys.path[:0] = [sys.argv[2]]\n"
        "from pathlib import Path\n"
        "from test_generations import *\n"
        "root = Path(sys.argv[1])\n"
        "producer = FakeProducer(root / 'data', unit_size=4)\n"
        "open_run(root / 'run', producer, make_config(), follow=False).advance(0)\n"
    )
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "QWENIMG_DIST_FAULT_DIR": str(tokens),
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1] / "helpers"), os.environ.get("PYTHONPATH", "")]),
    }
    for point in ("catalog_write@5", "generation_write@1"):
        (tokens / point).touch()
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path), str(here)], env=environment, check=False)
        assert done.returncode == -9, point
        assert not list(tokens.iterdir())
    run = open_run(tmp_path / "run", producer, make_config(), follow=False)
    assert not list((tmp_path / "run" / "index").glob(".tmp-*"))
    assert train(run, 0, 12) == expected
    assert json.loads((tmp_path / "run" / FILE).read_text())["digest"] == calm.lines[0].digest


@pytest.mark.parametrize("follow", [False, True])
def test_weights_hold_through_generations_and_resumes(tmp_path: Path, follow: bool) -> None:
    producer = FakeProducer(tmp_path / "data")
    produce_units(producer, 3)
    producer.complete()
    config = replace(make_config(), weights={"row < 6": 0.5, "sharpness > 1.05": 2.0})
    undisturbed = train(open_run(tmp_path / "one", producer, config, follow=follow), 0, 40)
    assert len(undisturbed) == 40
    seen = train(open_run(tmp_path / "two", producer, config, follow=follow), 0, 13)
    seen += train(open_run(tmp_path / "two", producer, config, follow=follow), 13, 27)
    assert seen == undisturbed
    every = {row.key: number for number, row in enumerate(producer.rows)}
    come = [[0] * 12 for _ in range(4)]
    for _, epoch, _, keys, _, real in undisturbed:
        assert isinstance(keys, tuple)
        assert isinstance(real, tuple)
        if isinstance(epoch, int) and epoch < 4:
            for key, weight in zip(keys, real, strict=True):
                come[epoch][every[key]] += int(weight)
    for row in range(12):
        weight = (0.5 if row < 6 else 1.0) * (2.0 if row / 10 > 1.05 else 1.0)
        assert sum(come[epoch][row] for epoch in range(4)) == 4 * weight, row
