"""Latents and pictures against the stock pipelines' own encoding and decoding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageImg2ImgPipeline,
)

from qwenimg_dist.models.tiny import tiny_pipeline_dir
from qwenimg_dist.models.vae import LatentCodec

SIZES = [(64, 64), (48, 96), (96, 48)]


@pytest.fixture(scope="module")
def tiny() -> Path:
    return tiny_pipeline_dir()


@pytest.fixture(scope="module")
def codec(tiny: Path) -> LatentCodec:
    return LatentCodec.load(tiny)


@pytest.fixture(scope="module")
def stock(tiny: Path) -> dict[str, Any]:
    return {
        "vae": AutoencoderKLQwenImage.from_pretrained(tiny / "vae").eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained(tiny / "scheduler"),
        "text_encoder": None,
        "tokenizer": None,
        "transformer": None,
    }


def pictures(height: int, width: int) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_mean_equals_what_the_stock_edit_pipeline_encodes(
    codec: LatentCodec, stock: dict[str, Any], height: int, width: int
) -> None:
    """That pipeline takes the posterior's mode. Tolerance 1e-5 in fp32."""
    images = pictures(height, width)
    with torch.no_grad():
        reference = QwenImageEditPipeline(**stock, processor=None)._encode_vae_image(images[:, :, None], None)
    mean, logvar = codec.encode(images)
    assert mean.shape == logvar.shape == (2, 16, height // 8, width // 8)
    assert mean.dtype == logvar.dtype == torch.float32
    torch.testing.assert_close(mean, reference[:, :, 0], atol=1e-5, rtol=0)


def test_mean_and_logvar_give_the_stock_pipelines_sample(codec: LatentCodec, stock: dict[str, Any]) -> None:
    """The stock image-to-image pipeline samples the posterior. Tolerance 1e-5 in fp32."""
    images = pictures(32, 64)
    with torch.no_grad():
        reference = QwenImageImg2ImgPipeline(**stock)._encode_vae_image(
            images[:, :, None], torch.Generator().manual_seed(5)
        )
    mean, logvar = codec.encode(images)
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(5))[:, :, 0]
    torch.testing.assert_close(mean + (0.5 * logvar).exp() * noise, reference[:, :, 0], atol=1e-5, rtol=0)
    assert (reference[:, :, 0] - mean).abs().max() > 1e-3, "the sample must differ from the mean to prove anything"


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_decode_equals_the_stock_vae(codec: LatentCodec, stock: dict[str, Any], height: int, width: int) -> None:
    vae = stock["vae"]
    latents = torch.randn(2, 16, height // 8, width // 8, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        reference = vae.decode(latents[:, :, None] * std + mean).sample[:, :, 0]
    images = codec.decode(latents)
    assert images.shape == (2, 3, height, width)
    torch.testing.assert_close(images, reference, atol=1e-5, rtol=0)


def test_half_precision_convolutions_still_give_fp32_latents(tiny: Path, codec: LatentCodec) -> None:
    half = LatentCodec.load(tiny, dtype=torch.bfloat16)
    mean, _ = half.encode(pictures(32, 32))
    assert mean.dtype == torch.float32
    reference, _ = codec.encode(pictures(32, 32))
    assert (mean - reference).norm() / reference.norm() < 0.1


def test_unusable_input_is_named(codec: LatentCodec, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"multiples of 16.*24"):
        codec.encode(torch.zeros(1, 3, 24, 32))
    with pytest.raises(ValueError, match=r"\(B,3,H,W\)"):
        codec.encode(torch.zeros(1, 4, 32, 32))
    with pytest.raises(ValueError, match=r"\(B,16,h,w\)"):
        codec.decode(torch.zeros(1, 4, 4, 4))
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        LatentCodec.load(tmp_path)
