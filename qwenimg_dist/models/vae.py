"""Pixels to normalised latents and back, through the pipeline's own VAE.

Place in the flow: producers encode with it, sampling decodes with it. Latents outside this file are always
normalised, 4-D and fp32: `z = (latent - mean) / std` per channel, with the statistics in the VAE's config.

Shapes: images (B,3,H,W) in [-1,1]; latents (B,16,H/8,W/8). One instance serves one thread: the class keeps
its convolution caches on itself.

Refuses: sides that are not multiples of 16 (8 for the VAE, 2 for the transformer's patches; padding would
change the picture), pickled weights.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from qwenimg_dist.models.frame_vae import collapse_frames

SIDE_MULTIPLE = 16


class LatentCodec:
    """The frozen VAE with its normalisation. `load` it from a pipeline directory, or wrap a VAE at hand.

    `collapse` computes in 2-D what the class computes in 3-D for one frame (`frame_vae.py`: the same within rounding,
    several times faster); the VAE that was given is changed by it.
    """

    def __init__(self, vae: Any, *, collapse: bool = True) -> None:
        self.vae = vae.eval().requires_grad_(False)
        if collapse:
            collapse_frames(self.vae)
        self._collapsed = collapse
        self._mean = torch.tensor(vae.config.latents_mean, dtype=torch.float32).view(1, -1, 1, 1)
        self._std = torch.tensor(vae.config.latents_std, dtype=torch.float32).view(1, -1, 1, 1)

    @classmethod
    def load(
        cls,
        pipeline_dir: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        collapse: bool = True,
    ) -> "LatentCodec":
        """Load PIPELINE/vae. `dtype` is what the convolutions compute in; what goes in and out is fp32."""
        folder = Path(pipeline_dir) / "vae"
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder}: config.json is missing; expected a diffusers pipeline directory")
        vae = AutoencoderKLQwenImage.from_pretrained(folder, use_safetensors=True)
        vae = vae.to(device)
        return cls(vae.to(dtype) if vae.dtype != dtype else vae, collapse=collapse)  # a needless cast would warn

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised posterior of `images` (B,3,H,W) in [-1,1]: (mean, logvar), each (B,16,H/8,W/8) fp32.

        The mode is `mean`; a sample is `mean + exp(0.5 logvar) * N(0,1)`: logvar is normalised too.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected images (B,3,H,W), got {tuple(images.shape)}")
        if images.shape[2] % SIDE_MULTIPLE or images.shape[3] % SIDE_MULTIPLE:
            raise ValueError(f"image sides must be multiples of {SIDE_MULTIPLE}, got {tuple(images.shape[2:])}")
        pixels = images.to(self.vae.device, self.vae.dtype)[:, :, None]
        if self._collapsed:
            posterior = DiagonalGaussianDistribution(self.vae.quant_conv(self.vae.encoder(pixels)))
        else:
            posterior = self.vae.encode(pixels).latent_dist
        mean, std = self._statistics()
        normalised_mean = (posterior.mean[:, :, 0].float() - mean) / std
        return normalised_mean, posterior.logvar[:, :, 0].float() - 2.0 * std.log()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (B,3,H,W) fp32 in [-1,1] of normalised `latents` (B,16,H/8,W/8)."""
        if latents.ndim != 4 or latents.shape[1] != self._mean.shape[1]:
            raise ValueError(f"expected latents (B,{self._mean.shape[1]},h,w), got {tuple(latents.shape)}")
        mean, std = self._statistics()
        raw = (latents.to(mean.device).float() * std + mean).to(self.vae.dtype)
        images: torch.Tensor
        if self._collapsed:
            images = self.vae.decoder(self.vae.post_quant_conv(raw[:, :, None])).clamp(-1.0, 1.0)
        else:
            images = self.vae.decode(raw[:, :, None], return_dict=False)[0]
        return images[:, :, 0].float()

    def _statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.vae.device
        return self._mean.to(device), self._std.to(device)
