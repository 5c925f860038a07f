"""Bytes on disk: checkpoints of the run, and the cache of a data set by kind.

Place in the flow: `plan.py` asks here. Of data that is there the cache is what lies on disk (`data stats` shows it by
facet); else it is computed from rows, buckets and text lengths. Tar and JSON cost about 1 % and are counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from consumers.checkpoint_files import checkpoint_bytes
from consumers.planning.facts import DataFacts, ModelFacts
from qwenimg_dist.config import Config
from qwenimg_dist.data.buckets import buckets

_LATENT_CHANNELS: Final = 16
_DTYPE_BYTES: Final = {"bfloat16": 2, "float32": 4}
_TAR_BYTES: Final = 2560
"""Headers of a sample's two members, and their padding and JSON."""


@dataclass(frozen=True, kw_only=True)
class Disk:
    checkpoint: float
    """One."""
    num_kept: int
    """At most at once: `checkpoint.keep`, the one being written, and those that stay for good."""
    cache: dict[str, float]
    """Kind -> bytes: `text`, `latents 256`, ..."""

    @property
    def checkpoints(self) -> float:
        return self.checkpoint * self.num_kept


def disk(config: Config, model: ModelFacts, data: DataFacts) -> Disk:
    """What a run and its data take up."""
    frozen = model.num_parameters - model.num_trained
    one = checkpoint_bytes(model.num_parameters, ema=config.optim.ema_decay > 0, num_frozen=frozen)
    saved = config.checkpoint
    written = data.num_steps // saved.every + (data.num_steps % saved.every > 0)
    for_good = data.num_steps // saved.keep_every if saved.keep_every else 0
    return Disk(checkpoint=one, num_kept=min(saved.keep + 1 + for_good, written), cache=_cache(config, model, data))


def _cache(config: Config, model: ModelFacts, data: DataFacts) -> dict[str, float]:
    size = _DTYPE_BYTES[config.encode.dtype]
    tensors = data.pictures * (2 if config.encode.posterior == "mean_logvar" else 1)
    captions = data.num_images * data.captions_per_image
    found = {"text": captions * (data.mean_text * model.text_width * size + _TAR_BYTES)}
    for resolution in () if data.are_prompts else config.resolutions:
        of_class = buckets(resolution, config.encode.aspects)
        mean = sum(_LATENT_CHANNELS * (b.height // 8) * (b.width // 8) for b in of_class) / len(of_class)
        # A picture smaller than a class is left out of it, so this is a bound.
        found[f"latents {resolution}"] = data.num_images * (tensors * mean * size + _TAR_BYTES)
    return found
