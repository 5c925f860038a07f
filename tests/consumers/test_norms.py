"""Norms per block come from the partitions of two real ranks, and are those of a plain PyTorch loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from consumers.norms import part_of


def test_norms_per_block_are_those_of_a_plain_loop(results: Callable[[str], dict[str, Any]]) -> None:
    norms = results("norms")
    assert {"norms/grad/block_00", "norms/param/block_01", "norms/grad/img_in", "norms/grad/all"} <= set(norms["found"])
    assert norms["found"] == pytest.approx(norms["expected"], rel=1e-5, abs=1e-9)
    assert norms["found"]["norms/grad/all"] == pytest.approx(norms["grad_norm"], rel=1e-5)  # before clipping to 0.1
    assert norms["grad_norm"] > 0.2


def test_parts() -> None:
    assert part_of("transformer_blocks.7.attn.to_q.weight") == "block_07"
    assert part_of("time_text_embed.timestep_embedder.linear_1.bias") == "time_text_embed"


def test_a_rank_that_comes_late_is_the_slowest(results: Callable[[str], dict[str, Any]]) -> None:
    assert results("norms")["slowest"] == 1
