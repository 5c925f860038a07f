"""What the ledger promises, over random data sets, buckets, ranks, budgets and epochs: from the ledger to the slots.

Without files, so that there may be many cases; `test_stream.py` shows on files that the slots hold the right tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from fake_catalog import BUCKETS, EDIT_BUCKETS, MemoryCatalogs, memory_catalog
from hypothesis import given, settings
from hypothesis import strategies as st

from consumers.stream import cut_batch
from qwenimg_dist.data.ledger import GlobalBatch, Ledger
from qwenimg_dist.data.mix import Mix
from qwenimg_dist.data.order import Segment
from qwenimg_dist.data.phases import PlannedPhase
from qwenimg_dist.data.samples import Selection
from qwenimg_dist.data.where import compile_where
from qwenimg_dist.schema import Bucket

FAST = settings(max_examples=60, deadline=None)
Slot = tuple[int, str, int, float]
"""Slot in the global batch, key, tokens of its text, weight."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A data set or several, and how a run draws from them; cheap to open again, as a resume does."""

    catalogs: MemoryCatalogs
    names: tuple[str, ...]
    """Empty for one data set."""
    phases: tuple[PlannedPhase, ...]
    seed: int
    dropout: float
    mix: Mix | None
    weights: Mapping[str, float]
    window: int

    def ledger(self) -> Ledger:
        weights = tuple((compile_where(text), weight) for text, weight in self.weights.items())
        selection = Selection(where=None, held_out_below=0, weights=weights)
        ledger = Ledger(
            phases=self.phases,
            seed=self.seed,
            caption_dropout=self.dropout,
            catalogs=self.catalogs,
            selection=dict.fromkeys(self.names, selection) if self.names else selection,
            mix=self.mix,
            window=self.window,
            block_units=2,
        )
        for index, name in enumerate(self.names or ("",)):
            ledger.append(Segment(catalog=index, phase=None, epoch=0, last=True, dataset=name))
        return ledger

    def buckets(self) -> dict[str, Bucket]:
        """Key -> bucket, which is the same at every resolution here."""
        found = {}
        for index in range(len(self.catalogs)):
            latents = self.catalogs[index].latents[32]
            local = np.flatnonzero(latents.bucket >= 0)
            keys = self.catalogs.keys(local + self.catalogs.row_base(index))
            found |= {key: latents.buckets[bucket] for key, bucket in zip(keys, latents.bucket[local], strict=True)}
        return found

    def trainable(self, resolution: int) -> list[str]:
        """Keys of all rows that there are at a resolution."""
        found = []
        for index in range(len(self.catalogs)):
            local = np.flatnonzero(self.catalogs[index].latents[resolution].bucket >= 0)
            found += self.catalogs.keys(local + self.catalogs.row_base(index))
        return sorted(found)


def one_phase(*, index: int, first: int, steps: int, size: int, budget: int, two: bool) -> PlannedPhase:
    return PlannedPhase(
        index=index,
        first_step=first,
        last_step=first + steps,
        weights={32: 0.5, 64: 0.25} if two else {32: 1.0},
        global_batch=size,
        micro_batch_tokens=budget,
        lr_scale=1.0,
        where=None,
    )


