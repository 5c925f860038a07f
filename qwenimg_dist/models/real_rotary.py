"""Rotary embedding in real arithmetic, for compiled blocks: the compiler makes no code for complex numbers.

Place in the flow: `transformer.compile_blocks` installs it. The stock class multiplies queries and keys as complex
numbers, which under `torch.compile` are kernels of their own that nothing fuses with. Here a token's rotation is
(cos, sin) per pair of channels, and the compiler joins it with the normalisation before it and the cast after it. The
attention itself goes through diffusers' dispatch, so that the chosen kernel stays chosen. Refuses nothing; the stock
processor is its reference in the tests.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn


class RealRotaryTables(nn.Module):
    """The stock tables' answer with each complex number as its two parts: (S, D/2) complex -> (S, D/2, 2) fp32."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.stock = stock

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        image, text = self.stock(*args, **kwargs)
        return torch.view_as_real(image), torch.view_as_real(text)


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """(B, S, H, D) by (S, D/2, 2): neighbouring channels are one complex number, turned in fp32."""
    one, other = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    cos, sin = table.unsqueeze(1).unbind(-1)
    turned = torch.stack((one * cos - other * sin, one * sin + other * cos), dim=-1)
    return turned.flatten(-2).type_as(x)


class RealRotaryAttention:
    """Joint attention of text and image tokens, as the stock processor but for the rotation's arithmetic."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, S, D) image and (B, T, D) text states -> the same shapes, text tokens first in the attention."""
        if image_rotary_emb is None or attention_mask is not None:
            raise ValueError("Qwen-Image's blocks pass rotary tables, and masks of the text only")
        image, text = hidden_states, encoder_hidden_states
        num_text = text.shape[1]

        def heads(projected: torch.Tensor, norm: Any = None, table: torch.Tensor | None = None) -> torch.Tensor:
            split = projected.view(*projected.shape[:2], attn.heads, -1)
            split = split if norm is None else norm(split)
            return split if table is None else rotate(split, table)

        of_image, of_text = image_rotary_emb
        query, key, value = (
            torch.cat(pair, dim=1)
            for pair in (
                (
                    heads(attn.add_q_proj(text), attn.norm_added_q, of_text),
                    heads(attn.to_q(image), attn.norm_q, of_image),
                ),
                (
                    heads(attn.add_k_proj(text), attn.norm_added_k, of_text),
                    heads(attn.to_k(image), attn.norm_k, of_image),
                ),
                (heads(attn.add_v_proj(text)), heads(attn.to_v(image))),
            )
        )
        mask = None
        if encoder_hidden_states_mask is not None:
            of_images = encoder_hidden_states_mask.new_ones(image.shape[:2])
            mask = torch.cat((encoder_hidden_states_mask, of_images), dim=1)[:, None, None, :]
        mixed = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=0.0,
            is_causal=False,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        mixed = mixed.flatten(2).type_as(query)
        out = attn.to_out[1](attn.to_out[0](mixed[:, num_text:].contiguous()))
        return out, attn.to_add_out(mixed[:, :num_text].contiguous())


def use_real_rotary(transformer: Any) -> None:
    """Install both. The attention kernel chosen before stays."""
    transformer.pos_embed = RealRotaryTables(transformer.pos_embed)
    for block in transformer.transformer_blocks:
        processor = RealRotaryAttention()
        processor._attention_backend = block.attn.processor._attention_backend
        block.attn.processor = processor
