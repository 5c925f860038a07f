"""Tiny instances of the classes that filters load, saved as they lie on the hub: weights, processor, tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma.tokenization_gemma import GemmaTokenizer
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

_SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_VISION = {**_SMALL, "image_size": 32, "patch_size": 8}

Model = TypeVar("Model", bound=torch.nn.Module)


def save_clip(folder: Path, seed: int = 0) -> Path:
    """CLIP with a context of 16 tokens, characters as tokens."""
    torch.manual_seed(seed)
    characters = ByteLevel.alphabet()
    names = [*characters, *(f"{one}</w>" for one in characters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {name: number for number, name in enumerate(names)}
    text = {**_SMALL, "vocab_size": len(vocab), "max_position_embeddings": 16}
    text |= {"bos_token_id": len(vocab) - 2, "eos_token_id": len(vocab) - 1}
    config = CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=24)
    _randomised(CLIPModel(config)).save_pretrained(folder)
    CLIPTokenizer(vocab=vocab, merges=[]).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_siglip2(folder: Path, seed: int = 0) -> Path:
    """SigLIP 2 as google/siglip2-base lies there: SigLIP's class with Gemma's tokenizer, which pads on the left unless
    told otherwise; a context of 24 tokens."""
    torch.manual_seed(seed)
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
    names += [chr(code) for code in range(33, 127)] + list("今日特价猫") + [f"<0x{code:02X}>" for code in range(256)]
    vocab = {name: number for number, name in enumerate(names)}
    text = {**_SMALL, "vocab_size": len(vocab), "max_position_embeddings": 24, "projection_size": 32}
    text |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    _randomised(SiglipModel(SiglipConfig(text_config=text, vision_config=_VISION))).save_pretrained(folder)
    GemmaTokenizer(vocab=vocab, merges=[], add_bos_token=False, add_eos_token=True).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_classifier(folder: Path, labels: tuple[str, ...], *, several: bool = False, seed: int = 0) -> Path:
    """A ViT that tells these labels apart."""
    torch.manual_seed(seed)
    config = ViTConfig(**_VISION, id2label=dict(enumerate(labels)), label2id={one: i for i, one in enumerate(labels)})
    config.problem_type = "multi_label_classification" if several else "single_label_classification"
    _randomised(ViTForImageClassification(config)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def _randomised(model: Model) -> Model:
    """Weights so large that pictures and captions differ."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model
