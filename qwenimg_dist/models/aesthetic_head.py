"""The head of an aesthetic predictor: linear layers, one after the other, on a picture's features.

Place in the flow: the filter `aesthetic` puts it on CLIP or SigLIP features. The layers are read from one safetensors
file with any names that end in `weight` and `bias` and sort by the layers' numbers, which is how LAION's heads are laid
out (one linear layer, or five without anything between them). Refuses layers that do not follow each other.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch

from qwenimg_dist.models.hub import resolve_directory
from qwenimg_dist.models.weights import SafetensorsDirectory, WeightsError

Activation = Literal["none", "relu", "gelu"]


def find_head(path: str, revision: str | None) -> Path:
    """The directory of the head, which holds one safetensors file. Raises ValueError saying what is missing."""
    return resolve_directory(path, revision, patterns=["*.safetensors"], keys=("head", "head_revision"))


class AestheticHead:
    """(B, D) features -> (B,) scores; fp32 on the CPU."""

    def __init__(self, layers: list[tuple[torch.Tensor, torch.Tensor | None]], activation: Activation) -> None:
        self._layers = layers
        self._activation = {"none": lambda x: x, "relu": torch.relu, "gelu": torch.nn.functional.gelu}[activation]

    @classmethod
    def load(cls, directory: Path, activation: Activation = "none") -> AestheticHead:
        """Raises WeightsError naming the directory and the layer that does not fit."""
        weights = SafetensorsDirectory(directory)
        names = sorted((name for name in weights.names if name.endswith("weight")), key=_natural)
        layers = []
        for name in names:
            bias = name.removesuffix("weight") + "bias"
            layers.append((weights.read(name).float(), weights.read(bias).float() if bias in weights.entries else None))
        sizes = [tuple(weight.shape) for weight, _ in layers]
        follow = all(len(size) == 2 for size in sizes) and all(a[0] == b[1] for a, b in pairwise(sizes))
        if not sizes or not follow or sizes[-1][0] != 1:
            shown = ", ".join(f"{name} {size}" for name, size in zip(names, sizes, strict=True)) or "no weights"
            raise WeightsError(f"{directory}: not linear layers that end in one score: {shown}")
        return cls(layers, activation)

    @property
    def num_features(self) -> int:
        """D."""
        return int(self._layers[0][0].shape[1])

    @torch.no_grad()
    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        values = features
        for number, (weight, bias) in enumerate(self._layers):
            values = torch.nn.functional.linear(self._activation(values) if number else values, weight, bias)
        return values[:, 0]


def _natural(name: str) -> list[int | str]:
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", name)]
