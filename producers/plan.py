"""What `produce` is to make of every unit: the facets, the filters, the buckets. A pure value, made from the config.

Place in the flow: the driver makes one and compares it with what is committed; workers make the same one again and work
by it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from producers.dedup import DedupRule
from producers.enhance import Mode
from producers.filters import validate_filters
from producers.filters.base import BoundFilter
from producers.near import NearRule
from qwenimg_dist.compose import ConfigError
from qwenimg_dist.config import Config, EditEncodeConfig, FolderSource, ManifestSource, WebdatasetSource, stable_hash
from qwenimg_dist.data.buckets import Placement, buckets, place
from qwenimg_dist.schema import LISTING, SCAN, Bucket


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides rows, keys and facets. Batch sizes decide speed alone."""

    text_facet: str
    latents_facets: Mapping[int, str]
    """Resolution class (px) -> facet."""
    buckets: Mapping[int, tuple[Bucket, ...]]
    upscale: bool
    filters: tuple[BoundFilter, ...]
    dedup: DedupRule
    near: NearRule | None
    """None: near duplicates are kept."""
    config_hash: str
    """Stamped on every part."""
    max_shard_bytes: int
    image_batch_pixels: int
    enhance: Mode
    """What becomes of captions before they are listed."""
    labels: tuple[str, ...]
    """Names of the labels that the source gives."""
    edit: EditEncodeConfig
    """How condition pictures go in; part of the facets' names."""

    @property
    def facets(self) -> tuple[str, ...]:
        """Text, then latents by ascending resolution: the order of commits."""
        return (self.text_facet, *(self.latents_facets[r] for r in sorted(self.latents_facets)))

    @property
    def digest(self) -> str:
        """Changes whenever a unit that was finished under another plan must be looked at again."""
        parts: dict[str, Any] = {
            "facets": self.facets,
            "filters": {f.name: [f.fingerprint, json.loads(f.params.model_dump_json())] for f in self.filters},
        }
        parts["settled"] = self.settled
        return stable_hash(parts)

    @property
    def settled(self) -> tuple[str, ...]:
        """Facets of which each unit needs a part before it is encoded: all its parts go into the decisions."""
        return (LISTING, SCAN, self.dedup.facet, *((self.near.facet,) if self.near is not None else ()))

    def placements(self, height: int, width: int) -> dict[int, Placement]:
        """Resolution class -> how a picture of this upright size goes in; classes it is too small for are left out."""
        found = {r: place(height, width, choices, upscale=self.upscale) for r, choices in self.buckets.items()}
        return {resolution: placement for resolution, placement in found.items() if placement is not None}


def make_plan(config: Config, *, text_facet: str, latents_facets: Mapping[int, str]) -> Plan:
    """Raises `ConfigError` for unusable filters and ValueError for unusable aspects or resolutions."""
    filters = tuple(validate_filters(config.filters))
    classes = {resolution: buckets(resolution, config.encode.aspects) for resolution in sorted(latents_facets)}
    pixels = tuple(one for one in filters if one.filter.looks_at == "pixels")
    dedup = DedupRule(
        filters=tuple(one for one in filters if one.filter.looks_at == "captions"),
        pixels=pixels if any(one.filter.reads_captions for one in pixels) else (),
    )
    stamped = {"model", "source", "captions", "filters", "dedup", "encode"}
    return Plan(
        text_facet=text_facet,
        latents_facets=dict(sorted(latents_facets.items())),
        buckets=classes,
        upscale=config.encode.upscale,
        filters=filters,
        dedup=dedup,
        near=_near_rule(config, filters, dedup) if config.dedup.near else None,
        config_hash=stable_hash(config.model_dump(mode="json", include=stamped)),
        max_shard_bytes=config.data.max_shard_bytes,
        image_batch_pixels=config.encode.image_batch_pixels,
        enhance=config.captions.enhance,
        labels=_labels(config, filters),
        edit=config.encode.edit,
    )


def _labels(config: Config, filters: Sequence[BoundFilter]) -> tuple[str, ...]:
    """Raises `ConfigError` for a name that a filter gives too."""
    if not isinstance(config.source, FolderSource | ManifestSource | WebdatasetSource):
        return ()
    for name in config.source.label_columns:
        for one in filters:
            if name in one.filter.names:
                raise ConfigError(
                    f"source.label_columns: {name!r} is what filters.{one.name} gives: choose another name "
                    f"({{my_{name}: COLUMN}}), or set filters.{one.name}.enabled=false"
                )
    return tuple(config.source.label_columns)


def _near_rule(config: Config, filters: Sequence[BoundFilter], dedup: DedupRule) -> NearRule:
    return NearRule(
        distance=config.dedup.distance,
        filters=tuple(one for one in filters if one.filter.looks_at == "header"),
        dedup=dedup,
        pixels=tuple(one for one in filters if one.filter.looks_at == "pixels"),
    )
