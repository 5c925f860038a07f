"""Sampling weights: rows come as often as they say, any step may be asked for first, weight 1 changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from fake_catalog import MemoryCatalogs, memory_catalog
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenimg_dist.data.facets import DataError
from qwenimg_dist.data.ledger import GlobalBatch, Ledger
from qwenimg_dist.data.order import Segment
from qwenimg_dist.data.phases import PlannedPhase
from qwenimg_dist.data.samples import Selection
from qwenimg_dist.data.weights import EpochCounts, times_in_epoch
from qwenimg_dist.data.where import compile_where

FAST = settings(max_examples=40, deadline=None)
ONE = 1 << 24


def quarters(most: int) -> st.SearchStrategy[int]:
    """Up to most / 4, often right on a quarter, where rows step over."""
    return st.one_of(st.integers(0, most).map(lambda quarter: quarter * ONE // 4), st.integers(0, most * ONE // 4))


def make_ledger(
    catalogs: MemoryCatalogs,
    weights: Mapping[str, float],
    *,
    size: int = 4,
    seed: int = 0,
    dropout: float = 0.0,
    caption_weights: Mapping[str, float] | None = None,
    segments: Sequence[Segment] = (Segment(catalog=0, phase=None, epoch=0, last=True),),
) -> Ledger:
    phase = PlannedPhase(
        index=0,
        first_step=0,
        last_step=100_000,
        weights={32: 1.0},
        global_batch=size,
        micro_batch_tokens=100,
        lr_scale=1.0,
        where=None,
    )
    ledger = Ledger(
        phases=[phase],
        seed=seed,
        caption_dropout=dropout,
        catalogs=catalogs,
        selection=Selection(
            where=None,
            held_out_below=0,
            weights=tuple((compile_where(text), weight) for text, weight in weights.items()),
            caption_weights=caption_weights,
        ),
        window=8,
        block_units=2,
    )
    for segment in segments:
        ledger.append(segment)
    return ledger


def key(batch: GlobalBatch) -> tuple[object, ...]:
    return batch.epoch, batch.bucket, batch.rows.tolist(), batch.texts.tolist(), batch.weights.tolist()


def by_epoch(ledger: Ledger, epochs: int) -> list[Counter[int]]:
    """Rows of each of the first epochs, as often as they come with weight 1."""
    counts: list[Counter[int]] = [Counter() for _ in range(epochs)]
    step = 0
    while (batch := ledger.batch(step)).epoch < epochs:
        counts[batch.epoch].update(batch.rows[batch.weights > 0].tolist())
        step += 1
    return counts


@FAST
@given(
    buckets=st.lists(st.integers(-1, 2), min_size=2, max_size=40),
    size=st.integers(1, 7),
    fraction=st.sampled_from([0.0, 0.001, 0.1, 0.3, 0.5, 1.7, 2.0]),
    seed=st.integers(0, 9),
)
def test_rows_come_as_often_as_their_weight_says_over_any_number_of_epochs(
    buckets: list[int], size: int, fraction: float, seed: int
) -> None:
    buckets = [0, *buckets[1:-1], 1]
    num = len(buckets)
    catalogs = MemoryCatalogs([memory_catalog(buckets, [[3]] * num)])
    ledger = make_ledger(catalogs, {f"row > {num // 2}": fraction, "row == 0": 3.0}, size=size, seed=seed)
    epochs = by_epoch(ledger, 11)
    for row, bucket in enumerate(buckets):
        weight = (3.0 if row == 0 else 1.0) * (fraction if row > num // 2 else 1.0) * (bucket >= 0)
        for first in (0, 4):
            for last in range(first + 1, 12):
                came = sum(counts[row] for counts in epochs[first:last])
                assert abs(came - (last - first) * weight) <= 1, (row, weight, first, last, came)
        if weight == int(weight):
            assert all(counts[row] == weight for counts in epochs)


@FAST
@given(steps=st.lists(st.integers(0, 90), min_size=1, max_size=6), weight=st.sampled_from([0.25, 0.5, 2.5]))
def test_a_resume_anywhere_finds_the_same_batches(steps: list[int], weight: float) -> None:
    catalogs = MemoryCatalogs([memory_catalog([0, 1, 2, 0, 0] * 5, [[3, 4], [5]] * 12 + [[6]])])
    walked = make_ledger(catalogs, {"row < 12": weight}, dropout=0.2)
    batches = [walked.batch(step) for step in range(91)]
    for step in steps:
        assert key(make_ledger(catalogs, {"row < 12": weight}, dropout=0.2).batch(step)) == key(batches[step])


def test_weight_one_everywhere_is_the_order_without_weights() -> None:
    catalogs = MemoryCatalogs([memory_catalog([0, 1, 2, 0, 0, 1, -1] * 7, [[3, 9], [4]] * 24 + [[5]])])
    plain, ones = make_ledger(catalogs, {}, dropout=0.3), make_ledger(catalogs, {"row >= 0": 1.0}, dropout=0.3)
    for step in range(60):
        assert key(plain.batch(step)) == key(ones.batch(step))


def test_half_of_the_rows_come_in_each_epoch_and_the_other_half_in_the_next() -> None:
    num = 2000
    catalogs = MemoryCatalogs([memory_catalog([0] * num, [[3]] * num, unit_size=100)])
    first, second = by_epoch(make_ledger(catalogs, {"row >= 0": 0.5}, size=10), 2)
    assert abs(len(first) - num / 2) < 100
    assert set(first) | set(second) == set(range(num))
    assert not set(first) & set(second)


def test_the_copies_of_a_row_have_captions_of_their_own() -> None:
    num = 300
    catalogs = MemoryCatalogs([memory_catalog([0] * num, [[3, 4]] * num)])
    ledger = make_ledger(catalogs, {"row >= 0": 2.0}, size=10)
    texts: dict[int, list[int]] = {}
    for step in range(60):
        batch = ledger.batch(step)
        for row, text in zip(batch.rows.tolist(), batch.texts.tolist(), strict=True):
            texts.setdefault(row, []).append(text)
    different = sum(first != second for first, second in texts.values())
    assert abs(different - num / 2) < 50


def test_growing_by_segments_counts_the_same() -> None:
    lengths = [[3]] * 40
    whole = MemoryCatalogs([memory_catalog([0] * 40, lengths)])
    halves = MemoryCatalogs(
        [memory_catalog([0] * 20, lengths[:20]), memory_catalog([0] * 20, lengths[20:], first_row=20)]
    )
    weights = {"row < 30": 1.5}
    one = [
        Counter(by_epoch(make_ledger(whole, weights, size=3), 1)[0]),
    ]
    segments = [Segment(catalog=0, phase=0, epoch=0, last=False), Segment(catalog=1, phase=0, epoch=0, last=True)]
    grown = make_ledger(halves, weights, size=3, segments=segments)
    seen: Counter[int] = Counter()
    for step in range(grown.batches_so_far(0, 32)):
        batch = grown.batch(step)
        seen.update(batch.rows[batch.weights > 0].tolist())
    assert seen == one[0]
    with pytest.raises(DataError, match="used up"):
        grown.batch(grown.batches_so_far(0, 32))


@FAST
@given(
    rows=st.lists(st.tuples(st.integers(0, 2), quarters(12), quarters(3)), max_size=30),
    epoch=st.integers(0, 2000),
)
def test_counts_of_an_epoch_without_looking_at_the_rows(rows: list[tuple[int, int, int]], epoch: int) -> None:
    bucket, weights, offset = (np.array([row[i] for row in rows], dtype=np.int64) for i in range(3))
    times = times_in_epoch(weights, offset, epoch)
    expected = {b: int(n) for b, n in enumerate(np.bincount(bucket, weights=times, minlength=3)) if n}
    assert EpochCounts(bucket.astype(np.int16), weights, offset).at(epoch) == expected


def test_nothing_of_weight_above_zero_is_said() -> None:
    catalogs = MemoryCatalogs([memory_catalog([0, 0], [[3]] * 2)])
    ledger = make_ledger(catalogs, {"row >= 0": 0.0})
    with pytest.raises(DataError, match=r"0 of these.*have a weight above 0.*data.weights"):
        ledger.batch(0)
    with pytest.raises(DataError, match="nothing to train on"):
        ledger.check()
    with pytest.raises(DataError, match="the product 1e\\+06"):
        make_ledger(catalogs, {"row >= 0": 1000.0, "row < 9": 1000.0})


def drawn_kinds(catalogs: MemoryCatalogs, weights: Mapping[str, float], steps: int) -> Counter[tuple[int, int]]:
    """(row % 4, index of the caption) -> how often."""
    ledger = make_ledger(catalogs, {}, size=10, caption_weights=weights)
    starts = catalogs[0].caption_start
    found: Counter[tuple[int, int]] = Counter()
    for step in range(steps):
        batch = ledger.batch(step)
        for row, text in zip(batch.rows.tolist(), batch.texts.tolist(), strict=True):
            found[row % 4, int(text - 1 - starts[row])] += 1
    return found


def test_kinds_of_captions_share_the_draws_by_their_weights() -> None:
    num = 4000
    lengths = [[3, 4, 5], [3, 4], [3], [3, 4]] * (num // 4)
    kinds = [[0, 1, 1], [1, 0], [0], [2, 2]] * (num // 4)
    catalogs = MemoryCatalogs([memory_catalog([0] * num, lengths, unit_size=100, kinds=kinds)])
    found = drawn_kinds(catalogs, {"raw": 0.2, "recaption": 0.8, "fused": 0}, num // 10)
    rate = {place: count / (num // 4) for place, count in found.items()}
    expected = {(0, 0): 0.2, (0, 1): 0.4, (0, 2): 0.4, (1, 0): 0.8, (1, 1): 0.2, (2, 0): 1.0, (3, 0): 0.5, (3, 1): 0.5}
    assert rate.keys() == expected.keys()
    assert all(abs(rate[place] - expected[place]) < 0.05 for place in expected)
    assert (0, 0) not in drawn_kinds(catalogs, {"raw": 0, "recaption": 1, "fused": 1}, num // 10)
    with pytest.raises(DataError, match="no weight for the caption kind 'fused'"):
        drawn_kinds(catalogs, {"raw": 0.2, "recaption": 0.8}, 1)


def test_the_draw_of_a_caption_depends_on_seed_epoch_and_row_alone() -> None:
    lengths, kinds = [[3, 4, 5]] * 40, [[0, 1, 2]] * 40
    weights = {"raw": 0.3, "recaption": 0.5, "fused": 0.2}
    whole = MemoryCatalogs([memory_catalog([0] * 40, lengths, kinds=kinds)])
    halves = MemoryCatalogs(
        [
            memory_catalog([0] * 20, lengths[:20], kinds=kinds[:20]),
            memory_catalog([0] * 20, lengths[20:], first_row=20, kinds=kinds[20:]),
        ]
    )
    segments = [Segment(catalog=0, phase=0, epoch=0, last=False), Segment(catalog=1, phase=0, epoch=0, last=True)]

    def choices(ledger: Ledger, catalogs: MemoryCatalogs) -> dict[int, int]:
        batches = [ledger.batch(step) for step in range(10)]
        return {
            int(row): int(token)
            for batch in batches
            for row, token in zip(batch.rows, catalogs.text_tokens(batch.texts), strict=True)
        }

    one = make_ledger(whole, {}, caption_weights=weights)
    two = make_ledger(halves, {}, caption_weights=weights, segments=segments)
    assert choices(one, whole) == choices(two, halves)
