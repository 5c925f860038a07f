"""The order is a pure function: every sample once, any step first, nothing that was given changes later."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from fake_catalog import BUCKETS, MemoryCatalogs, memory_catalog
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenimg_dist.data.facets import DataError
from qwenimg_dist.data.ledger import GlobalBatch, Ledger
from qwenimg_dist.data.order import Segment
from qwenimg_dist.data.phases import PlannedPhase, quota
from qwenimg_dist.data.samples import Selection
from qwenimg_dist.data.where import compile_where

FAST = settings(max_examples=60, deadline=None)


def make_phase(global_batch: int = 4, steps: int = 10_000, weights: dict[int, float] | None = None) -> PlannedPhase:
    return PlannedPhase(
        index=0,
        first_step=0,
        last_step=steps,
        weights=weights or {32: 1.0},
        global_batch=global_batch,
        micro_batch_tokens=100,
        lr_scale=1.0,
        where=None,
    )


def make_ledger(
    catalogs: MemoryCatalogs,
    phases: Sequence[PlannedPhase] = (make_phase(),),
    *,
    seed: int = 0,
    dropout: float = 0.1,
    held_out_below: int = 0,
    window: int = 8,
    block_units: int = 2,
    repeats: bool = True,
    where: str | None = None,
) -> Ledger:
    ledger = Ledger(
        phases=phases,
        seed=seed,
        caption_dropout=dropout,
        catalogs=catalogs,
        selection=Selection(where=compile_where(where) if where else None, held_out_below=held_out_below),
        window=window,
        block_units=block_units,
    )
    if repeats:
        ledger.append(Segment(catalog=0, phase=None, epoch=0, last=True))
    return ledger


def equal(a: GlobalBatch, b: GlobalBatch) -> bool:
    arrays = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("rows", "texts", "weights"))
    names = ("step", "phase", "resolution", "bucket", "epoch")
    return arrays and all(getattr(a, name) == getattr(b, name) for name in names)


def real_rows(batches: Sequence[GlobalBatch]) -> list[int]:
    return [int(row) for batch in batches for row in batch.rows[batch.weights > 0]]


@st.composite
def data_sets(draw: st.DrawFn, min_rows: int = 1) -> tuple[list[int], list[list[int]]]:
    num = draw(st.integers(min_rows, 40))
    buckets = draw(st.lists(st.integers(-1, 2), min_size=num, max_size=num))
    captions = st.lists(st.integers(2, 12), min_size=1, max_size=3)
    return buckets, draw(st.lists(captions, min_size=num, max_size=num))


@FAST
@given(data=data_sets(), size=st.integers(1, 9), seed=st.integers(0, 99), window=st.integers(1, 20))
def test_an_epoch_is_every_sample_exactly_once(
    data: tuple[list[int], list[list[int]]], size: int, seed: int, window: int
) -> None:
    buckets, lengths = data
    catalogs = MemoryCatalogs([memory_catalog(buckets, lengths)])
    ledger = make_ledger(catalogs, [make_phase(size)], seed=seed, window=window, dropout=0.3)
    trained = [row for row, bucket in enumerate(buckets) if bucket >= 0]
    if not trained:
        with pytest.raises(DataError, match="nothing to train on"):
            ledger.batch(0)
        return
    per_epoch = ledger.batches_so_far(0, 32)
    assert per_epoch == sum(-(-buckets.count(bucket) // size) for bucket in range(3))
    catalog = catalogs[0]
    for epoch in range(2):
        batches = [ledger.batch(epoch * per_epoch + index) for index in range(per_epoch)]
        assert sorted(real_rows(batches)) == trained
        for batch in batches:
            assert batch.epoch == epoch
            assert len(batch.rows) == len(batch.texts) == len(batch.weights) == size
            assert {BUCKETS[buckets[row]] for row in batch.rows} == {batch.bucket}
            tokens = catalog.text_tokens[batch.texts]
            assert (np.diff(tokens) >= 0).all()
            for row, text in zip(batch.rows, batch.texts, strict=True):
                own = range(catalog.caption_start[row], catalog.caption_start[row + 1])
                assert text == 0 or text - 1 in own
        # Per bucket, at most one batch is filled, and never with more than it lacks.
        for bucket in BUCKETS:
            fills = [int((batch.weights == 0).sum()) for batch in batches if batch.bucket == bucket]
            assert sum(fills) == -buckets.count(BUCKETS.index(bucket)) % size
            assert sum(fill > 0 for fill in fills) <= 1


@FAST
@given(data=data_sets(), size=st.integers(1, 5), steps=st.lists(st.integers(0, 60), min_size=1, max_size=5))
def test_any_step_may_be_asked_for_first(data: tuple[list[int], list[list[int]]], size: int, steps: list[int]) -> None:
    buckets, lengths = data
    buckets[0] = 0
    catalogs = MemoryCatalogs([memory_catalog(buckets, lengths, resolutions=(32, 64))])
    phases = [make_phase(size, weights={32: 0.3, 64: 0.7})]
    sequential = make_ledger(catalogs, phases)
    walked = [sequential.batch(step) for step in range(61)]
    jumping = make_ledger(catalogs, phases)
    for step in steps:
        assert equal(jumping.batch(step), walked[step])


@st.composite
def cuts(draw: st.DrawFn) -> tuple[tuple[list[int], list[list[int]]], list[int], int]:
    """A data set, ends of segments in rows, and a batch size."""
    data = draw(data_sets(min_rows=4))
    units = -(-len(data[0]) // 4)
    ends = sorted(set(draw(st.lists(st.integers(1, units), max_size=4))) | {units})
    return data, [min(4 * end, len(data[0])) for end in ends], draw(st.integers(1, 7))


@FAST
@given(case=cuts(), closes_with_rows=st.booleans())
def test_growing_by_segments_is_also_every_sample_once_and_changes_nothing_given_before(
    case: tuple[tuple[list[int], list[list[int]]], list[int], int], closes_with_rows: bool
) -> None:
    (buckets, lengths), ends, size = case
    starts = [0, *ends[:-1]]
    parts = [memory_catalog(buckets[a:b], lengths[a:b], first_row=a) for a, b in zip(starts, ends, strict=True)]
    catalogs = MemoryCatalogs(parts)
    ledger = make_ledger(catalogs, [make_phase(size)], repeats=False)
    segments = [
        Segment(catalog=index, phase=0, epoch=0, last=closes_with_rows and index == len(parts) - 1)
        for index in range(len(parts))
    ]
    if not closes_with_rows:
        segments.append(Segment(catalog=None, phase=0, epoch=0, last=True))
    seen: list[GlobalBatch] = []
    for segment in segments:
        ledger.append(segment)
        while ledger.available(len(seen)):
            seen.append(ledger.batch(len(seen)))
        if not segment.last:
            assert all((batch.weights == 1).all() for batch in seen)
    assert sorted(real_rows(seen)) == [row for row, bucket in enumerate(buckets) if bucket >= 0]
    with pytest.raises(DataError, match=r"used up|nothing to train on"):
        ledger.batch(len(seen))
    # A resumed run has all segments at once and begins anywhere.
    resumed = make_ledger(catalogs, [make_phase(size)], repeats=False)
    for segment in segments:
        resumed.append(segment)
    for step in reversed(range(len(seen))):
        assert equal(resumed.batch(step), seen[step])


def test_captions_are_chosen_per_row_and_epoch_whatever_the_segments_are() -> None:
    lengths = [[3, 4, 5]] * 40
    whole = MemoryCatalogs([memory_catalog([0] * 40, lengths)])
    halves = MemoryCatalogs(
        [memory_catalog([0] * 20, lengths[:20]), memory_catalog([0] * 20, lengths[20:], first_row=20)]
    )
    one = make_ledger(whole, repeats=False)
    one.append(Segment(catalog=0, phase=0, epoch=0, last=True))
    two = make_ledger(halves, repeats=False)
    two.append(Segment(catalog=0, phase=0, epoch=0, last=False))
    two.append(Segment(catalog=1, phase=0, epoch=0, last=True))

    def choices(ledger: Ledger, catalogs: MemoryCatalogs) -> dict[int, int]:
        batches = [ledger.batch(step) for step in range(10)]
        return {
            int(row): int(token)
            for batch in batches
            for row, token in zip(batch.rows, catalogs.text_tokens(batch.texts), strict=True)
        }

    assert choices(one, whole) == choices(two, halves)


def test_a_phase_change_starts_new_epochs_with_another_order() -> None:
    catalogs = MemoryCatalogs([memory_catalog([0] * 40, [[3]] * 40)])
    first = make_phase(4, steps=7)
    second = PlannedPhase(**{**vars(first), "index": 1, "first_step": 7, "last_step": 40})
    ledger = make_ledger(catalogs, [first, second])
    epoch = [ledger.batch(step) for step in range(7, 17)]
    assert sorted(real_rows(epoch)) == list(range(40))
    assert {batch.epoch for batch in epoch} == {0}
    assert not np.array_equal(ledger.batch(0).rows, ledger.batch(7).rows)


def test_epochs_and_seeds_differ() -> None:
    catalogs = MemoryCatalogs([memory_catalog([0] * 64, [[3]] * 64)])
    ledger = make_ledger(catalogs)
    other = make_ledger(catalogs, seed=1)
    orders = [real_rows([source.batch(s) for s in steps]) for source, steps in (
        (ledger, range(16)), (ledger, range(16, 32)), (other, range(16))
    )]  # fmt: skip
    assert orders[0] != orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])


def test_held_out_rows_and_rows_outside_where_are_never_given() -> None:
    catalogs = MemoryCatalogs([memory_catalog([0] * 60, [[3]] * 60)])
    below = int(np.sort(catalogs[0].key_hash)[20])
    ledger = make_ledger(catalogs, held_out_below=below, where="row >= 10")
    given_rows = set(real_rows([ledger.batch(step) for step in range(40)]))
    assert given_rows == {row for row in range(10, 60) if catalogs[0].key_hash[row] >= below}


def test_an_empty_stream_says_what_is_missing() -> None:
    catalogs = MemoryCatalogs([memory_catalog([0, 0, -1], [[3]] * 3)])
    with pytest.raises(DataError, match=r"phase 0 at 32 px.*3 rows were kept, 2 of them.*0 of these.*row > 5"):
        make_ledger(catalogs, where="row > 5").batch(0)


def test_rates_of_dropout_and_captions_and_what_they_cost_in_padding() -> None:
    rng = np.random.default_rng(0)
    num, size = 65_536, 48
    lengths = np.clip(np.exp(rng.normal(np.log(129), 0.6, (num, 2))), 10, 512).astype(int)
    catalogs = MemoryCatalogs([memory_catalog([0] * num, lengths.tolist(), unit_size=512)])
    ledger = make_ledger(catalogs, [make_phase(size)], window=65536, block_units=128)
    batches = [ledger.batch(step) for step in range(ledger.batches_so_far(0, 32))]
    texts = np.concatenate([batch.texts[batch.weights > 0] for batch in batches])
    dropped = (texts == 0).mean()
    assert abs(dropped - 0.1) < 0.005
    assert abs(((texts[texts > 0] - 1) % 2 == 1).mean() - 0.5) < 0.01
    tokens = [catalogs.text_tokens(batch.texts) for batch in batches]
    padding = 1 - sum(t.sum() for t in tokens) / sum(t.max() * size for t in tokens)
    assert padding < 0.01
    assert sum(t.min() == t.max() for t in tokens) / len(tokens) > 0.73  # no mask needed


def test_reads_stay_local() -> None:
    """Consecutive batches come from one window, so from few units; a global permutation would touch all."""
    num, unit_size = 20_000, 100
    catalogs = MemoryCatalogs([memory_catalog([0] * num, [[3]] * num, unit_size=unit_size)])
    ledger = make_ledger(catalogs, [make_phase(10)], window=1000, block_units=10)
    for first in (0, 500, 1900):
        units = {row // unit_size for row in real_rows([ledger.batch(step) for step in range(first, first + 100)])}
        assert len(units) <= 20


def test_buckets_are_spread_over_the_epoch() -> None:
    catalogs = MemoryCatalogs([memory_catalog([0] * 900 + [1] * 100, [[3]] * 1000)])
    ledger = make_ledger(catalogs, [make_phase(10)], window=100)
    names = [ledger.batch(step).bucket for step in range(100)]
    for quarter in range(4):
        counts = Counter(names[quarter * 25 : (quarter + 1) * 25])
        assert 1 <= counts[BUCKETS[1]] <= 5


@FAST
@given(st.dictionaries(st.integers(1, 9), st.integers(1, 20), min_size=1, max_size=4))
def test_the_quota_is_exact_and_numbers_each_resolution_through(weights: dict[int, int]) -> None:
    total = sum(weights.values())
    found = [quota({key: weight / 10 for key, weight in weights.items()}, step) for step in range(2 * total)]
    for resolution, weight in weights.items():
        positions = [position for name, position in found if name == resolution]
        assert positions == list(range(2 * weight))
        assert sum(name == resolution for name, _ in found[:total]) == weight


def test_the_order_itself_is_pinned() -> None:
    """The same seed must give the same order in every version of this code and of numpy; runs are resumed."""
    catalogs = MemoryCatalogs([memory_catalog([0, 1, 2, 0, 0, 1, -1] * 7, [[3, 9], [4]] * 24 + [[5]])])
    ledger = make_ledger(catalogs, [make_phase(4)], seed=7)
    text = "\n".join(
        f"{b.bucket} {b.rows.tolist()} {b.texts.tolist()} {b.weights.tolist()}" for b in map(ledger.batch, range(40))
    )
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "2e6e55fb18e07d45"


def digest_of(batches: Sequence[GlobalBatch]) -> str:
    text = "\n".join(f"{b.epoch} {b.bucket} {b.rows.tolist()} {b.texts.tolist()} {b.weights.tolist()}" for b in batches)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_the_order_of_runs_with_weights_or_that_follow_is_pinned_too() -> None:
    lengths, kinds = [[3, 9], [4]] * 24 + [[5]], [[0, 1], [2]] * 24 + [[1]]
    catalogs = MemoryCatalogs([memory_catalog([0, 1, 2, 0, 0, 1, -1] * 7, lengths, kinds=kinds)])
    selection = Selection(
        where=compile_where("row > 1"),
        held_out_below=1 << 61,
        weights=((compile_where("row < 20"), 2.5), (compile_where("row > 40"), 0.3)),
        caption_weights={"raw": 0.7, "recaption": 0.2, "fused": 1.0},
    )
    ledger = Ledger(
        phases=[make_phase(4)], seed=7, caption_dropout=0.2, catalogs=catalogs, selection=selection, window=8,
        block_units=2,
    )  # fmt: skip
    ledger.append(Segment(catalog=0, phase=None, epoch=0, last=True))
    assert digest_of([ledger.batch(step) for step in range(60)]) == "45c830b4fc96de85"

    parts = [
        memory_catalog([0, 1, 2, 0, 0, 1, -1] * 3, [[3, 9], [4], [7]] * 7, first_row=first) for first in (0, 21, 42)
    ]
    growing = make_ledger(MemoryCatalogs(parts), [make_phase(4)], seed=7, repeats=False)
    for index in range(3):
        growing.append(Segment(catalog=index, phase=0, epoch=0, last=index == 2))
    assert digest_of([growing.batch(step) for step in range(growing.batches_so_far(0, 32))]) == "42e04667735bed69"
