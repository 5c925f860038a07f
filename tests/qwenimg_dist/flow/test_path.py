"""The path's end points, derivative and precision."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from qwenimg_dist.flow.path import interpolate, velocity_target


def test_end_points_and_derivative() -> None:
    x0, eps = torch.randn(3, 16, 4, 6), torch.randn(3, 16, 4, 6)
    assert torch.equal(interpolate(x0, eps, torch.zeros(3)), x0)
    assert torch.equal(interpolate(x0, eps, torch.ones(3)), eps)
    low, high = torch.full((3,), 0.25), torch.full((3,), 0.75)
    slope = (interpolate(x0, eps, high) - interpolate(x0, eps, low)) / 0.5
    torch.testing.assert_close(slope, velocity_target(x0, eps), atol=1e-5, rtol=0)


def test_convention_is_the_schedulers() -> None:
    """`scale_noise` of the stock scheduler is the same path, and its Euler step to 0 returns the data."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[0.8])
    x0, eps = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4)
    timesteps = scheduler.timesteps.expand(2)
    noisy = interpolate(x0, eps, timesteps / 1000)
    torch.testing.assert_close(noisy, scheduler.scale_noise(x0, timesteps, eps), atol=1e-6, rtol=0)
    back = scheduler.step(velocity_target(x0, eps), scheduler.timesteps[0], noisy).prev_sample
    torch.testing.assert_close(back, x0, atol=1e-5, rtol=0)


def test_half_precision_latents_are_lifted_to_fp32() -> None:
    x0, eps, sigma = torch.ones(1, 4).bfloat16(), torch.zeros(1, 4), torch.tensor([1e-3])
    assert interpolate(x0, eps, sigma).dtype == torch.float32
    assert interpolate(x0, eps, sigma)[0, 0] == pytest.approx(0.999, abs=1e-7)
    assert velocity_target(x0, eps).dtype == torch.float32


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"sigma \(B,\)"):
        interpolate(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(1))
    with pytest.raises(ValueError, match="one shape"):
        interpolate(torch.zeros(2, 4), torch.zeros(2, 5), torch.zeros(2))
