"""Bytes of a step are ZeRO-3's, hours follow from FLOPs and links, and the scaling model breaks where the network
does."""

from __future__ import annotations

import pytest

from consumers.planning.plan import JobPlan, make_job_plan
from consumers.planning.timing import Measured, time_of
from consumers.planning.traffic import inter_node_bytes, seconds, traffic
from qwenimg_dist.compose import load_config
from qwenimg_dist.models.transformer import forward_flops

FULL = ["model=qwen_image_2512", "train.steps=1000", "cluster=nodes_8x8"]
PARAMETERS = 20_430_401_088


def planned(*overrides: str) -> JobPlan:
    config = load_config([*FULL, *overrides])
    return make_job_plan(config, world_size=config.cluster.ranks)


def test_a_micro_batch_carries_eight_bytes_per_parameter() -> None:
    plan = planned()
    one = traffic(plan.config, plan.model, micro_batches=1, activation_checkpointing=True)
    assert one.total == 8 * PARAMETERS
    assert (one.gather_all, one.gather_group, one.reduce) == (4 * PARAMETERS, 0, 4 * PARAMETERS)
    three = traffic(plan.config, plan.model, micro_batches=3, activation_checkpointing=True)
    assert three.total == 3 * one.total
    layers = planned("engine.gather=layer")
    again = traffic(layers.config, layers.model, micro_batches=1, activation_checkpointing=True)
    assert again.total == 10 * PARAMETERS
    assert traffic(layers.config, layers.model, micro_batches=1, activation_checkpointing=False).total == one.total
    part = planned("optim.train=[attn]")
    assert traffic(part.config, part.model, micro_batches=1, activation_checkpointing=True).reduce == pytest.approx(
        4 * part.model.num_trained
    )


def test_hpz_spares_the_network_a_quarter_of_the_first_and_half_of_further_micro_batches() -> None:
    plain, hpz = planned(), planned("engine.hpz_partition=8")

    def between(plan: JobPlan, micro_batches: int) -> float:
        carried = traffic(plan.config, plan.model, micro_batches=micro_batches, activation_checkpointing=True)
        group = plan.config.engine.hpz_partition
        return inter_node_bytes(carried, plan.config.cluster, world_size=64, hpz=group)

    assert between(hpz, 1) == pytest.approx(0.75 * between(plain, 1))
    assert between(hpz, 2) - between(hpz, 1) == pytest.approx(0.5 * (between(plain, 2) - between(plain, 1)))


def test_links_take_what_the_slower_of_them_takes() -> None:
    plan = planned()
    carried = traffic(plan.config, plan.model, micro_batches=1, activation_checkpointing=True)
    cluster = plan.config.cluster

    def took(ranks: int, **links: float) -> float:
        given = cluster.model_copy(update=links)
        return seconds(carried, given, world_size=ranks, hpz=1, efficiency=1.0)

    assert took(1) == 0
    # 163 GB at 450 GB/s within a node, and nothing between nodes.
    assert took(8) == pytest.approx(8 * PARAMETERS * 7 / 8 / 450e9, rel=0.05)
    assert took(8, inter_node_gbps=1) == took(8)
    assert took(64, inter_node_gbps=40) == pytest.approx(8 * PARAMETERS * 7 / 8 / (8 * 5e9), rel=0.05)
    assert took(64, inter_node_gbps=40) > 5 * took(64)


def test_hours_follow_from_the_formula() -> None:
    plan = planned("cluster.peak_tflops=1000", "plan.mfu=0.5", "plan.text_tokens=256")
    low = plan.times[0]
    assert low.stream.phase.global_batch == 2048
    tokens = {bucket: bucket.image_tokens for bucket in low.stream.steps}
    mean = sum(forward_flops(plan.model.architecture, n, 256) for n in tokens.values()) / len(tokens)
    assert low.compute_s == pytest.approx(32 * 4 * mean / 0.5e15)
    assert low.step_s == pytest.approx(max(low.compute_s or 0, low.network_s))
    assert low.hours == pytest.approx(500 * (low.step_s or 0) / 3600)
    assert plan.hours == pytest.approx(sum(time.hours or 0 for time in plan.times))
    assert low.images_per_s == pytest.approx(2048 / (low.step_s or 1))
    half = planned("cluster.peak_tflops=1000", "plan.mfu=0.25", "plan.text_tokens=256").times[0]
    assert half.compute_s == pytest.approx(2 * (low.compute_s or 0))
    layers = planned("cluster.peak_tflops=1000", "plan.mfu=0.5", "plan.text_tokens=256", "engine.gather=layer").times[0]
    assert layers.step_s == pytest.approx((layers.compute_s or 0) + layers.network_s)


def test_without_a_rate_there_are_no_hours() -> None:
    config = load_config(["train.steps=10"])
    plan = make_job_plan(config, world_size=2)
    assert plan.hours is None
    assert plan.scale == ()


def test_what_was_measured_takes_the_place_of_what_was_assumed() -> None:
    plan = planned()
    stream = plan.data.streams[0]
    assumed = plan.times[0]
    measured = Measured(micro_batch_s=2.0, flops=1e15, update_s=0.5, peak_bytes=0.0)
    key = (stream.phase.index, stream.resolution)
    time = time_of(plan.config, plan.model, plan.data, stream, world_size=64, probe={key: measured})
    assumed_flops = (assumed.compute_s or 0) * 0.25 * 989.4e12
    assert time.step_s == pytest.approx(0.5 + 2.0 * assumed_flops / 1e15)


def test_the_scaling_model_breaks_where_the_network_does() -> None:
    fast, slow = planned(), planned("cluster.inter_node_gbps=25")
    assert [point.num_ranks for point in fast.scale] == [8, 16, 32, 64, 128, 256, 512, 1024]
    assert fast.scale[3].weak["low"] == pytest.approx(1.0, abs=1e-6)
    assert not fast.scale[3].network_bound
    assert "low" in slow.scale[3].network_bound
    assert slow.scale[3].weak["low"] < 0.5
    # Within one node the network between nodes is none.
    assert slow.scale[0].weak == fast.scale[0].weak
    # 2,048 samples on 1,024 ranks are two each: gathering is then all that a step does.
    assert fast.scale[-1].fixed["low"] < 0.5 < fast.scale[-1].weak["low"]
    memory = [point.memory_bytes for point in fast.scale]
    assert memory == sorted(memory, reverse=True)
