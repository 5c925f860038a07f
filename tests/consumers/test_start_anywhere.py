"""Time from start to the first batch does not grow with the position: work is counted, at step 10 and at step 100,000.

Work is what a start does per row or per byte: draws of the ledger, bytes and files the reader asks for. A start makes
one epoch's order (the one its step lies in), and of the epochs before it, where they differ in length, sums only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_dataset import FakeProducer
from fake_mix import make_producers, mix_config

import qwenimg_dist.data.draws as draws
from consumers.stream import Stream
from qwenimg_dist.data.generations import Generations
from qwenimg_dist.data.ledger_config import LedgerConfig
from qwenimg_dist.data.order import Stream as Order
from qwenimg_dist.data.weights import EpochCounts

NEAR, FAR = 10, 100_000


@dataclass
class Work:
    """Counted since the start."""

    draws: int = 0
    orders: list[int] = field(default_factory=list)
    """Epochs that were shuffled."""
    sums: int = 0
    """Epochs that were summed up, over all groups of rows of one bucket and weight."""
    read_bytes: int = 0


@pytest.fixture(scope="module")
def producers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FakeProducer]:
    return make_producers(tmp_path_factory.mktemp("data"))


def start_at(
    step: int,
    run: Path,
    producers: Mapping[str, FakeProducer],
    config: LedgerConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> Work:
    """What a process does from opening its run to its first batch."""
    work = Work()
    mix, make_order, floors = draws._mix, Order._make_order, EpochCounts.of

    def counted_mix(value: draws.Hashes) -> draws.Hashes:
        work.draws += len(value)
        return mix(value)

    def counted_order(self: Order, segment: int, epoch: int) -> object:
        work.orders.append(epoch)
        return make_order(self, segment, epoch)

    def counted_sums(self: EpochCounts, first: int, num: int) -> object:
        work.sums += num * len(self._groups)
        return floors(self, first, num)

    with monkeypatch.context() as patch:
        patch.setattr(draws, "_mix", counted_mix)
        patch.setattr(Order, "_make_order", counted_order)
        patch.setattr(EpochCounts, "of", counted_sums)
        facets = next(iter(producers.values())).facets
        datasets = {name: producer.dataset for name, producer in producers.items()}
        if config.mix is None:
            datasets = {"": next(iter(datasets.values()))}
        generations = Generations(run, datasets, facets, config, follow=False)
        generations.verify()
        generations.advance(step)
        stream = Stream(generations.ledger, rank=0, world=2, compute_dtype=torch.float32, prefetch=0)
        work.read_bytes = stream.get(step).read_bytes
        stream.close()
    return work


@pytest.mark.parametrize("kind", ["one", "weighed", "mix"])
def test_a_start_at_a_late_step_does_the_work_of_a_start_at_an_early_one(
    kind: str, tmp_path: Path, producers: dict[str, FakeProducer], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = mix_config(steps=FAR + 1)
    if kind != "mix":
        config = replace(config, mix=None)
    if kind == "weighed":
        config = replace(config, weights={"row < 7": 2.5})
    start_at(0, tmp_path / "run", producers, config, monkeypatch)  # makes the catalogs
    near = start_at(NEAR, tmp_path / "run", producers, config, monkeypatch)
    far = start_at(FAR, tmp_path / "run", producers, config, monkeypatch)
    assert len(near.orders) == len(far.orders) == 1
    assert far.orders[0] > 1000 * (near.orders[0] + 1)  # it does lie thousands of epochs later
    # An epoch of weights may have some more rows or batches than another one.
    assert far.draws <= near.draws * (1 if kind == "one" else 1.25)
    assert far.read_bytes < 2 * near.read_bytes
    if kind == "one":
        assert near.sums == far.sums == 0
    else:
        # A few numbers per epoch that is passed, at most twice as many as needed, and none of them per row.
        groups = 3 * 2 * (2 if kind == "mix" else 1) + 3
        assert far.sums <= 2 * (far.orders[0] + 16) * groups


def test_sums_of_a_million_epochs_are_an_affair_of_one_pass_over_numbers() -> None:
    """What is kept is one number per epoch; nothing per epoch and row is ever held."""
    bucket = np.zeros(1000, dtype=np.int16)
    counts = EpochCounts(bucket, np.full(1000, 3 << 22), np.arange(1000) << 14)
    found = counts.of(10**6, 8192)[0]
    assert found.shape == (8192,)
    assert found.sum() == sum(counts.at(epoch)[0] for epoch in (10**6, 10**6 + 1, 10**6 + 2, 10**6 + 3)) * 2048
