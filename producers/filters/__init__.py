"""Filters, one file each: each turns a row into scores and, by thresholds, into a reason to reject.

To add one: a file, an entry here, a YAML in `conf/filters`, a test. They are asked in the order of `FILTERS`, and the
first rejection is the one recorded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from pydantic import ValidationError

from producers.filters import (
    aesthetic,
    aspect,
    barcode,
    bits_per_pixel,
    border,
    broken,
    caption_length,
    caption_validity,
    category,
    clarity,
    entropy,
    file_size,
    luma,
    nsfw,
    ocr,
    resolution,
    rotation,
    saturation,
    similarity,
    texture,
    watermark,
)
from producers.filters.base import BoundFilter, Filter
from qwenimg_dist.compose import ConfigError, did_you_mean

FILTERS: Final[dict[str, Filter[Any]]] = {
    "file_size": file_size.FILTER,
    "resolution": resolution.FILTER,
    "aspect": aspect.FILTER,
    "bits_per_pixel": bits_per_pixel.FILTER,
    "rotation": rotation.FILTER,
    "caption_validity": caption_validity.FILTER,
    "caption_length": caption_length.FILTER,
    "category": category.FILTER,
    "broken": broken.FILTER,
    "luma": luma.FILTER,
    "saturation": saturation.FILTER,
    "entropy": entropy.FILTER,
    "border": border.FILTER,
    "clarity": clarity.FILTER,
    "texture": texture.FILTER,
    "barcode": barcode.FILTER,
    "nsfw": nsfw.FILTER,
    "similarity": similarity.FILTER,
    "aesthetic": aesthetic.FILTER,
    "watermark": watermark.FILTER,
    "ocr": ocr.FILTER,
}


def validate_filters(configured: Mapping[str, Mapping[str, Any]]) -> list[BoundFilter]:
    """The enabled filters in their order of asking. Raises `ConfigError` with "did you mean"."""
    for name in configured:
        if name not in FILTERS:
            raise ConfigError(
                f"filters.{name}: there is no such filter{did_you_mean(name, list(FILTERS))}; {_offer(FILTERS)}"
            )
    bound = []
    for name, one in FILTERS.items():
        if name in configured:
            params = _validate(name, one, configured[name])
            if params.enabled:
                bound.append(BoundFilter(name=name, filter=one, params=params))
    return bound


def _validate(name: str, one: Filter[Any], given: Mapping[str, Any]) -> Any:
    try:
        return one.params.model_validate(dict(given))
    except ValidationError as error:
        problems = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            message = f"{item['msg']} (got {item['input']!r})"
            if item["type"] == "extra_forbidden":
                known = list(one.params.model_fields)
                message = f"unknown key{did_you_mean(key, known)}; {_offer(known)}"
            problems.append(f"filters.{name}.{key}: {message}")
        raise ConfigError("invalid config:\n  " + "\n  ".join(problems)) from error


def _offer(known: Iterable[str]) -> str:
    return f"there is: {', '.join(known)}"
