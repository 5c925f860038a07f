"""The shipped VAE reconstructs, its statistics are measured ones, and its training script is what it says."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLQwenImage

from qwenimg_dist.models.frame_vae import collapse_frames
from qwenimg_dist.models.tiny import ASSETS
from qwenimg_dist.models.train_tiny_vae import (
    ARCHITECTURE,
    TrainConfig,
    demo_pictures,
    expand_frames,
    initialise,
    latent_statistics,
    main,
    psnr,
    to_pixels,
    train,
)

WEIGHTS = ASSETS / "tiny_vae" / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def shipped() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage.from_pretrained(ASSETS / "tiny_vae")


@pytest.mark.parametrize(("side_px", "num_pictures", "least_db"), [(64, 72, 28.0), (128, 24, 31.0)])
def test_the_shipped_vae_reconstructs_the_demo(
    shipped: AutoencoderKLQwenImage, side_px: int, num_pictures: int, least_db: float
) -> None:
    assert psnr(shipped, demo_pictures(num_pictures, side_px, seed=1234)) >= least_db


def test_the_shipped_weights_are_small() -> None:
    assert WEIGHTS.stat().st_size < 4_000_000


def test_the_shipped_statistics_are_measured_ones(shipped: AutoencoderKLQwenImage) -> None:
    """Standard deviations, not their inverses: normalised latents of new pictures are near N(0, 1)."""
    mean, std = latent_statistics(shipped, seed=77)
    assert shipped.config.latents_std == pytest.approx(std, rel=0.1)
    assert shipped.config.latents_mean == pytest.approx(mean, abs=0.1)
    assert min(std) > 0.1, "a channel that carries nothing would be amplified noise"


def test_training_on_frames_is_the_stock_vae_exactly() -> None:
    torch.manual_seed(0)
    frames = AutoencoderKLQwenImage(**ARCHITECTURE)
    initialise(frames, seed=0)
    collapse_frames(frames)
    for parameter in frames.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    stock = AutoencoderKLQwenImage(**ARCHITECTURE).double()
    stock.load_state_dict(expand_frames(frames))
    frames = frames.double()
    pixels = torch.randn(2, 3, 1, 32, 48, dtype=torch.float64)
    with torch.no_grad():
        posterior = frames.quant_conv(frames.encoder(pixels))
        torch.testing.assert_close(stock.encode(pixels).latent_dist.parameters, posterior, atol=1e-10, rtol=0)
        latents = posterior[:, :16]
        decoded = frames.decoder(frames.post_quant_conv(latents)).clamp(-1, 1)
        torch.testing.assert_close(stock.decode(latents).sample, decoded, atol=1e-10, rtol=0)


def test_the_initialisation_passes_the_picture_through() -> None:
    """Before any training each colour channel already reaches the latents: what default initialisation lacks."""
    vae = AutoencoderKLQwenImage(**ARCHITECTURE)
    initialise(vae, seed=0)
    pixels = to_pixels(demo_pictures(12, 64, seed=0))
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mode()[:, :, 0].permute(0, 2, 3, 1).reshape(-1, 16)
    targets = torch.nn.functional.avg_pool2d(pixels[:, :, 0], 8).permute(0, 2, 3, 1).reshape(-1, 3)
    design = torch.cat([latents, torch.ones(len(latents), 1)], dim=1)
    fitted = design @ torch.linalg.lstsq(design, targets).solution
    explained = 1 - (fitted - targets).square().sum() / (targets - targets.mean(0)).square().sum()
    assert explained > 0.9


def test_training_repeats_from_the_seed_and_lowers_the_error() -> None:
    config = TrainConfig(num_steps=16, num_pictures=12, batch_64=4)
    first, again = train(config), train(config)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    untrained = AutoencoderKLQwenImage(**ARCHITECTURE)
    initialise(untrained, config.seed)
    pictures = demo_pictures(6, 64, seed=5)
    assert psnr(first, pictures) > psnr(untrained, pictures) + 1.0


def test_the_script_writes_what_stock_diffusers_loads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    threads = torch.get_num_threads()
    caplog.set_level("INFO")
    main(["--out", str(tmp_path), "--steps", "2", "--pictures", "4"])
    torch.set_num_threads(threads)
    vae = AutoencoderKLQwenImage.from_pretrained(tmp_path)
    assert vae.config.latents_mean != AutoencoderKLQwenImage(**ARCHITECTURE).config.latents_mean
    report = json.loads(caplog.messages[-1])
    assert math.isfinite(report["psnr_db_64"])
