"""Schedule, Euler steps and guidance against the stock scheduler and pipeline."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift, retrieve_timesteps

from qwenimg_dist.flow.samplers import ode_schedule, sample_ode, true_guidance
from qwenimg_dist.models.tiny import tiny_pipeline_dir

QWEN_IMAGE: dict[str, Any] = json.loads((tiny_pipeline_dir() / "scheduler" / "scheduler_config.json").read_text())


def stock_scheduler(config: dict[str, Any], num_steps: int, image_tokens: int) -> Any:
    """Set as `QwenImagePipeline.__call__` sets it, section 5."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    mu = calculate_shift(
        image_tokens,
        scheduler.config.get("base_image_seq_len", 256),
        scheduler.config.get("max_image_seq_len", 4096),
        scheduler.config.get("base_shift", 0.5),
        scheduler.config.get("max_shift", 1.15),
    )
    retrieve_timesteps(scheduler, num_steps, sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
    return scheduler


@pytest.mark.parametrize("side", [256, 512, 1024, 1328])
@pytest.mark.parametrize("num_steps", [2, 10, 50])
def test_schedule_equals_the_stock_schedulers(side: int, num_steps: int) -> None:
    """Tolerance 1e-6: stock computes in fp32, we in fp64."""
    tokens = (side // 16) ** 2
    sigmas = ode_schedule(num_steps, tokens, QWEN_IMAGE)
    torch.testing.assert_close(sigmas, stock_scheduler(QWEN_IMAGE, num_steps, tokens).sigmas, atol=1e-6, rtol=0)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert sigmas[-2] == pytest.approx(0.02, abs=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        {"use_dynamic_shifting": False, "shift": 3.0},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear", "shift_terminal": 0.05},
    ],
)
def test_other_shifts_equal_stock(config: dict[str, Any]) -> None:
    expected = stock_scheduler(config, 8, 1000).sigmas
    torch.testing.assert_close(ode_schedule(8, 1000, config), expected, atol=1e-6, rtol=0)


def test_degenerate_and_unsupported_schedules() -> None:
    assert ode_schedule(1, 256, QWEN_IMAGE).tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="num_steps"):
        ode_schedule(0, 256, QWEN_IMAGE)
    for key in ("use_karras_sigmas", "invert_sigmas", "stochastic_sampling"):
        with pytest.raises(ValueError, match=key):
            ode_schedule(4, 256, {**QWEN_IMAGE, key: True})


def test_euler_steps_equal_the_stock_schedulers() -> None:
    scheduler = stock_scheduler(QWEN_IMAGE, 7, 300)
    noise = torch.randn(2, 16, 4, 6)

    def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return torch.sin(x) * sigma[:, None, None, None] + 0.3

    expected = noise
    for timestep in scheduler.timesteps:
        v = velocity(expected, (timestep / 1000).expand(2))
        expected = scheduler.step(v, timestep, expected).prev_sample
    ours = sample_ode(velocity, noise, ode_schedule(7, 300, QWEN_IMAGE))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_guidance_formula() -> None:
    positive, negative = torch.randn(2, 6, 64), torch.randn(2, 6, 64)
    guided = true_guidance(positive, negative, 4.0)
    combined = negative + 4.0 * (positive - negative)
    stock = combined * (torch.norm(positive, dim=-1, keepdim=True) / torch.norm(combined, dim=-1, keepdim=True))
    torch.testing.assert_close(guided, stock, atol=1e-6, rtol=0)
    torch.testing.assert_close(guided.norm(dim=-1), positive.norm(dim=-1))
    torch.testing.assert_close(true_guidance(positive, negative, 1.0), positive, atol=1e-5, rtol=0)
    zero = true_guidance(torch.full((1, 1, 64), 100.0), torch.full((1, 1, 64), 200.0), 2.0)
    assert torch.equal(zero, torch.zeros(1, 1, 64))
