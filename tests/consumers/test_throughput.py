"""FLOPs of padding and of fill slots are no useful work; peaks come from the config first."""

from __future__ import annotations

import pytest
import torch
from small_run import TRANSFORMER

from consumers.batch import MicroBatch, RankBatch
from consumers.ranks import Ranks
from consumers.throughput import Throughput, micro_batch_flops, peak_host_bytes
from qwenimg_dist.models.text_batch import collate_text
from qwenimg_dist.models.transformer import forward_flops
from qwenimg_dist.schema import Bucket

BUCKET = Bucket(height=64, width=128)


def micro_batch(lengths: list[int], weights: list[float]) -> MicroBatch:
    text, mask = collate_text([torch.ones(length, 8) for length in lengths])
    return MicroBatch(
        latents=torch.zeros(len(lengths), 16, 8, 16),
        logvar=None,
        text=text,
        text_mask=mask,
        weights=torch.tensor(weights),
        slots=torch.arange(len(lengths)),
        num_slots=len(lengths),
        bucket=BUCKET,
    )


def test_useful_and_computed_flops() -> None:
    useful, computed = micro_batch_flops(TRANSFORMER, micro_batch([3, 9, 9], [1, 1, 0]))
    assert useful == forward_flops(TRANSFORMER, 32, 3) + forward_flops(TRANSFORMER, 32, 9)
    assert computed == 3 * forward_flops(TRANSFORMER, 32, 9)
    useful, computed = micro_batch_flops(TRANSFORMER, micro_batch([9, 9], [1, 1]))
    assert useful == computed


def test_mfu_is_useful_work_over_the_peak_that_was_given() -> None:
    ranks = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
    batch = RankBatch(
        batch=None,  # type: ignore[arg-type]
        micro_batches=[micro_batch([3, 9], [1, 1]), micro_batch([9, 9], [1, 0])],
        keys=[],
        num_real=3,
        wait_s=0.5,
        read_s=0.0,
        read_bytes=0,
        image_tokens=128,
        text_tokens=30,
        padding=0.1,
    )
    counted = Throughput(TRANSFORMER, ranks, forwards_per_batch=1, peak_tflops=1e-6)
    counted.begin()
    counted.count(batch, 2.0)
    counted.begin()
    counted.count(batch, 2.0)
    found = counted.metrics()
    useful = 3 * (forward_flops(TRANSFORMER, 32, 3) + 2 * forward_flops(TRANSFORMER, 32, 9))
    computed = 3 * 4 * forward_flops(TRANSFORMER, 32, 9)
    assert found["train/mfu"] == pytest.approx(useful / 2.0 / 1e6)
    assert found["train/padding_flops"] == pytest.approx(1 - useful / computed)
    assert found["train/data_wait_share"] == pytest.approx(0.25)
    assert found["train/images_per_s"] == pytest.approx(1.5)
    assert found["train/host_memory_gb"] * 1e9 == pytest.approx(peak_host_bytes(), rel=0.01)
    without = Throughput(TRANSFORMER, ranks, forwards_per_batch=1)
    without.count(batch, 1.0)
    assert not {"train/mfu", "train/memory_gb"} & without.metrics().keys()


def test_high_water_of_host_memory_rises_and_stays() -> None:
    before, slack = peak_host_bytes(), 1 << 24
    block = b"x" * (before + (64 << 20))  # more than this process ever held
    assert peak_host_bytes() > before + (64 << 20) - slack
    del block
    assert peak_host_bytes() > before + (64 << 20) - slack