@st.composite
def runs(draw: st.DrawFn, *, weighed: bool = True) -> Run:
    """One to three data sets of 1 to 30 rows in up to five buckets, of pictures and of edits, each with a row at every
    resolution; 1 to 3 phases. With `weighed`, rows or data sets may come more or less often than once per epoch."""
    num_datasets = draw(st.integers(1, 3))
    names = ("photos", "text", "art")[:num_datasets] if num_datasets > 1 else ()
    made = []
    for _ in range(num_datasets):
        buckets = [0, *draw(st.lists(st.integers(-1, len(BUCKETS + EDIT_BUCKETS) - 1), max_size=29))]
        lengths = draw(
            st.lists(st.lists(st.integers(2, 12), min_size=1, max_size=3), min_size=len(buckets), max_size=len(buckets))
        )
        made.append(memory_catalog(buckets, lengths, resolutions=(32, 64)))
    ends = [0]
    phases = []
    for index in range(draw(st.integers(1, 3))):
        phases.append(
            one_phase(
                index=index,
                first=ends[-1],
                steps=draw(st.integers(1, 12)) if index else 200,
                size=draw(st.integers(1, 9)),
                budget=draw(st.integers(1, 120)),
                two=draw(st.booleans()),
            )
        )
        ends.append(phases[-1].last_step)
    amounts = {name: draw(st.sampled_from([0.5, 1.0, 3.0])) if weighed else 1.0 for name in names}
    by_weight = weighed and draw(st.booleans())
    return Run(
        catalogs=MemoryCatalogs(made, names=names or None),
        names=names,
        phases=tuple(phases),
        seed=draw(st.integers(0, 99)),
        dropout=draw(st.sampled_from([0.0, 0.3])),
        mix=Mix(unit="weight" if by_weight else "repeats", amounts=amounts) if names else None,
        weights=draw(st.sampled_from([{}, {"row < 3": 2.5}, {"row > 4": 0.5}])) if weighed else {},
        window=draw(st.integers(1, 20)),
    )


def on_ranks(ledger: Ledger, step: int, world: int) -> list[list[list[Slot]]]:
    """Rank -> micro-batches -> slots of a step; what every rank's stream works out for itself."""
    batch = ledger.batch(step)
    tokens = ledger.catalogs.text_tokens(batch.texts)
    keys = ledger.catalogs.keys(batch.rows)
    budget = ledger.phases[batch.phase].micro_batch_tokens
    ranks = []
    for rank in range(world):
        cut, weights = cut_batch(batch, tokens, budget, rank=rank, world=world)
        slots = [
            (int(slot), keys[source], int(tokens[source]), float(weight))
            for slot, source, weight in zip(cut.slots, cut.source, weights, strict=True)
        ]
        ends = np.cumsum(cut.sizes)
        assert ends[-1] == len(slots)
        ranks.append([slots[end - size : end] for end, size in zip(ends, cut.sizes, strict=True)])
    return ranks


def real(ranks: Sequence[Sequence[Sequence[Slot]]]) -> list[Slot]:
    return [slot for rank in ranks for micro in rank for slot in micro if slot[3]]


def same(a: GlobalBatch, b: GlobalBatch) -> bool:
    names = ("step", "phase", "resolution", "bucket", "epoch", "num_by_dataset", "epochs_by_dataset")
    arrays = ("rows", "texts", "weights")
    return all(getattr(a, name) == getattr(b, name) for name in names) and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays
    )


@FAST
@given(run=runs(weighed=False), world=st.integers(1, 9), epochs=st.integers(1, 3))
def test_at_weight_1_the_ranks_together_see_every_sample_of_every_data_set_once_per_epoch(
    run: Run, world: int, epochs: int
) -> None:
    run = replace(run, phases=(replace(run.phases[0], last_step=10_000),))
    ledger = run.ledger()
    for resolution in run.phases[0].weights:
        expected = run.trainable(resolution)
        seen: list[Counter[str]] = [Counter() for _ in range(epochs)]
        step = 0
        while True:
            batch = ledger.batch(step)
            if batch.resolution == resolution:
                if batch.epoch >= epochs:
                    break
                seen[batch.epoch].update(key for _, key, _, _ in real(on_ranks(ledger, step, world)))
            step += 1
        assert all(sorted(epoch.elements()) == expected for epoch in seen)


