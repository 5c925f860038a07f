"""The prediction of a rank's device memory against what an H200 held (`tests/bench/gpu.py`, 16 blocks and all 60)."""

from __future__ import annotations

import pytest

from qwenimg_dist.estimate import device_memory

FULL = {"num_layers": 60, "num_attention_heads": 24, "attention_head_dim": 128}
PART = {**FULL, "num_layers": 16}
PARAMETERS_OF_16 = 5_480_000_000


@pytest.mark.parametrize(
    ("image_tokens", "batch", "checkpointed", "measured_gb"),
    [
        (256, 16, False, 122.74),
        (256, 16, True, 101.54),
        (1024, 6, False, 121.37),
        (4096, 2, False, 124.40),
        (4096, 2, True, 101.86),
        (6889, 1, False, 119.23),
        (6889, 1, True, 101.38),
    ],
)
def test_sixteen_blocks_with_all_states(image_tokens: int, batch: int, checkpointed: bool, measured_gb: float) -> None:
    memory = device_memory(
        PART,
        PARAMETERS_OF_16,
        num_ranks=1,
        precision="bf16",
        ema=False,
        tokens=batch * (image_tokens + 256),
        activation_checkpointing=checkpointed,
    )
    assert memory.total / 1e9 == pytest.approx(measured_gb, rel=0.02)


@pytest.mark.parametrize(
    ("image_tokens", "checkpointed", "measured_gb"),
    [(4096, False, 86.3), (6889, False, 115.4), (4096, True, 43.5), (6889, True, 45.1)],
)
def test_weights_and_activations_of_the_whole_model(image_tokens: int, checkpointed: bool, measured_gb: float) -> None:
    memory = device_memory(
        FULL,
        20_430_401_088,
        num_ranks=1,
        precision="bf16",
        ema=False,
        tokens=image_tokens + 256,
        activation_checkpointing=checkpointed,
    )
    assert (memory.weights + memory.activations) / 1e9 == pytest.approx(measured_gb, rel=0.02)


def test_ranks_share_everything_but_blocks_and_activations() -> None:
    def on(ranks: int) -> float:
        memory = device_memory(
            FULL,
            20_430_401_088,
            num_ranks=ranks,
            precision="bf16",
            ema=True,
            tokens=8192,
            activation_checkpointing=True,
        )
        return memory.total - memory.gathered - memory.activations

    assert on(64) * 64 == pytest.approx(20_430_401_088 * 22)
    assert on(8) == pytest.approx(8 * on(64))
