"""Trains the tiny VAE's weights: `python -m qwenimg_dist.models.train_tiny_vae --out DIR`.

Place in the flow: run by hand, once; its result lies in `models/assets/tiny_vae`, and `models.tiny` copies it
into every tiny pipeline. The class is the real `AutoencoderKLQwenImage`, at base width 8 (0.67 M parameters,
2.7 MB).

60 % of what it sees are the demo's pictures, 40 % synthetic stand-ins for photographs, so that other people's
pictures come back recognisable. Training runs on the single-frame path: with one frame only the last temporal
tap of a causal 3-D convolution sees data, so each collapses exactly to 2-D; the other taps are set to zero.
Left out on purpose: adversarial and perceptual losses, video, learned posterior variance (it is a constant).
"""

import argparse
import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    QwenImageAttentionBlock,
    QwenImageCausalConv3d,
    QwenImageResample,
    QwenImageResidualBlock,
)
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from qwenimg_dist.demo.photos import generic_picture
from qwenimg_dist.demo.shapes import all_scenes, render
from qwenimg_dist.models.frame_vae import collapse_frames

logger = logging.getLogger(__name__)

UInt8Array = NDArray[np.uint8]

ARCHITECTURE = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1}
NATIVE_PX = 160
"""Side of the pictures before they are resized, as in the demo's folder."""
POSTERIOR_LOGVAR = -6.0
"""Constant log variance of the posterior; its noise is added in training: nearby latents decode alike."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one training; the defaults made the shipped weights."""

    num_steps: int = 9000
    """Optimiser steps of the cosine schedule: about 15 minutes on one free core."""
    minutes: float | None = None
    """Wall-clock limit: the schedule is squeezed into it. Then the result depends on the machine's speed."""
    learning_rate: float = 2.5e-3
    """Peak of the cosine schedule of AdamW."""
    batch_64: int = 8
    """Pictures per step at 64 px; a step at 128 px has a quarter of it, so as many pixels."""
    num_pictures: int = 1440
    """Pictures of each of the two kinds, made once."""
    generic_share: float = 0.4
    """Share of generic content in a batch."""
    scale_penalty: float = 1e-5
    """Weight of mean(z^2): keeps the latents from growing without bound against the posterior's noise."""
    seed: int = 0


def expand_frames(frame_vae: nn.Module) -> dict[str, Tensor]:
    """State dict of the 3-D class: the trained taps last in time, the others zero."""
    vae = AutoencoderKLQwenImage(**ARCHITECTURE)
    target = vae.state_dict()
    state = {}
    for name, value in frame_vae.state_dict().items():
        wanted = target[name]
        if wanted.shape == value.shape:
            state[name] = value.detach().clone()
        else:
            state[name] = torch.zeros_like(wanted)
            state[name][:, :, -1] = value.detach()
    return state