@FAST
@given(run=runs(), worlds=st.sets(st.integers(1, 9), min_size=2, max_size=3), first=st.integers(0, 180))
def test_all_ranks_do_as_many_forwards_and_any_number_of_them_sees_the_same(
    run: Run, worlds: set[int], first: int
) -> None:
    ledger = run.ledger()
    of_key = run.buckets()
    for step in range(first, min(first + 12, run.phases[-1].last_step)):
        batch = ledger.batch(step)
        expected = real(on_ranks(ledger, step, 1))
        assert len(expected) == batch.num_real > 0
        budget = run.phases[batch.phase].micro_batch_tokens
        for world in worlds:
            ranks = on_ranks(ledger, step, world)
            # Equal forwards, also of equal size, so that no collective waits for a rank that has none.
            assert len({tuple(len(micro) for micro in rank) for rank in ranks}) == 1
            # Rectangular: every sample's target and conditions are of the batch's sizes.
            assert {of_key[key] for _, key, _, _ in expected} == {batch.bucket}
            # The same samples, with the same captions, in the same slots: these seed the noise.
            assert real(ranks) == expected
            slots = [slot for rank in ranks for micro in rank for slot, _, _, _ in micro]
            assert slots == list(range(len(slots)))
            for micro in (micro for rank in ranks for micro in rank):
                tokens = len(micro) * (batch.bucket.tokens + max(length for _, _, length, _ in micro))
                assert tokens <= budget or len(micro) == 1


@FAST
@given(run=runs(), first=st.integers(0, 195), worlds=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_a_stop_at_every_step_and_a_resume_on_other_ranks_gives_the_same_sequence(
    run: Run, first: int, worlds: list[int]
) -> None:
    """Every step is asked of a ledger that knows no earlier one, on another number of ranks each time."""
    last = min(first + 10, run.phases[-1].last_step)
    unbroken = run.ledger()
    walked = [unbroken.batch(step) for step in range(first, last)]
    kept = [real(on_ranks(unbroken, step, 1)) for step in range(first, last)]
    for stop in range(first, last):
        resumed = run.ledger()
        world = worlds[stop % len(worlds)]
        for step in range(stop, min(stop + 3, last)):
            assert same(resumed.batch(step), walked[step - first])
            assert real(on_ranks(resumed, step, world)) == kept[step - first]


@FAST
@given(run=runs(), epochs=st.integers(1, 4))
def test_weights_and_shares_are_honoured_within_rounding(run: Run, epochs: int) -> None:
    phase = replace(run.phases[0], last_step=10_000, weights={32: 1.0})
    run = replace(run, phases=(phase,))
    ledger = run.ledger()
    came: Counter[str] = Counter()
    step = 0
    while ledger.batch(step).epoch < epochs:
        came.update(key for _, key, _, _ in real(on_ranks(ledger, step, 3)))
        step += 1
    weight = dict[str, float]()
    for index in range(len(run.catalogs)):
        catalog = run.catalogs[index]
        local = np.flatnonzero(catalog.latents[32].bucket >= 0)
        rule = [factor_of(int(row), run.weights) for row in catalog.rows[local]]
        weight |= dict(zip(run.catalogs.keys(local + run.catalogs.row_base(index)), rule, strict=True))
    totals = {name: sum(w for key, w in weight.items() if of(key) == name) for name in run.names or ("",)}
    if run.mix is None:
        times = {"": 1.0}
    elif run.mix.unit == "repeats":
        times = dict(run.mix.amounts)
    else:
        shares = sum(run.mix.amounts.values())
        times = {n: run.mix.amounts[n] / shares * sum(totals.values()) / totals[n] for n in run.names}
    for key, w in weight.items():
        assert abs(came[key] - epochs * w * times[of(key)]) < 1 + 1e-4
    if run.mix is not None:
        for name in run.names:
            num = sum(n for key, n in came.items() if of(key) == name)
            assert abs(num - epochs * totals[name] * times[name]) <= 4


def factor_of(row: int, weights: Mapping[str, float]) -> float:
    if "row < 3" in weights and row < 3:
        return weights["row < 3"]
    return weights.get("row > 4", 1.0) if row > 4 else 1.0


def of(key: str) -> str:
    return key.rpartition("/")[0]
