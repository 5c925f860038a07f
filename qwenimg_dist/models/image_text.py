"""Features of pictures and captions in the common space of CLIP or SigLIP (any class of transformers that has one).

Place in the flow: the filter `similarity` compares them, `aesthetic` puts its head on those of pictures; rewards may do
both. Captions are cut at the model's context and it is said how much of each was seen. Refuses models that give no
features of either kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from qwenimg_dist.models.hub import find_model
from qwenimg_dist.models.image_classifier import load_pretrained, load_weights


@dataclass(frozen=True, kw_only=True)
class CaptionFeatures:
    """Of N captions."""

    features: torch.Tensor
    """(N, D) fp32, of length 1, on the CPU."""
    seen: list[float]
    """Share of each caption's tokens that the model's context holds; 0 of a caption without any."""


class ImageTextModel:
    """A frozen dual encoder, in fp32."""

    def __init__(self, model: Any, tokenizer: Any, processor: Any) -> None:
        for method in ("get_image_features", "get_text_features"):
            if not callable(getattr(model, method, None)):
                raise ValueError(f"{type(model).__name__} has no {method}: a CLIP or SigLIP model is needed")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.processor = processor
        self._siglip = str(model.config.model_type).startswith("siglip")
        self.max_tokens = int(model.config.text_config.max_position_embeddings)

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> ImageTextModel:
        """Raises ValueError naming the directory if no such model with tokenizer and processor lies there."""
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        return cls(
            load_weights(AutoModel, directory).to(device),
            load_pretrained(AutoTokenizer, directory),
            load_pretrained(AutoImageProcessor, directory, backend="pil"),
        )

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """(B, D) fp32, of length 1, on the CPU."""
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.model.device)
        return _normalised(self.model.get_image_features(**inputs))

    @torch.no_grad()
    def caption_features(self, captions: Sequence[str]) -> CaptionFeatures:
        """SigLIP was trained on lower case, padded to its whole context and without a mask; CLIP reads up to the end
        token."""
        texts = [caption.lower() for caption in captions] if self._siglip else list(captions)
        inputs = self.tokenizer(
            texts,
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        )
        names = ("input_ids",) if self._siglip else ("input_ids", "attention_mask")
        found = self.model.get_text_features(**{name: inputs[name].to(self.model.device) for name in names})
        room = self.max_tokens - self.tokenizer.num_special_tokens_to_add()
        lengths = [len(ids) for ids in self.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids]
        return CaptionFeatures(features=_normalised(found), seen=[min(1.0, room / n) if n else 0.0 for n in lengths])

    def cosines(self, images: Sequence[Image.Image], captions: Sequence[str]) -> torch.Tensor:
        """(B,) fp64 on the CPU: of each picture with its own caption. A caption that stands there several times is
        encoded once."""
        distinct = list(dict.fromkeys(captions))
        texts = self.caption_features(distinct).features
        rows = texts[[distinct.index(caption) for caption in captions]]
        return (self.image_features(images).double() * rows.double()).sum(-1)

    @property
    def logit_scale(self) -> float:
        """What the model multiplies its cosines by. Raises ValueError if it has none."""
        scale = getattr(self.model, "logit_scale", None)
        if scale is None:
            raise ValueError(f"{type(self.model).__name__} has no logit_scale")
        return float(scale.exp())


@cache
def shared_model(path: str, revision: str | None, device: str) -> ImageTextModel:
    """The one instance of this process, for filters that use the same model."""
    return ImageTextModel.load(find_model(path, revision), device)


def _normalised(output: Any) -> torch.Tensor:
    features: torch.Tensor = output.pooler_output.float().cpu()
    return torch.nn.functional.normalize(features, dim=-1)
