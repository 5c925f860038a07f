"""The tiny twin of Qwen-Image: real classes, real directory layout, sizes that train on two CPU cores.

Place in the flow: `model=tiny` resolves to `tiny_pipeline_dir()`; everything after that reads a diffusers
pipeline directory and cannot tell it from a download. The transformer and the text encoder are random (the
encoder stays so: two random layers carry enough of a sentence), tokenizer and VAE are trained and shipped in
`assets/`. Refuses to write into a directory that holds anything; never reaches for the hub.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
)

ASSETS = Path(__file__).parent / "assets"
CACHE_VARIABLE = "QWENIMG_DIST_CACHE"
"""Environment variable with the cache directory; without it, `~/.cache/qwenimg-dist`."""

TEXT_HIDDEN = 128

SCHEDULER_CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "stochastic_sampling": False,
    "invert_sigmas": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
"""Qwen-Image-2512's own."""

TRANSFORMER_CONFIG: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": TEXT_HIDDEN,
    "guidance_embeds": False,
    "axes_dims_rope": (8, 12, 12),
}
"""2.5 M parameters. As in the original, the RoPE axes fill the head dimension."""

_TEXT_CONFIG: dict[str, Any] = {
    "hidden_size": TEXT_HIDDEN,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    # Half of the head dimension in three sections, as the original's 16 + 24 + 24.
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
}

_VISION_CONFIG: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "out_hidden_size": TEXT_HIDDEN,
    "fullatt_block_indexes": [1],
}


def _tokenizer() -> Qwen2Tokenizer:
    return Qwen2Tokenizer.from_pretrained(ASSETS / "tiny_tokenizer")


def _text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    def token_id(token: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(token))

    special = {
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"),
    }
    config = Qwen2_5_VLConfig(
        text_config={**_TEXT_CONFIG, **special, "vocab_size": len(tokenizer)},
        vision_config=dict(_VISION_CONFIG),
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def build_tiny_pipeline(*, seed: int = 0, edit: bool = False) -> QwenImagePipeline:
    """The pipeline in memory, fp32 on the CPU; the caller's random state is left as it was. With `edit` its transformer
    is one of an edit pipeline: the same weights, and condition tokens have the time 0."""
    tokenizer = _tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = _text_encoder(tokenizer)
        transformer = QwenImageTransformer2DModel(**TRANSFORMER_CONFIG, zero_cond_t=edit).eval()
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER_CONFIG),
        vae=AutoencoderKLQwenImage.from_pretrained(ASSETS / "tiny_vae"),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def _make_edit_pipeline(folder: Path) -> None:
    """Turn a written pipeline into a `QwenImageEditPlusPipeline`: its name, and the processor that cuts pictures."""
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "QwenImageEditPlusPipeline", "processor": ["transformers", "Qwen2VLProcessor"]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    _tokenizer().save_pretrained(folder / "processor")
    Qwen2VLImageProcessorPil().save_pretrained(folder / "processor")
    file = folder / "processor" / "preprocessor_config.json"
    # The class of this name needs torchvision, which whoever loads the pipeline may have.
    settings = {**json.loads(file.read_text()), "image_processor_type": "Qwen2VLImageProcessor"}
    file.write_text(json.dumps({**settings, "processor_class": "Qwen2VLProcessor"}, indent=2) + "\n")


def write_tiny_pipeline(path: Path, *, seed: int = 0, edit: bool = False) -> Path:
    """Write the tiny twin as a diffusers `QwenImagePipeline` directory and return its path; with `edit` as a
    `QwenImageEditPlusPipeline`.

    The same seed gives the same bytes of every weight. The directory appears complete or not at all (written
    beside its place, then renamed). Raises FileExistsError if `path` exists and is not an empty directory.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} is not empty: give a new directory, or remove this one")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=".tmp", dir=path.parent))
    try:
        scratch.chmod(0o755)  # mkdtemp makes it private, and the directory outlives this process
        build_tiny_pipeline(seed=seed, edit=edit).save_pretrained(scratch, safe_serialization=True)
        if edit:
            _make_edit_pipeline(scratch)
        try:
            scratch.rename(path)
        except OSError as error:
            raise FileExistsError(
                f"{path} was filled by another process meanwhile: use that one, or choose another"
            ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return path


def _fingerprint() -> str:
    """Of all that decides the pipeline's bytes: assets, this code, and the libraries that draw and save."""
    digest = hashlib.sha256()
    for version in (torch.__version__, diffusers.__version__, transformers.__version__):
        digest.update(version.encode() + b"\0")
    for file in [Path(__file__), *sorted(p for p in ASSETS.rglob("*") if p.is_file())]:
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def tiny_pipeline_dir(cache: Path | None = None, *, edit: bool = False) -> Path:
    """Directory of the tiny twin (seed 0; with `edit` of an edit pipeline), made on first use in `cache`, else in the
    per-user cache.

    Safe when several processes ask at once: each may build, one rename wins, all return that one directory.
    """
    if cache is None:
        cache = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "qwenimg-dist")
    path = cache / f"tiny-{'edit-' if edit else ''}{_fingerprint()}"
    if not path.exists():
        try:
            write_tiny_pipeline(path, edit=edit)
        except FileExistsError:
            if not (path / "model_index.json").exists():
                raise
    return path
