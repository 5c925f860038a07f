"""How the diffusion transformer is called: packing, keyword contract, RoPE tables, cost.

Place in the flow: the consumers' objectives, the evaluation and the samplers all go through
`predict_velocity`; nothing else in the project calls the transformer.

Shapes: B images, 16 latent channels, latent height h and width w (pixels / 8, both even), S = (h/2)(w/2)
image tokens of 64 channels, T text tokens of D channels. An edit's condition pictures, each of a size of its own, stand
behind the S tokens on the sequence axis, as in `QwenImageEditPlusPipeline`: the i-th entry of `img_shapes` is frame i
of the rotary embedding, and a model with `zero_cond_t` gives what is not of the first entry the time 0.

Refuses: mixed shapes in one call (RoPE would silently use the first image's), guidance embeddings (the
model is not guidance-distilled), positional arguments.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import nn

from qwenimg_dist.models.real_rotary import use_real_rotary

LATENT_CHANNELS = 16
PATCH = 2
_FLASH_HOOK = "_qwenimg_dist_flash_hook"


def pack_latents(latents: torch.Tensor) -> torch.Tensor:
    """(B,16,h,w) -> (B,S,64): 2x2 patches, channel-major within a token, as
    `QwenImagePipeline._pack_latents`.
    """
    batch, channels, height, width = latents.shape
    if height % PATCH or width % PATCH:
        raise ValueError(f"latents of {height}x{width} cannot be cut into 2x2 patches: both must be even")
    patches = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    tokens = patches.permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(batch, (height // PATCH) * (width // PATCH), channels * PATCH * PATCH)


def unpack_latents(packed: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B,S,64) -> (B,16,h,w); `height` and `width` in latent pixels. The inverse of `pack_latents`."""
    batch, num_tokens, channels = packed.shape
    if num_tokens * PATCH * PATCH != height * width or height % PATCH or width % PATCH:
        raise ValueError(f"{num_tokens} image tokens do not form latents of {height}x{width}")
    patches = packed.reshape(batch, height // PATCH, width // PATCH, channels // PATCH**2, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // PATCH**2, height, width)


def load_transformer_config(directory: str | Path) -> dict[str, Any]:
    """The constructor arguments in PIPELINE/transformer/config.json (pass that component directory)."""
    file = Path(directory) / "config.json"
    if not file.is_file():
        raise ValueError(f"{file}: missing; expected the transformer folder of a diffusers pipeline")
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if config.get("_class_name") != "QwenImageTransformer2DModel":
        raise ValueError(f"{file}: is a {config.get('_class_name')}, expected QwenImageTransformer2DModel")
    if config.get("guidance_embeds"):
        raise ValueError(f"{file}: guidance-distilled transformers (guidance_embeds) cannot be trained here")
    return {key: value for key, value in config.items() if not key.startswith("_")}


def build_transformer(config: Mapping[str, Any]) -> Any:
    """A `QwenImageTransformer2DModel` with random weights; `config` as from `load_transformer_config`."""
    return QwenImageTransformer2DModel.from_config(dict(config))


def assemble_transformer(
    config: Mapping[str, Any],
    read: Callable[[str], torch.Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Any:
    """A transformer whose parameters are `read(name)`, cast to `dtype` on `device`, ready to infer.

    Built without storage and filled one tensor at a time: peak memory is the model in `dtype` plus one tensor.
    Raises ValueError naming a parameter of another shape.
    """
    with torch.device("meta"):
        model = build_transformer(config)
    rebuild_rope(model)
    state = {}
    for name, parameter in model.named_parameters():
        tensor = read(name)
        if tensor.shape != parameter.shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, the config makes it {tuple(parameter.shape)}")
        state[name] = tensor.to(device=device, dtype=dtype)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def predict_velocity(
    transformer: Callable[..., Any],
    noisy: torch.Tensor,
    sigma: torch.Tensor,
    text: torch.Tensor,
    text_mask: torch.Tensor | None = None,
    conditions: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """The velocity `eps - x0` at `noisy` (B,16,h,w), `sigma` (B,) in [0,1]; returns fp32 (B,16,h,w).

    `text` (B,T,D); `text_mask` (B,T) bool, 1 = valid, None when every token is valid (see `text_batch.collate_text`).
    `conditions`: clean latents (B,16,h_i,w_i) that the pictures are made from; what the model says there is dropped.
    `transformer` is the module, an engine around it, or any callable with its forward. Inputs are cast to a
    module's parameter dtype (a plain callable gets `text.dtype`); the model itself rounds sigma to it.
    """
    if noisy.ndim != 4 or sigma.shape != noisy.shape[:1] or text.shape[0] != noisy.shape[0]:
        raise ValueError(
            f"expected noisy (B,16,h,w), sigma (B,), text (B,T,D); got {tuple(noisy.shape)}, "
            f"{tuple(sigma.shape)}, {tuple(text.shape)}"
        )
    if any(one.ndim != 4 or one.shape[:2] != noisy.shape[:2] for one in conditions):
        shapes = [tuple(one.shape) for one in conditions]
        raise ValueError(f"expected conditions (B,16,h_i,w_i) for noisy {tuple(noisy.shape)}; got {shapes}")
    dtype = next(transformer.parameters()).dtype if isinstance(transformer, nn.Module) else text.dtype
    batch, _, height, width = noisy.shape
    packed = [pack_latents(one) for one in (noisy, *conditions)]
    velocity = transformer(
        hidden_states=torch.cat(packed, dim=1).to(dtype),
        encoder_hidden_states=text.to(dtype),
        encoder_hidden_states_mask=text_mask,
        timestep=sigma,
        img_shapes=[[(1, one.shape[2] // PATCH, one.shape[3] // PATCH) for one in (noisy, *conditions)]] * batch,
        guidance=None,
        return_dict=False,
    )[0]
    velocity = velocity[:, : packed[0].shape[1]]
    return unpack_latents(velocity.float(), height, width)


def rebuild_rope(transformer: nn.Module) -> None:
    """Replaces `transformer.pos_embed` by a fresh one with complex64 tables computed in fp32 on the CPU.

    The tables are plain attributes that the constructor computes: under `torch.device("meta")` they hold
    nothing, and under `deepspeed.zero.Init` they pass through its patched tensor constructors (0.19.8 leaves
    these ones intact on the CPU, but promises nothing). Call it after such a construction, outside those
    contexts and before an engine hooks the modules. The module is replaced, not patched, because it caches
    per instance.
    """
    old: Any = transformer.pos_embed
    with torch.device("cpu"):
        new = type(old)(theta=old.theta, axes_dim=list(old.axes_dim), scale_rope=old.scale_rope)
    if new.pos_freqs.dtype != torch.complex64 or new.pos_freqs.device.type != "cpu":
        raise RuntimeError(
            f"RoPE tables came out as {new.pos_freqs.dtype} on {new.pos_freqs.device}: "
            "rebuild_rope was called inside zero.Init or under a changed default dtype"
        )
    transformer.pos_embed = new


def activation_checkpointing(transformer: Any, enabled: bool) -> None:
    """Recompute each block in the backward pass (stored activations drop ~28x, a step costs 4/3 as much)."""
    if enabled:
        transformer.enable_gradient_checkpointing()
    else:
        transformer.disable_gradient_checkpointing()


def compile_blocks(transformer: Any) -> None:
    """Compile the forward of every block, as one graph without breaks; the code is shared by all blocks.

    The `forward` and not the module, so that hooks around a block (ZeRO-3 gathers its weights there) stay outside of
    the graph. Shapes are dynamic from the second one on: buckets and text lengths change from batch to batch.
    """
    use_real_rotary(transformer)
    # Eager code would be the silent fallback once more kinds of shapes came than this.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for block in transformer.transformer_blocks:
        block.forward = torch.compile(block.forward, fullgraph=True)


def set_attention(transformer: Any, kernel: str) -> None:
    """Choose PyTorch's attention kernel: `native` (by what the inputs allow), `flash`, `cudnn`, `efficient`, `math`.

    `flash` takes no mask, and which batches have one differs from rank to rank: those with one go by `native`.
    """
    logging.getLogger("diffusers.models.modeling_utils").addFilter(_not_experimental)
    transformer.set_attention_backend(kernel if kernel == "native" else f"_native_{kernel}")
    if (earlier := getattr(transformer, _FLASH_HOOK, None)) is not None:
        earlier.remove()
        setattr(transformer, _FLASH_HOOK, None)
    if kernel == "flash":
        setattr(transformer, _FLASH_HOOK, transformer.register_forward_pre_hook(_flash_unless_masked, with_kwargs=True))


def _flash_unless_masked(transformer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    masked = kwargs.get("encoder_hidden_states_mask") is not None
    kernel = AttentionBackendName.NATIVE if masked else AttentionBackendName._NATIVE_FLASH
    for block in transformer.transformer_blocks:
        block.attn.processor._attention_backend = kernel


def _not_experimental(record: logging.LogRecord) -> bool:
    """diffusers calls its backends experimental at every choice, on every rank."""
    return "experimental feature" not in record.getMessage()


def forward_flops(config: Mapping[str, Any], image_tokens: int, text_tokens: int) -> float:
    """FLOPs of one forward for one image: `24 D^2 L (S_img + S_txt + 1) + 4 L D (S_img + S_txt)^2`; `image_tokens`
    with those of its conditions.

    D is the inner dimension, L the number of blocks. Per block and token: attention projections 8 D^2 and
    MLP 16 D^2; once per image the two modulations, 24 D^2; attention scores and values 4 D S per token. The
    in and out projections (< 0.2 % at full size) are left out. Training costs 3x, with full recompute 4x.
    """
    dim = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    num_layers = int(config["num_layers"])
    tokens = image_tokens + text_tokens
    return float(24 * dim**2 * num_layers * (tokens + 1) + 4 * num_layers * dim * tokens**2)