@torch.no_grad()
def initialise(vae: AutoencoderKLQwenImage, seed: int) -> None:
    """The initialisation that decided it: a signal path that works before any residual branch has learnt.

    Default (Kaiming) initialisation stalls at a grey 18 dB. Here the skip path is orthogonal centre taps,
    downsampling averages, residual branches start small, and `conv_in` has a bias: the RMS norms discard a
    pixel's amplitude, and against a constant channel it survives as a ratio.
    """
    generator = torch.Generator().manual_seed(seed)

    def orthogonal_centre(weight: Tensor, gain: float = 1.0) -> None:
        taps = torch.empty(weight.shape[:2])
        nn.init.orthogonal_(taps, gain=gain, generator=generator)
        weight.zero_()
        middle = tuple(size // 2 for size in weight.shape[-2:])
        centre = weight[:, :, -1] if weight.dim() == 5 else weight
        centre[:, :, middle[0], middle[1]] = taps

    for module in vae.modules():
        if isinstance(module, QwenImageCausalConv3d):
            orthogonal_centre(module.weight)
            module.bias.zero_()
    for module in vae.modules():
        if isinstance(module, QwenImageResidualBlock):
            for conv, gain in ((module.conv1, 1.0), (module.conv2, 0.2)):
                fan_in = conv.weight[:, :, -1][0].numel()
                conv.weight[:, :, -1].normal_(0.0, gain * math.sqrt(2.0 / fan_in), generator=generator)
        elif isinstance(module, QwenImageAttentionBlock):
            module.proj.weight.mul_(0.1)
            module.proj.bias.zero_()
        elif isinstance(module, QwenImageResample):
            conv = module.resample[1]
            conv.bias.zero_()
            if module.mode.startswith("down"):
                conv.weight.zero_()
                eye = torch.eye(conv.weight.shape[0])
                conv.weight[:, :, :2, :2] = 0.25 * eye[:, :, None, None]
            else:
                orthogonal_centre(conv.weight)
    for conv in (vae.encoder.conv_in, vae.decoder.conv_in):
        conv.bias.normal_(0.0, 1.0, generator=generator)
    # Only the mean half of the encoder's output is trained; the variance half is the constant.
    num_latents = ARCHITECTURE["z_dim"]
    vae.quant_conv.weight[num_latents:].zero_()
    vae.quant_conv.bias[num_latents:].fill_(POSTERIOR_LOGVAR)


def _resized(image: Image.Image, side_px: int) -> UInt8Array:
    return np.asarray(image.resize((side_px, side_px), Image.Resampling.BICUBIC), dtype=np.uint8)


def demo_pictures(num_pictures: int, side_px: int, seed: int) -> UInt8Array:
    """(num_pictures, side, side, 3): the demo's pictures, all scenes in turn, resized as `produce` would."""
    rng = np.random.default_rng(seed)
    scenes = all_scenes()
    return np.stack([_resized(render(scenes[i % len(scenes)], NATIVE_PX, rng), side_px) for i in range(num_pictures)])


def to_pixels(pictures: UInt8Array) -> Tensor:
    """(B, H, W, 3) bytes -> (B, 3, 1, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).unsqueeze(2).float() / 127.5 - 1.0


class _Pictures:
    """Pools of pictures made once per side; batches are drawn from them with replacement."""

    def __init__(self, config: TrainConfig) -> None:
        self._rng = np.random.default_rng(config.seed + 1)
        self._generic_share = config.generic_share
        generic = [generic_picture(self._rng, NATIVE_PX) for _ in range(config.num_pictures)]
        self._pools = {
            side_px: (
                demo_pictures(config.num_pictures, side_px, config.seed + 2),
                np.stack([_resized(picture, side_px) for picture in generic]),
            )
            for side_px in (64, 128)
        }

    def batch(self, side_px: int, size: int) -> Tensor:
        num_generic = int(self._rng.binomial(size, self._generic_share))
        demo, generic = self._pools[side_px]
        picked = [
            demo[self._rng.integers(len(demo), size=size - num_generic)],
            generic[self._rng.integers(len(generic), size=num_generic)],
        ]
        return to_pixels(np.concatenate(picked))


def _share_used(config: TrainConfig, step: int, start_s: float) -> float:
    share = step / config.num_steps
    if config.minutes is not None:
        share = max(share, (time.monotonic() - start_s) / (60.0 * config.minutes))
    return share


def train(config: TrainConfig) -> AutoencoderKLQwenImage:
    """Train and return the 3-D class with the trained weights; its latent statistics are not yet set."""
    torch.manual_seed(config.seed)
    vae = AutoencoderKLQwenImage(**ARCHITECTURE)
    initialise(vae, config.seed)
    collapse_frames(vae)
    vae.train()
    pictures = _Pictures(config)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    num_latents = ARCHITECTURE["z_dim"]
    noise_std = math.exp(POSTERIOR_LOGVAR / 2)
    start = time.monotonic()
    step = 0
    running = {64: math.nan, 128: math.nan}
    while (used := _share_used(config, step, start)) < 1.0:
        rate = config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * used)) * min(1.0, (step + 1) / 50)
        for group in optimiser.param_groups:
            group["lr"] = rate
        side_px = 64 if step % 2 == 0 else 128
        pixels = pictures.batch(side_px, config.batch_64 if side_px == 64 else max(1, config.batch_64 // 4))
        mean = vae.quant_conv(vae.encoder(pixels))[:, :num_latents]
        # The decoder's own output: `decode()` clamps, and a clamped pixel has no gradient.
        decoded = vae.decoder(vae.post_quant_conv(mean + noise_std * torch.randn_like(mean)))
        error = F.mse_loss(decoded, pixels)
        loss = error + 0.02 * F.l1_loss(decoded, pixels) + config.scale_penalty * mean.square().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        previous = running[side_px]
        running[side_px] = error.item() if math.isnan(previous) else 0.97 * previous + 0.03 * error.item()
        step += 1
        if step % 100 == 0:
            db = {side: 10 * math.log10(4.0 / value) for side, value in running.items()}
            logger.info(
                "step %d, %.0f %%: %.2f dB at 64 px, %.2f dB at 128 px (mixed content)",
                step, 100 * used, db[64], db[128],
            )  # fmt: skip
    trained = AutoencoderKLQwenImage(**ARCHITECTURE)
    trained.load_state_dict(expand_frames(vae))
    return trained.eval()


@torch.no_grad()
def psnr(vae: AutoencoderKLQwenImage, pictures: UInt8Array) -> float:
    """Mean over pictures of the PSNR in dB, through stock `encode().mode()` and `decode()`, peak 255."""
    values = []
    for i in range(0, len(pictures), 16):
        pixels = to_pixels(pictures[i : i + 16])
        decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        errors = (decoded - pixels).square().mean(dim=(1, 2, 3, 4))
        values.append(10 * torch.log10(4.0 / errors))
    return float(torch.cat(values).mean())


@torch.no_grad()
def latent_statistics(
    vae: AutoencoderKLQwenImage, seed: int, *, num_pictures: int = 288
) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation (not its inverse) of the posterior mean on demo pictures."""
    latents = []
    for side_px, count in ((64, num_pictures), (128, math.ceil(num_pictures / 4))):  # as many pixels of each
        pictures = demo_pictures(count, side_px, seed)
        for i in range(0, count, 16):
            z_BC1HW = vae.encode(to_pixels(pictures[i : i + 16])).latent_dist.mode()
            latents.append(z_BC1HW.transpose(0, 1).flatten(1))
    z_CN = torch.cat(latents, dim=1)
    return [round(v, 4) for v in z_CN.mean(dim=1).tolist()], [round(v, 4) for v in z_CN.std(dim=1).tolist()]


def main(arguments: list[str] | None = None) -> None:
    """Train, measure, save to `--out` in diffusers' layout."""
    parser = argparse.ArgumentParser(description="Train the tiny VAE and save it in diffusers' layout.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--steps", type=int, default=TrainConfig.num_steps, help="length of the schedule")
    parser.add_argument("--minutes", type=float, default=None, help="squeeze the schedule into this time")
    parser.add_argument("--pictures", type=int, default=TrainConfig.num_pictures, help="of each kind, to draw from")
    parser.add_argument("--seed", type=int, default=TrainConfig.seed)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    config = TrainConfig(
        num_steps=options.steps,
        minutes=options.minutes,
        num_pictures=options.pictures,
        seed=options.seed,
    )
    vae = train(config)
    mean, std = latent_statistics(vae, config.seed + 3, num_pictures=min(288, config.num_pictures))
    vae.register_to_config(latents_mean=mean, latents_std=std)
    vae.save_pretrained(options.out)
    num_judged = min(72, config.num_pictures)
    report = {
        f"psnr_db_{side}": round(psnr(vae, demo_pictures(num_judged, side, config.seed + 4)), 2) for side in (64, 128)
    }
    logger.info("%s", json.dumps({**report, "latents_mean": mean, "latents_std": std}))


if __name__ == "__main__":
    main()
