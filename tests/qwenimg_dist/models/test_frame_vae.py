"""The VAE in 2-D equals the stock class on single pictures, with weights in all temporal taps; more frames are refused.

The shipped tiny VAE has zeros in the taps that a single frame does not reach, so it could not tell.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLQwenImage

from qwenimg_dist.models.frame_vae import FrameConv
from qwenimg_dist.models.vae import LatentCodec


def random_vae(dtype: torch.dtype) -> AutoencoderKLQwenImage:
    torch.manual_seed(3)
    vae = AutoencoderKLQwenImage(base_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1, z_dim=16)
    return vae.to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_collapsed_equals_stock_in_both_directions(dtype: torch.dtype, tolerance: float) -> None:
    """What goes in and out is fp32, which bounds the fp64 case."""
    stock, fast = LatentCodec(random_vae(dtype), collapse=False), LatentCodec(random_vae(dtype))
    assert any(isinstance(module, FrameConv) for module in fast.vae.modules())
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for mine, theirs in zip(fast.encode(images), stock.encode(images), strict=True):
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()
    latents = torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(1))
    mine, theirs = fast.decode(latents), stock.decode(latents)
    assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_several_frames_are_refused() -> None:
    codec = LatentCodec(random_vae(torch.float32))
    with pytest.raises(ValueError, match="given 2 frames"):
        codec.vae.encoder(torch.zeros(1, 3, 2, 32, 32))
