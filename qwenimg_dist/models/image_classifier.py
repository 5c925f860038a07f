"""A classifier of pictures, of any class that transformers knows, from safetensors.

Place in the flow: filters such as `nsfw` and `watermark` take the probability of some of its labels; rewards may too.
Pictures go through the model's own processor, in Pillow. Refuses label names that the model does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image


class ImageClassifier:
    """A frozen classifier, in fp32."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        self.processor = processor

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> ImageClassifier:
        """Raises ValueError naming the directory if no image classifier with its processor lies there."""
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        model = load_weights(AutoModelForImageClassification, directory)
        return cls(model.to(device), load_pretrained(AutoImageProcessor, directory, backend="pil"))

    @property
    def labels(self) -> list[str]:
        """By the model's numbers."""
        names = self.model.config.id2label
        return [str(names[number]) for number in sorted(names)]

    def indices(self, labels: Sequence[str]) -> list[int]:
        """Numbers of these labels, whatever their case. Raises ValueError naming one that is not there."""
        known = {label.casefold(): number for number, label in enumerate(self.labels)}
        for label in labels:
            if label.casefold() not in known:
                raise ValueError(f"the model has no label {label!r}; it has {', '.join(self.labels)}")
        return [known[label.casefold()] for label in labels]

    @torch.no_grad()
    def probabilities(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """(B, labels) fp32 on the CPU; each label by itself if the model says that several may hold."""
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.model.device)
        logits: torch.Tensor = self.model(**inputs).logits.float().cpu()
        several = self.model.config.problem_type == "multi_label_classification"
        return logits.sigmoid() if several else logits.softmax(-1)


def load_weights(kind: Any, directory: Path) -> Any:
    """An fp32 model from safetensors. Raises ValueError also where tensors are missing, which transformers would fill
    with random numbers."""
    options = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    model, info = load_pretrained(kind, directory, **options)
    wrong = sorted(str(name) for name in (*info["missing_keys"], *info["mismatched_keys"]))
    if wrong:
        raise ValueError(
            f"{directory}: the weights are not those of a {type(model).__name__}: no {', '.join(wrong[:3])}"
        )
    return model


def load_pretrained(kind: Any, directory: Path, **options: Any) -> Any:
    """`from_pretrained` from this directory alone: no hub, no code from outside. Raises ValueError."""
    try:
        return kind.from_pretrained(directory, local_files_only=True, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{directory}: {kind.__name__} cannot load it ({type(error).__name__}: {error})") from error
