"""The VAE for single pictures: its causal 3-D convolutions, which see one frame, as the 2-D convolutions they then are.

Place in the flow: `vae.py` encodes and decodes with it, `train_tiny_vae.py` trains in it. With one frame every other
temporal tap meets zero padding, so a convolution collapses exactly to its last tap; temporal down- and upsampling do
nothing to a first frame in the stock class, and nothing here. Less memory (a third of the weights) and 2 to 3 times
faster. Refuses more than one frame.
"""

from __future__ import annotations

import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from torch import Tensor, nn


class FrameConv(nn.Module):
    """A causal 3-D convolution applied to one frame, (B,C,1,H,W) -> (B,C',1,H',W'). Its last tap's weights."""

    def __init__(self, conv: QwenImageCausalConv3d) -> None:
        super().__init__()
        grad = conv.weight.requires_grad
        self.weight = nn.Parameter(conv.weight.detach()[:, :, -1].clone(), requires_grad=grad)
        self.bias = nn.Parameter(conv.bias.detach().clone(), requires_grad=grad)
        self.padding = (conv._padding[2], conv._padding[0])

    def forward(self, x_BC1HW: Tensor) -> Tensor:
        if x_BC1HW.shape[2] != 1:
            raise ValueError(f"a VAE collapsed to single pictures was given {x_BC1HW.shape[2]} frames")
        return F.conv2d(x_BC1HW[:, :, 0], self.weight, self.bias, padding=self.padding).unsqueeze(2)


def collapse_frames(vae: nn.Module) -> None:
    """Replace every causal 3-D convolution by its single-frame form, in place.

    The stock `encode` and `decode` keep a cache per 3-D convolution and no longer work; call encoder and decoder.
    """
    for parent in list(vae.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QwenImageCausalConv3d):
                setattr(parent, name, FrameConv(child))
