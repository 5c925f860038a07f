"""Held-out pairs: accuracy, margin and loss against the starting model; both pictures measured with one noise."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_dataset import FakeProducer, fake_latents, fake_rejected, make_rows
from held_out_run import held_out_run

from consumers.evaluate import HeldOut, Measured
from consumers.held_out import HeldOutClass, make_held_out, start_from_json
from consumers.held_out_pairs import NAMES, pair_metrics
from consumers.ranks import Ranks
from consumers.stream import Stream
from qwenimg_dist.compose import load_config
from qwenimg_dist.data.generations import Generations

START = {64: np.array([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]]), 128: np.array([[5.0, 5.0]])}
START_REJECTED = {64: np.array([[3.0, 4.0], [3.0, 4.0], [3.0, 4.0]])}


def test_what_is_counted() -> None:
    chosen = {64: START[64] + [[-0.1, 0.1], [0.0, 0.0], [-0.2, -0.2]], 128: START[128]}
    rejected = {64: START_REJECTED[64] + [[0.0, 0.05], [0.0, 0.0], [-0.1, 0.1]]}
    found = pair_metrics(chosen, rejected, START, START_REJECTED, beta=2.0)
    assert set(found) == set(NAMES)
    # Margins: 0.1, -0.05 / 0, 0 / 0.1, 0.3; what has not moved is not preferred.
    assert found["pair_accuracy"] == pytest.approx(3 / 6)
    assert found["pair_wins"] == pytest.approx(2 / 3)
    assert found["pair_margin"] == pytest.approx(0.45 / 6)
    losses = [math.log1p(math.exp(-margin)) for margin in (0.1, -0.05, 0.0, 0.0, 0.1, 0.3)]
    assert found["pair_loss"] == pytest.approx(sum(losses) / 6)
    assert found["start_loser_loss"] == pytest.approx(3.5)
    assert pair_metrics(chosen, rejected, START, START_REJECTED, beta=2.0, resolutions=[128]) == {}
    assert pair_metrics(chosen, rejected, START, {}, beta=2.0) == {}  # a run from before they were measured
    still = pair_metrics(START, START_REJECTED, START, START_REJECTED, beta=2.0)
    assert (still["pair_accuracy"], still["pair_loss"]) == (0.0, pytest.approx(math.log(2)))


class Model:
    """Predicts nought, and keeps what it was asked."""

    def __init__(self) -> None:
        self.ranks = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def train(self, mode: bool = True) -> None:
        return None

    def predict(self, noisy: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor, mask: Any) -> torch.Tensor:
        self.seen.append((noisy, sigma))
        return torch.zeros_like(noisy)


def generations_of_pairs(root: Path) -> Generations:
    producer = FakeProducer(root / "data", unit_size=8, resolutions=(64,), pairs=True)
    producer.add(make_rows(30, sizes=((256, 256), (128, 256))))
    producer.produce(complete=True)
    return held_out_run(root / "run", producer, held_out=0.5, max_held_out=9)


def test_both_pictures_are_measured_with_the_same_noise_and_kept(tmp_path: Path) -> None:
    run = generations_of_pairs(tmp_path)
    config = load_config(["stage=dpo", "evaluate.num_samples=9", "evaluate.sigma_quantiles=[0.2,0.8]"])
    stream = Stream(run.ledger, rank=0, world=1, compute_dtype=torch.float32, further=("rejected",))
    try:
        classes = make_held_out(config, run, stream, None, {64: 80}, {})
    finally:
        stream.close()
    one: HeldOutClass = classes[64]
    assert one.pairs
    assert len(one.keys) == 9
    held_out, model = HeldOut(config, classes, None), Model()
    measured = held_out.measure(model, None)
    for micro in one.batches:
        for index, slot in enumerate(micro.slots.tolist()):
            key = one.keys[slot]
            assert np.array_equal(micro.latents[index].float().numpy(), fake_latents(key, micro.bucket))
            assert micro.rejected is not None
            assert np.array_equal(micro.rejected[index].float().numpy(), fake_rejected(key, micro.bucket))
    # The zero model's error is the mean square of noise - latents: the noise is that of the slot, for both pictures.
    noisy, sigma = model.seen[0]
    chosen, rejected = noisy.chunk(2)
    at = sigma.chunk(2)[0].view(-1, 1, 1, 1)
    first = one.batches[0].to("cpu")
    assert first.rejected is not None
    assert torch.allclose(chosen - (1 - at) * first.latents, rejected - (1 - at) * first.rejected, atol=1e-5)
    assert measured.errors[64].shape == measured.rejected[64].shape == (9, 2)
    assert not np.allclose(measured.errors[64], measured.rejected[64])

    start = start_from_json(held_out.start_of(measured, "abc").to_json())
    assert start is not None
    assert np.array_equal(start.rejected[64], measured.rejected[64])
    better = Measured(errors={64: measured.errors[64] - 0.5}, rejected=measured.rejected)
    told = held_out.pairs(better, [64], start)
    assert (told["eval/pair_accuracy"], told["eval/pair_margin"]) == (1.0, pytest.approx(0.5))
    assert held_out.pairs(better, [64], replace(start, rejected={})) == {}
    assert held_out.pairs(better, [64], None) == {}
