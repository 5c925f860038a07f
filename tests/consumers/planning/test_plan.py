"""The plan of the 20 B model on real clusters: what fits, what it takes, what is refused, and that what is offered
fits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from consumers.objectives import build_objective
from consumers.planning.facts import QWEN_IMAGE_2512, model_facts
from consumers.planning.fit import changes_that_fit
from consumers.planning.memory import GIB
from consumers.planning.passes import passes_of
from consumers.planning.plan import JobPlan, check_device, make_job_plan
from consumers.ranks import Ranks
from qwenimg_dist.compose import load_config
from qwenimg_dist.models.transformer import forward_flops

FULL = ["model=qwen_image_2512", "train.steps=1000"]
PARAMETERS = 20_430_401_088


def planned(*overrides: str) -> JobPlan:
    config = load_config([*FULL, *overrides])
    return make_job_plan(config, world_size=config.cluster.ranks)


def test_the_known_architecture_is_qwen_images() -> None:
    facts = model_facts(load_config(FULL))
    assert facts.num_parameters == facts.num_trained == PARAMETERS
    assert facts.block == pytest.approx(339.8e6, rel=1e-3)
    assert "known architecture" in facts.told
    assert QWEN_IMAGE_2512["joint_attention_dim"] == facts.text_width


def test_64_gpus_hold_it_and_8_hold_it_barely() -> None:
    many, few = planned("cluster=nodes_8x8"), planned("cluster=node_8gpu")
    assert not many.faults
    assert not few.faults
    states = many.worst.memory
    assert (states.weights + states.states + states.gradients) * 64 == pytest.approx(18 * PARAMETERS)
    assert states.ema * 64 == pytest.approx(4 * PARAMETERS)
    assert few.worst.memory.persistent == pytest.approx(8 * many.worst.memory.persistent)
    assert few.worst.memory.total / GIB > 55


def test_the_frozen_have_no_states_and_the_offloaded_are_in_host_memory() -> None:
    frozen = planned("cluster=nodes_8x8", "optim.train=[attn]")
    share = frozen.model.num_trained / PARAMETERS
    assert 0.15 < share < 0.3
    memory = frozen.worst.memory
    assert memory.weights * 64 == pytest.approx(2 * PARAMETERS)
    assert (memory.states + memory.gradients + memory.ema) * 64 == pytest.approx(20 * frozen.model.num_trained)
    assert frozen.disk.checkpoint < 0.5 * planned("cluster=nodes_8x8").disk.checkpoint

    offloaded = planned("cluster=nodes_8x8", "engine.offload_optimizer=cpu")
    assert offloaded.worst.memory.persistent * 64 == pytest.approx(2 * PARAMETERS)
    # Gradients twice, once pinned and so rounded up to a power of two.
    assert 24 * PARAMETERS / 64 <= offloaded.host.offloaded <= 28 * PARAMETERS / 64


def test_a_second_model_and_hpz_take_their_part() -> None:
    plain = planned("cluster=nodes_8x8").worst.memory
    hpz = planned("cluster=nodes_8x8", "engine.hpz_partition=8").worst.memory
    assert hpz.total - plain.total == pytest.approx(2 * PARAMETERS / 8)
    dpo = ["cluster=nodes_8x8", "stage=dpo"]
    before, online = planned(*dpo).peaks, planned(*dpo, "objective.reference=online").peaks
    assert online[0].memory.total - before[0].memory.total == pytest.approx(2 * PARAMETERS / 64)
    # Both pictures of a pair go through one forward.
    assert before[-1].stream.resolution == 1328
    assert before[-1].samples == 1
    assert before[-1].tokens == 2 * (6889 + 512)


def test_rollouts_are_forwards_without_a_graph_of_every_picture_of_every_group() -> None:
    small = ["cluster=nodes_8x8", "stage=grpo", "curriculum.phases.mid.global_batch=64", "plan.text_tokens=100"]
    group, twice = planned(*small, "objective.group_size=8"), planned(*small, "objective.group_size=16")
    low, more = group.times[0], twice.times[0]
    assert more.compute_s == pytest.approx(2 * (low.compute_s or 0), rel=0.01)
    # Per picture two rows (guidance), ten forwards and a window of two with backward and recomputation.
    (bucket,) = low.stream.steps
    forward = forward_flops(group.model.architecture, bucket.image_tokens, 100)
    assert low.compute_s == pytest.approx(8 * 2 * (10 + 2 * 4) * forward / (0.25 * 989.4e12))
    assert low.carried.gather_all == pytest.approx(round(low.micro_batches) * (10 + 2 * 2) * 2 * PARAMETERS)
    assert low.carried.reduce == pytest.approx(round(low.micro_batches) * 2 * 4 * PARAMETERS)
    assert set(group.disk.cache) == {"text"}
    held = planned(*small, "objective.kl_weight=0.1")
    assert held.worst.memory.reference * 64 == pytest.approx(2 * PARAMETERS)
    assert group.worst.memory.other > 4e8
    assert passes_of(held.config).trained == build_objective(held.config).forwards_per_batch


def test_rewards_beside_a_rank_take_their_part_of_its_gpu() -> None:
    words = ["cluster=nodes_8x8", "stage=grpo", "reward.weights.pickscore=1", "reward.weights.clip=2"]
    plain, words = planned(*words).worst.memory, [*words, "reward.device=cuda"]
    beside = planned(*words).worst.memory
    assert beside.total - plain.total == pytest.approx(0.5e9 + 3.9e9 + 1.7e9)
    rule = ["reward.weights.pickscore=0", "reward.weights.clip=0", "reward.weights.shapes=1"]  # loads nothing
    for elsewhere in (["cluster.reward_actors=8"], ["cluster.device=cpu"], rule):
        assert planned(*words, *elsewhere).worst.memory.other == plain.other
    assert planned(*words, "stage=sft").worst.memory.other == 0  # no rewards are asked
    room = (plain.total + 3e9) / GIB / 0.9
    given = [*words, f"cluster.device_memory_gib={room:.2f}", "plan.headroom=0.1"]
    tight = planned(*given)
    assert tight.faults
    offered = changes_that_fit(tight, [*FULL, *given], load_config)
    assert ("reward.device=cpu",) in [change.overrides for change in offered]


def test_phases_are_judged_by_their_own_checkpointing_and_budget() -> None:
    found = planned("cluster=node_8gpu", "curriculum.phases.low.activation_checkpointing=false")
    by_phase = {(peak.stream.phase.name, peak.stream.resolution): peak for peak in found.peaks}
    low, mid = by_phase["low", 256], by_phase["mid", 640]
    assert low.tokens <= low.stream.phase.micro_batch_tokens
    assert low.memory.activations > 15 * mid.memory.activations
    assert found.faults
    assert "phase 0 (low) at 256 px" in found.faults[0]
    high = by_phase["high", 1328]
    assert high.samples * (high.bucket.image_tokens + 512) > 0.5 * high.stream.phase.micro_batch_tokens


@pytest.mark.parametrize(
    ("overrides", "one_of"),
    [
        (["cluster=node_8gpu", "engine.activation_checkpointing=false"], "activation_checkpointing=true"),
        (["cluster=node_8gpu", "cluster.ranks=4"], "cluster.ranks=8"),
        (
            ["cluster=node_8gpu", "stage=dpo", "objective.reference=online", "cluster.device_memory_gib=71"],
            "precomputed",
        ),
    ],
)
def test_what_is_offered_fits_when_it_is_given(overrides: list[str], one_of: str) -> None:
    plan = planned(*overrides)
    assert plan.faults
    changes = changes_that_fit(plan, [*FULL, *overrides], load_config)
    assert any(one_of in one for change in changes for one in change.overrides), [c.overrides for c in changes]
    change = next(change for change in changes if any(one_of in one for one in change.overrides))
    again = planned(*overrides, *change.overrides)
    assert not again.faults
    assert again.worst.memory.total == pytest.approx(change.plan.worst.memory.total)


@pytest.mark.slow
def test_changes_are_joined_where_none_suffices_alone() -> None:
    given = ["cluster=node_8gpu", "cluster.ranks=1", "cluster.device_memory_gib=48", "optim.ema_decay=0"]
    given += ["engine.activation_checkpointing=false", "engine.compile=true", "cluster.host_memory_gib=null"]
    plan = planned(*given)
    (change,) = changes_that_fit(plan, [*FULL, *given], load_config)
    assert len(change.overrides) > 2
    assert not planned(*given, *change.overrides).faults
    tiny = [*given, "cluster.device_memory_gib=1"]
    assert changes_that_fit(planned(*tiny), [*FULL, *tiny], load_config) == []


def test_a_save_beside_training_is_a_copy_of_a_rank_s_part_in_host_memory() -> None:
    waiting, beside = (planned("cluster=nodes_8x8", f"checkpoint.background={on}") for on in ("false", "true"))
    assert waiting.host.saving < 0.01 * beside.host.saving
    assert beside.host.saving == pytest.approx(16 * PARAMETERS / 64)
    assert beside.host.total - waiting.host.total == pytest.approx(beside.host.saving - waiting.host.saving)
    given = ["cluster=node_8gpu", "checkpoint.background=true", "cluster.host_memory_gib=256"]
    little = planned(*given)
    assert any("host memory" in fault for fault in little.faults)
    offered = changes_that_fit(little, [*FULL, *given], load_config)
    assert ("checkpoint.background=false",) in [change.overrides for change in offered]


def test_host_memory_is_held_against_the_node() -> None:
    little = planned("cluster=node_8gpu", "engine.offload_optimizer=cpu", "cluster.host_memory_gib=256")
    assert any("host memory" in fault for fault in little.faults)
    assert not planned("cluster=node_8gpu", "engine.offload_optimizer=cpu").faults


def test_the_ranks_ask_before_they_load(small_input: Path, tmp_path: Path) -> None:
    from small_run import overrides

    from consumers.trainer import train

    given = overrides(small_input, "unused", f"run.path={tmp_path / 'run'}", "cluster.device_memory_gib=0.0001")
    with pytest.raises(ValueError, match=r"cannot fit .*phase 0 \(low\) at 64 px .*plan\.force=true"):
        train(load_config(given))
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    ranks = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
    check_device(load_config([*given, "plan.force=true"]), ranks)
    check_device(load_config([*given, "cluster.device_memory_gib=1"]), ranks)
    check_device(load_config([*given, "cluster.device_memory_gib=null"]), ranks)


@pytest.mark.parametrize(("stage", "most"), [("pretrain", 24), ("sft", 12), ("dpo", 12), ("edit", 24), ("grpo", 12)])
def test_every_stage_of_the_real_model_is_one_that_a_team_would_run(stage: str, most: float) -> None:
    """Its own length, average and sizes: not pretraining's batches, of which GRPO would draw each 16 times."""
    config = load_config([f"stage={stage}", "model=qwen_image_2512", "cluster=nodes_8x8"])
    made = make_job_plan(config, world_size=64)
    assert made.hours is not None
    assert 1 < made.hours < most
    assert config.train.steps is not None
    assert config.optim.ema_decay**config.train.steps < 0.01, "what is exported is trained"
    assert config.optim.warmup_steps <= config.train.steps / 10
    if stage != "pretrain":
        assert min(resolution for phase in config.curriculum.phases for resolution in phase.resolutions) >= 640
