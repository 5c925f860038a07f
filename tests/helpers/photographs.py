"""Real photographs (those that scikit-image brings along) and what one pixel filter says about them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import skimage.data
from PIL import Image

from producers.filters import FILTERS
from producers.filters.base import BoundFilter, Facts, Value

Pixels = npt.NDArray[np.uint8]

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket", "camera", "coins", "brick", "grass", "gravel", "retina")


@functools.cache
def photograph(name: str) -> Pixels:
    """(h, w, 3) uint8, 300 to 1411 px a side."""
    pixels = np.asarray(getattr(skimage.data, name)(), dtype=np.uint8)
    return np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels


def facts_about(pixels: Pixels, **more: Any) -> Facts:
    height, width = pixels.shape[:2]
    given = {"num_bytes": 1, "width": width, "height": height, "num_frames": 1, "image": Image.fromarray(pixels)}
    return Facts(**{**given, **more})


def bound(name: str, **params: Any) -> BoundFilter:
    one = FILTERS[name]
    return BoundFilter(name=name, filter=one, params=one.params(**params))


def scores(name: str, pixels: Pixels) -> Mapping[str, Value]:
    return bound(name).score(facts_about(pixels))


def reason(name: str, pixels: Pixels, **params: Any) -> str | None:
    """Why the filter rejects the picture, None if it does not; by default with the filter's own thresholds."""
    one = bound(name, **params)
    rejection = one.admit(one.score(facts_about(pixels)))
    return rejection.reason if rejection is not None else None


def noisy(pixels: Pixels, levels: float, seed: int = 0) -> Pixels:
    noise = np.random.default_rng(seed).normal(0.0, levels, pixels.shape)
    noised: Pixels = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    return noised


def scaled(pixels: Pixels, factor: float) -> Pixels:
    """Exposure: darker below 1, blown out above."""
    exposed: Pixels = np.clip(pixels * factor, 0, 255).astype(np.uint8)
    return exposed


def resized(pixels: Pixels, factor: float) -> Pixels:
    height, width = pixels.shape[:2]
    size = (round(width * factor), round(height * factor))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
