"""Text features against `QwenImagePipeline.encode_prompt`."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline
from safetensors.torch import load_file, save_file

from qwenimg_dist.models.template import DROP, TEMPLATE
from qwenimg_dist.models.text_encoder import TextEncoder
from qwenimg_dist.models.tiny import tiny_pipeline_dir
from qwenimg_dist.models.weights import WeightsError

CAPTIONS = [
    "",
    "a red circle on a blue background",
    " ",
    "line one\nline {two} <|im_end|> 图像",
    "a yellow square, " * 30,
    "far beyond the cut " * 300,
]
"""Unequal lengths, in one batch; the last is cut at 512 features."""


@pytest.fixture(scope="module")
def tiny() -> Path:
    return tiny_pipeline_dir()


@pytest.fixture(scope="module")
def encoder(tiny: Path) -> TextEncoder:
    return TextEncoder.load(tiny, dtype=torch.float32)


def stock_pipeline(path: Path) -> Any:
    return QwenImagePipeline.from_pretrained(path, vae=None, transformer=None)


@torch.no_grad()
def stock_features(pipeline: Any, captions: list[str], max_sequence_length: int = 512) -> list[torch.Tensor]:
    text, mask = pipeline.encode_prompt(captions, max_sequence_length=max_sequence_length)
    return [row if mask is None else row[mask[i].bool()] for i, row in enumerate(text)]


def test_template_is_the_pipelines(tiny: Path) -> None:
    pipeline = stock_pipeline(tiny)
    assert pipeline.prompt_template_encode == TEMPLATE
    assert pipeline.prompt_template_encode_start_idx == DROP


def test_features_of_unequal_captions_in_one_batch_equal_stock(encoder: TextEncoder, tiny: Path) -> None:
    """Tolerance 1e-6 on values of order 1, fp32; the padded tail is cut before the model, not after."""
    reference = stock_features(stock_pipeline(tiny), CAPTIONS)
    features = encoder.encode(CAPTIONS)
    assert [f.shape[0] for f in features] == encoder.num_tokens(CAPTIONS)
    assert features[0].shape == (5, encoder.model.config.hidden_size)
    assert features[-1].shape[0] == 512
    for ours, stock in zip(features, reference, strict=True):
        torch.testing.assert_close(ours, stock, atol=1e-6, rtol=0)
    assert encoder.encode([]) == []


def test_batch_composition_changes_features_by_rounding_only(encoder: TextEncoder) -> None:
    """Tolerance 2e-5, fp32."""
    together = encoder.encode(CAPTIONS)
    for caption, expected in zip(CAPTIONS, together, strict=True):
        torch.testing.assert_close(encoder.encode([caption])[0], expected, atol=2e-5, rtol=0)


def test_bf16_equals_a_stock_bf16_load(tiny: Path) -> None:
    """Loading parity: the same rounding of weights, rotary frequencies kept in fp32. Bitwise here."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    pipeline = stock_pipeline(tiny)
    pipeline.text_encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tiny / "text_encoder", dtype=torch.bfloat16
    )
    features = TextEncoder.load(tiny, dtype=torch.bfloat16).encode(CAPTIONS)
    for ours, stock in zip(features, stock_features(pipeline, CAPTIONS), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, stock, atol=2e-2, rtol=0)
        assert torch.equal(ours, stock) or (ours - stock).abs().mean() < 1e-4


def test_shorter_cut(tiny: Path) -> None:
    encoder = TextEncoder.load(tiny, dtype=torch.float32, max_sequence_length=16)
    reference = stock_features(stock_pipeline(tiny), CAPTIONS, max_sequence_length=16)
    for ours, stock in zip(encoder.encode(CAPTIONS), reference, strict=True):
        torch.testing.assert_close(ours, stock, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"1\.\.1024"):
        TextEncoder.load(tiny, max_sequence_length=2000)


def test_only_the_language_tower_is_held(encoder: TextEncoder) -> None:
    names = [name for name, _ in encoder.model.named_parameters()]
    assert not [name for name in names if "visual" in name or "lm_head" in name]
    tensors = [*encoder.model.parameters(), *encoder.model.buffers()]
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in tensors)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_other_generations_of_tensor_names_load(tiny: Path, tmp_path: Path, encoder: TextEncoder, prefix: str) -> None:
    copy = tmp_path / "pipeline"
    shutil.copytree(tiny, copy)
    file = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    save_file({name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items()}, file)
    renamed = TextEncoder.load(copy, dtype=torch.float32)
    assert torch.equal(renamed.encode(["a red circle"])[0], encoder.encode(["a red circle"])[0])


def test_missing_or_misshapen_weights_are_named(tiny: Path, tmp_path: Path) -> None:
    copy = tmp_path / "pipeline"
    shutil.copytree(tiny, copy)
    file = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, file)
    with pytest.raises(WeightsError, match=r"model\.norm\.weight"):
        TextEncoder.load(copy)
    save_file({**tensors, "model.norm.weight": norm[:-1].clone()}, file)
    with pytest.raises(WeightsError, match=r"model\.norm\.weight.*shape"):
        TextEncoder.load(copy)
    save_file({"w": norm}, file)
    with pytest.raises(WeightsError, match="no language tower"):
        TextEncoder.load(copy)


def test_a_tokenizer_with_another_prefix_is_refused(encoder: TextEncoder) -> None:
    class Splitting:
        def __call__(self, text: str) -> Any:
            return type("Batch", (), {"input_ids": list(text)})

    with pytest.raises(ValueError, match="not 34"):
        TextEncoder(encoder.model, Splitting(), max_sequence_length=512)
