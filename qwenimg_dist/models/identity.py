"""Fingerprints of what makes a facet: encoder weights, template, preprocessing. Part of the facet's name.

Producers name facets by them and consumers ask for facets by them, so data made for another model is never read.
What changes tensors only within rounding (batch sizes, threads) is left out.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from qwenimg_dist.config import Config, stable_hash
from qwenimg_dist.models.pipeline import fingerprint_component
from qwenimg_dist.models.template import DROP, EDIT_DROP, EDIT_PICTURE, EDIT_PREFIX, EDIT_SUFFIX, TEMPLATE
from qwenimg_dist.schema import EDIT, IMAGE, Kind, latents_facet, text_facet

# Raise when the same input would give other tensors for a reason that is not hashed below: resize and crop, colour.
TEXT_RECIPE = 1
LATENTS_RECIPE = 1


def text_facet_name(pipeline_dir: Path, config: Config, kind: Kind = IMAGE) -> str:
    """Facet that holds text features of this model: `text-<id>`. Those of edits saw pictures, and are of another id."""
    processor = pipeline_dir / "processor" / "preprocessor_config.json"
    seen = {
        "template": [EDIT_PREFIX, EDIT_PICTURE[config.encode.edit.template], EDIT_SUFFIX, EDIT_DROP],
        "vision_side": config.encode.edit.vision_side,
        "processor": hashlib.sha256(processor.read_bytes()).hexdigest() if processor.is_file() else None,
    }
    return text_facet(
        stable_hash(
            {
                **({"edit": seen} if kind == EDIT else {}),
                "recipe": TEXT_RECIPE,
                "template": TEMPLATE,
                "drop": DROP,
                "encoder": fingerprint_component(pipeline_dir / "text_encoder"),
                "tokenizer": fingerprint_component(pipeline_dir / "tokenizer"),
                "max_tokens": config.model.max_text_tokens,
                "dtype": config.encode.dtype,
                "compute_dtype": config.encode.compute_dtype,
            },
            digits=12,
        )
    )


def latents_facet_names(pipeline_dir: Path, config: Config, kind: Kind = IMAGE) -> dict[int, str]:
    """Resolution class (px) -> facet that holds its latents: `latents-<resolution>-<id>`."""
    fingerprint = stable_hash(
        {
            **({"condition_side": config.encode.edit.condition_side} if kind == EDIT else {}),
            "recipe": LATENTS_RECIPE,
            "vae": fingerprint_component(pipeline_dir / "vae"),
            "aspects": list(config.encode.aspects),
            "upscale": config.encode.upscale,
            "posterior": config.encode.posterior,
            "dtype": config.encode.dtype,
            "compute_dtype": config.encode.compute_dtype,
        },
        digits=12,
    )
    return {resolution: latents_facet(resolution, fingerprint) for resolution in config.resolutions}
