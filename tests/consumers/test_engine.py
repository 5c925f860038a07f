"""ZeRO-3 on two ranks is a plain PyTorch loop; what is not finite changes nothing; the EMA comes and goes exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from consumers.ranks import Ranks
from consumers.zero_settings import deepspeed_config
from qwenimg_dist.compose import load_config

Results = Callable[[str], dict[str, Any]]


def test_two_fp32_ranks_equal_a_plain_loop(results: Results) -> None:
    found = results("parity")
    assert found["at_start"] == 0.0
    assert found["moved"] > 1e-3
    for name in ("weights", "ema", "averaged", "loss", "norm"):
        assert found[name] < 1e-6, name


def test_weights_without_gradient_do_not_decay(results: Results) -> None:
    found = results("parity")
    assert found["num_unused"] == 6
    assert found["unused_moved"] == 0.0


def test_not_finite_on_one_rank_updates_nothing_anywhere(results: Results) -> None:
    found = results("skip")
    assert not found["finite"]
    assert found["skipped"]
    assert found["unchanged"]
    assert found["steps"] == 0
    assert found["next_is_clean"]


def test_ema_answers_inside_and_is_gone_afterwards(results: Results) -> None:
    assert results("ema_swap") == {"differs": True, "restored": True}


def test_bf16_keeps_fp32_masters_and_stock_rope(results: Results) -> None:
    found = results("bf16")
    assert found["masters"] == 0.0
    assert found["rope"]
    assert found["dtype"] == "torch.bfloat16"
    assert found["loss"] < 8e-3


def test_activations_are_checkpointed_by_the_step(results: Results) -> None:
    found = results("recompute")
    # Micro-batches of the steps are 1, 2, 3, 1, 2, 3, 1: each runs the block once, or twice where it is recomputed.
    assert found["forwards"] == [1, 2, 6, 2, 4, 3, 1]
    assert found["same"]
    assert found["resumed"]


def test_all_process_groups_wait_longer_than_the_watchdog(results: Results) -> None:
    """The world's, and the copy of it by which DeepSpeed gathers and reduces."""
    assert results("recompute")["timeouts"] == [load_config([]).train.stall_timeout_s + 300] * 2


def test_sizes_follow_the_model() -> None:
    block, matrices = 340_000_000, 6
    names = [f"transformer_blocks.{i}.w{j}" for i in range(60) for j in range(matrices)]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, (block // matrices,))
    ranks = Ranks(rank=0, world_size=64, device=torch.device("cpu"))

    def zero(*settings: str) -> dict[str, int]:
        settings_of_20b = load_config(["model=qwen_image_2512", *settings])
        found: dict[str, int] = deepspeed_config(settings_of_20b, shapes, ranks)["zero_optimization"]
        return found

    fast, small = zero(), zero("engine.gather=layer")
    assert fast["stage3_prefetch_bucket_size"] == pytest.approx(block, rel=1e-6)
    assert block // matrices <= fast["reduce_bucket_size"] < block
    assert fast["stage3_max_live_parameters"] < 4 * block
    assert fast["sub_group_size"] < 60 * block / 64 / 4
    assert small["stage3_prefetch_bucket_size"] == 0
    assert small["stage3_max_live_parameters"] == small["reduce_bucket_size"] == block // matrices
