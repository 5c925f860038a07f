"""What is counted beforehand is what the ledger then gives: images, fill slots, buckets, epochs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pytest
from fake_catalog import BUCKETS, MemoryCatalogs, memory_catalog
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenimg_dist.data.facets import DataError
from qwenimg_dist.data.ledger import Ledger
from qwenimg_dist.data.mix import Mix
from qwenimg_dist.data.order import Segment
from qwenimg_dist.data.phases import PlannedPhase, quota, steps_by_resolution
from qwenimg_dist.data.samples import Selection
from qwenimg_dist.data.where import compile_where
from qwenimg_dist.schema import Bucket

FAST = settings(max_examples=60, deadline=None)


def make_ledger(
    catalogs: MemoryCatalogs,
    steps: int,
    *,
    size: int = 4,
    weights: Mapping[str, float] | None = None,
    phase_weights: Mapping[str, float] | None = None,
    where: str | None = None,
    window: int = 8,
    mixture: Mapping[int, float] | None = None,
    mix: Mix | None = None,
    drawn: tuple[Bucket, ...] = (),
    segments: Sequence[Segment] = (Segment(catalog=0, phase=None, epoch=0, last=True),),
) -> Ledger:
    phase = PlannedPhase(
        index=0,
        first_step=0,
        last_step=steps,
        weights=mixture or {32: 1.0},
        global_batch=size,
        micro_batch_tokens=100,
        lr_scale=1.0,
        where=where,
        row_weights=phase_weights or {},
        drawn={32: drawn} if drawn else {},
    )
    rules = tuple((compile_where(text), weight) for text, weight in (weights or {}).items())
    selection = Selection(where=None, held_out_below=0, weights=rules)
    ledger = Ledger(
        phases=[phase],
        seed=3,
        caption_dropout=0.2,
        catalogs=catalogs,
        selection=dict.fromkeys(mix.amounts, selection) if mix else selection,
        mix=mix,
        window=window,
        block_units=2,
    )
    for segment in segments:
        ledger.append(segment)
    return ledger


def agrees(ledger: Ledger, resolution: int = 32) -> None:
    """The tally against the batches themselves."""
    counted = ledger.tally(0, resolution)
    steps = [step for step in range(ledger.phases[0].last_step) if ledger.resolution_at(step) == resolution]
    batches = [ledger.batch(step) for step in steps if ledger.available(step)]
    assert counted.asked == len(steps)
    assert counted.batches == len(batches)
    assert counted.images == sum(batch.num_real for batch in batches)
    assert counted.fill == sum(len(batch.rows) - batch.num_real for batch in batches)
    per_bucket = Counter(batch.bucket for batch in batches)
    fills: Counter[object] = Counter()
    for batch in batches:
        fills[batch.bucket] += len(batch.rows) - batch.num_real
    for bucket, counts in counted.buckets.items():
        assert (counts.batches, counts.fill) == (per_bucket[bucket], fills[bucket])
    assert set(per_bucket) <= set(counted.buckets)
    if batches:
        assert batches[-1].epoch <= counted.epochs <= batches[-1].epoch + 1


data_sets = st.lists(st.integers(-1, 2), min_size=1, max_size=40)


@FAST
@given(
    buckets=data_sets,
    size=st.integers(1, 9),
    steps=st.integers(0, 70),
    window=st.integers(1, 20),
    weights=st.dictionaries(st.sampled_from(["row < 7", "row >= 3", "row == 0"]), st.sampled_from([0, 0.3, 1, 2.5])),
)
def test_it_counts_what_the_ledger_gives(
    buckets: list[int], size: int, steps: int, window: int, weights: dict[str, float]
) -> None:
    buckets[0] = 0
    catalogs = MemoryCatalogs([memory_catalog(buckets, [[3, 5]] * len(buckets))])
    agrees(make_ledger(catalogs, steps, size=size, weights=weights, window=window))


@FAST
@given(
    num_rows=st.integers(1, 40),
    size=st.integers(1, 9),
    steps=st.integers(0, 70),
    num_shapes=st.integers(1, 4),
    weighed=st.booleans(),
)
def test_it_counts_drawn_shapes_by_their_turn(
    num_rows: int, size: int, steps: int, num_shapes: int, weighed: bool
) -> None:
    catalogs = MemoryCatalogs([memory_catalog([0] * num_rows, [[3, 5]] * num_rows)])
    shapes = tuple(Bucket(height=16 * (index + 1), width=16) for index in range(num_shapes))
    ledger = make_ledger(catalogs, steps, size=size, drawn=shapes, weights={"row >= 3": 2.5} if weighed else None)
    agrees(ledger)
    counted = ledger.tally(0, 32)
    assert tuple(counted.buckets) == shapes
    assert weighed or counted.samples == num_rows


@FAST
@given(cuts=st.lists(st.integers(1, 5), min_size=1, max_size=4), size=st.integers(1, 7), closed=st.booleans())
def test_it_counts_segments_as_far_as_they_reach(cuts: list[int], size: int, closed: bool) -> None:
    ends = np.cumsum([4 * cut for cut in cuts]).tolist()
    parts = [
        memory_catalog([row % 3 for row in range(end - 4 * cut, end)], [[3]] * 4 * cut, first_row=end - 4 * cut)
        for cut, end in zip(cuts, ends, strict=True)
    ]
    segments = [
        Segment(catalog=index, phase=0, epoch=0, last=closed and index == len(parts) - 1) for index in range(len(parts))
    ]
    ledger = make_ledger(MemoryCatalogs(parts), 100, size=size, segments=segments)
    agrees(ledger)
    counted = ledger.tally(0, 32)
    assert counted.samples == ends[-1]
    if closed:
        assert counted.images == ends[-1]
        assert counted.epochs == pytest.approx(1.0)


@FAST
@given(
    rows=st.lists(st.integers(1, 30), min_size=2, max_size=3),
    amounts=st.lists(st.sampled_from([0.5, 1, 2, 3]), min_size=3, max_size=3),
    unit=st.sampled_from(["weight", "repeats"]),
    steps=st.integers(1, 60),
)
def test_it_counts_several_data_sets(
    rows: list[int], amounts: list[float], unit: Literal["weight", "repeats"], steps: int
) -> None:
    names = "abc"[: len(rows)]
    parts = [memory_catalog([row % 3 for row in range(num)], [[3]] * num) for num in rows]
    ledger = make_ledger(
        MemoryCatalogs(parts, names=list(names)),
        steps,
        mix=Mix(unit=unit, amounts=dict(zip(names, amounts, strict=False))),
        segments=[
            Segment(catalog=index, phase=None, epoch=0, last=True, dataset=name) for index, name in enumerate(names)
        ],
    )
    agrees(ledger)
    counted, given_epochs = ledger.tally(0, 32), ledger.batch(steps - 1).epochs_by_dataset
    assert counted.epochs_by_dataset.keys() == given_epochs.keys()
    # The last batch says how many epochs of each there were up to it, by batches of the mix; here they go by samples.
    batch = ledger.batch(steps - 1)
    for name, epochs in counted.epochs_by_dataset.items():
        per_epoch = given_epochs[name] / (sum(given_epochs.values()) or 1)
        assert epochs == pytest.approx(per_epoch * sum(counted.epochs_by_dataset.values()))
        assert batch.epoch <= counted.epochs <= batch.epoch + 1


def test_epochs_left_overs_and_fill_of_whole_epochs() -> None:
    catalogs = MemoryCatalogs([memory_catalog([0] * 10 + [1] * 3, [[3]] * 13)])
    ledger = make_ledger(catalogs, 8, size=4, mixture={32: 1.0})  # 3 + 1 batches per epoch, twice
    counted = ledger.tally(0, 32)
    assert counted.epochs == 2.0
    assert counted.images == 26
    assert (counted.samples, counted.left_over, counted.fill) == (13, 2 + 3, 2 * (2 + 1))
    assert counted.buckets[BUCKETS[0]].batches == 6


def test_several_resolutions_share_the_steps() -> None:
    catalogs = MemoryCatalogs([memory_catalog([0, 1, 2] * 9, [[3]] * 27, resolutions=(32, 64))])
    ledger = make_ledger(catalogs, 17, mixture={32: 0.3, 64: 0.7})
    for resolution in (32, 64):
        agrees(ledger, resolution)
    assert ledger.tally(0, 32).asked + ledger.tally(0, 64).asked == 17


@FAST
@given(st.dictionaries(st.integers(1, 9), st.integers(1, 20), min_size=1, max_size=4), st.integers(0, 200))
def test_steps_by_resolution_are_those_of_the_quota(weights: dict[int, int], steps: int) -> None:
    mixture = {key: weight / 10 for key, weight in weights.items()}
    found = Counter(quota(mixture, step)[0] for step in range(steps))
    assert steps_by_resolution(mixture, steps) == {key: found[key] for key in mixture}


def test_a_phase_weighs_its_rows_beside_the_run() -> None:
    columns = {"score_text_level": np.array([0.0, 1.0, 2.0] * 8)}
    catalogs = MemoryCatalogs([memory_catalog([0] * 24, [[3]] * 24, columns=columns)])
    ledger = make_ledger(
        catalogs,
        1000,
        weights={"text_level == 1": 2, "text_level == 0": 5},
        phase_weights={"text_level == 0": 0, "text_level == 2": 3},
        where="row < 21",
    )
    drawn: Counter[int] = Counter()
    step = 0
    while (batch := ledger.batch(step)).epoch == 0:
        drawn.update(batch.rows[batch.weights > 0].tolist())
        step += 1
    assert drawn == {row: {1: 2, 2: 3}[row % 3] for row in range(21) if row % 3}
    agrees(ledger)


def test_a_phase_whose_weights_leave_nothing_says_so() -> None:
    catalogs = MemoryCatalogs([memory_catalog([0] * 8, [[3]] * 8)])
    ledger = make_ledger(catalogs, 5, phase_weights={"row >= 0": 0})
    with pytest.raises(DataError, match=r"phase 0 at 32 px has nothing .* above 0 by 0 x row >= 0; produce more"):
        ledger.check()
    assert ledger.tally(0, 32).batches == 0


def test_a_million_rows_are_counted_in_a_moment() -> None:
    """Without making an epoch: the plan must not cost what the run itself will spend."""
    num = 200_000
    rng = np.random.default_rng(0)
    captions = [[3]] * num
    catalogs = MemoryCatalogs([memory_catalog(rng.integers(0, 3, num).tolist(), captions, unit_size=512)])
    ledger = make_ledger(catalogs, 100_000, size=256, window=65536, where="row >= 1000")
    begin = time.process_time()
    counted = ledger.tally(0, 32)
    took = time.process_time() - begin
    begin = time.process_time()
    ledger.batch(0)
    assert took < max(0.05, time.process_time() - begin)
    assert counted.images + counted.fill == 100_000 * 256
    assert counted.epochs > 100
