"""What a plan knows of the model and of the data, and what it has to assume.

Place in the flow: everything else in this package computes from these. The architecture comes from the model's
directory; where that is not on this machine (a plan is made before 58 GB are downloaded), Qwen-Image-2512's own is
taken and said. Of data that is there, the ledger counts steps by bucket, and the longest and mean text; without data
they are assumed from the config and `plan.*`, and said. Refuses to download anything.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from consumers.curriculum import plan as planned_phases
from consumers.data_sets import check_ready, data_dirs, kinds_of, ledger_config
from consumers.objectives import is_guided, rows_per_sample, sample_kind
from consumers.parameter_groups import FROZEN, parameter_groups
from consumers.run_directory import facets_of
from consumers.run_plan import make_plan
from consumers.stream import pictures_of
from consumers.zero_settings import check_hpz
from qwenimg_dist.config import Config
from qwenimg_dist.data.buckets import buckets
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.data.generations import Generations
from qwenimg_dist.data.ledger import Ledger
from qwenimg_dist.data.phases import PlannedPhase
from qwenimg_dist.models import transformer as qwen
from qwenimg_dist.schema import EDIT, PREFERENCE, PROMPT, Bucket

QWEN_IMAGE_2512: Final[dict[str, Any]] = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "guidance_embeds": False,
    "axes_dims_rope": [16, 56, 56],
}
"""The transformer's config.json at the pinned revision: 20,430,401,088 parameters."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The transformer, without a weight of it."""

    architecture: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    num_trained: int
    told: str
    """Where the architecture is from."""

    @functools.cached_property
    def num_parameters(self) -> int:
        return sum(self.numels.values())

    @functools.cached_property
    def numels(self) -> dict[str, int]:
        return {name: torch.Size(shape).numel() for name, shape in self.shapes.items()}

    @functools.cached_property
    def block(self) -> int:
        """Elements of one block."""
        return sum(n for name, n in self.numels.items() if name.startswith("transformer_blocks.0."))

    @functools.cached_property
    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max(self.numels.values())

    @property
    def text_width(self) -> int:
        return int(self.architecture["joint_attention_dim"])


@dataclass(frozen=True, kw_only=True)
class StreamFacts:
    """What one phase draws at one resolution."""

    phase: PlannedPhase
    resolution: int
    steps: Mapping[Bucket, float]
    """Bucket -> optimiser steps."""
    images: float
    """Real samples drawn; fill slots left out."""


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What is trained on."""

    streams: tuple[StreamFacts, ...]
    longest_text: int
    """Tokens."""
    mean_text: float
    num_images: int
    """Rows of the data set: what is cached."""
    captions_per_image: float
    pictures: int
    """Of a row that a forward computes: 2 of a preference pair, and with a rollout's guidance."""
    rows_per_sample: int = 1
    """A group's pictures of one prompt."""
    are_prompts: bool = False
    """There are no latents: pictures are drawn."""
    condition_tokens: int | None = 0
    """Assumed of an edit's input picture, which stand in the sequence beside the target's; None: as many as those.
    Buckets that were counted know their conditions."""
    assumed: bool
    told: str

    @property
    def num_steps(self) -> int:
        return max(stream.phase.last_step for stream in self.streams)

    def image_tokens(self, bucket: Bucket) -> int:
        """In the sequence of one picture of a bucket."""
        return bucket.tokens + (bucket.image_tokens if self.condition_tokens is None else self.condition_tokens)


def model_facts(config: Config) -> ModelFacts:
    """Raises ValueError if nothing tells the architecture, or for expressions of `optim` that find nothing."""
    architecture, told = _architecture(config)
    shapes = _shapes(json.dumps(architecture))
    groups = parameter_groups(shapes, config.optim, int(architecture["num_layers"]))
    trained = sum(group.num_elements for group in groups if group.name != FROZEN)
    return ModelFacts(architecture=architecture, shapes=shapes, num_trained=trained, told=told)


def data_facts(config: Config, *, world_size: int) -> DataFacts:
    """Of the data sets that are there, else assumed. Raises ValueError for data that cannot be trained on."""
    check_hpz(config, world_size)
    if not config.data.path and not config.data.mix:
        return _assumed(config, "no data.path")
    pipeline = local_pipeline(config)
    if pipeline is None:
        return _assumed(config, "the model, whose encoders the data is asked by, is not on this machine")
    return _counted(config, pipeline, world_size)


def with_phases_of(data: DataFacts, config: Config) -> DataFacts:
    """The same data under a config whose phases are cut or recomputed otherwise."""
    phases = planned_phases(config)
    return replace(data, streams=tuple(replace(one, phase=phases[one.phase.index]) for one in data.streams))


def local_pipeline(config: Config) -> Path | None:
    """The model's directory if it is on this machine whole; the tiny model is built."""
    from qwenimg_dist.models.pipeline import COMPONENTS, pipeline_dir

    if config.model.path is None or Path(config.model.path).expanduser().is_dir():
        return pipeline_dir(config.model)
    folder = _cached(config)
    return folder if folder and all((folder / name).is_dir() for name in COMPONENTS) else None


@functools.lru_cache(maxsize=4)
def _shapes(architecture: str) -> Mapping[str, tuple[int, ...]]:
    """A model of 60 blocks takes a second to build even without storage, and a plan may be made a dozen times."""
    with torch.device("meta"):
        module = qwen.build_transformer(json.loads(architecture))
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def _architecture(config: Config) -> tuple[dict[str, Any], str]:
    path = config.model.path
    if path is None and config.model.name == "tiny":
        from qwenimg_dist.models.tiny import TRANSFORMER_CONFIG

        return dict(TRANSFORMER_CONFIG), "the tiny model"
    folder = Path(path).expanduser() if path and Path(path).expanduser().is_dir() else _cached(config)
    if folder is not None and (folder / "transformer" / "config.json").is_file():
        return qwen.load_transformer_config(folder / "transformer"), str(folder)
    if config.model.name == "qwen_image_2512":
        return dict(QWEN_IMAGE_2512), f"Qwen-Image-2512's known architecture ({path} is not on this machine)"
    raise ValueError(f"model.path={path} is not on this machine: give a directory, or model=qwen_image_2512")


def _cached(config: Config) -> Path | None:
    """The snapshot in the hub's cache; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    if not config.model.path or not config.model.revision or config.model.path.count("/") != 1:
        return None
    file = try_to_load_from_cache(config.model.path, "transformer/config.json", revision=config.model.revision)
    return Path(file).parents[1] if isinstance(file, str) else None


def _assumed(config: Config, why: str) -> DataFacts:
    kind, given = sample_kind(config), config.plan
    streams = []
    for phase in planned_phases(config):
        for resolution, steps in sorted(phase.steps_by_resolution.items()):
            of_class = phase.drawn.get(resolution) or buckets(resolution, config.encode.aspects)
            streams.append(
                StreamFacts(
                    phase=phase,
                    resolution=resolution,
                    steps=dict.fromkeys(of_class, steps / len(of_class)),
                    images=float(steps * phase.global_batch * rows_per_sample(config)),
                )
            )
    return DataFacts(
        streams=tuple(streams),
        longest_text=config.model.max_text_tokens,
        mean_text=min(given.text_tokens, config.model.max_text_tokens),
        num_images=given.images,
        captions_per_image=given.captions,
        pictures=2 if kind == PREFERENCE or is_guided(config) else 1,
        rows_per_sample=rows_per_sample(config),
        are_prompts=kind == PROMPT,
        condition_tokens=_condition_tokens(config),
        assumed=True,
        told=f"assumed ({why}): {given.images:,} rows, {given.captions:g} caption(s) each of {given.text_tokens} "
        f"tokens on average and at most {config.model.max_text_tokens} (model.max_text_tokens), buckets equally often",
    )


def _counted(config: Config, pipeline: Path, world_size: int) -> DataFacts:
    dirs, facets = data_dirs(config), facets_of(config, pipeline)
    check_ready(dirs, facets)
    datasets = {name: Dataset.open(folder) for name, folder in dirs.items()}
    phases = planned_phases(config)
    with tempfile.TemporaryDirectory(prefix="qwenimg-dist-plan-") as scratch:
        generations = Generations(Path(scratch), datasets, facets, ledger_config(config, phases), follow=False)
        generations.advance(0)
        ledger = generations.ledger
        pictures, repeat = pictures_of(facets.further, guided=is_guided(config)), rows_per_sample(config)
        drawn = make_plan(ledger, config.optim, world_size=world_size, pictures=pictures, repeat=repeat)
        streams = tuple(
            StreamFacts(
                phase=one.phase,
                resolution=stream.resolution,
                steps={bucket: float(count.batches) for bucket, count in stream.tally.buckets.items()},
                images=float(stream.tally.images * repeat),
            )
            for one in drawn.phases
            for stream in one.streams
        )
        longest, mean, texts = _texts(ledger)
        rows = sum(ledger.catalogs[index].num_rows for index in range(len(ledger.catalogs)))
    return DataFacts(
        streams=streams,
        longest_text=longest,
        mean_text=mean,
        num_images=rows,
        captions_per_image=texts / max(1, rows),
        pictures=pictures,
        rows_per_sample=repeat,
        are_prompts=sample_kind(config) == PROMPT,
        assumed=False,
        told=f"{', '.join(map(str, dirs.values()))}: {rows:,} rows, texts of {mean:.0f} tokens on average and at most "
        f"{longest}",
    )


def _texts(ledger: Ledger) -> tuple[int, float, int]:
    """Tokens of the longest text and of the mean caption, and how many distinct texts there are."""
    longest, total, captions, texts = 1, 0.0, 0, 0
    for index in range(len(ledger.catalogs)):
        catalog = ledger.catalogs[index]
        if not catalog.num_texts:
            continue
        longest = max(longest, int(catalog.text_tokens.max()))
        used = np.asarray(catalog.caption_text)
        total += float(np.asarray(catalog.text_tokens)[used].sum())
        captions += len(used)
        texts += catalog.num_texts
    return longest, total / max(1, captions), texts


def _condition_tokens(config: Config) -> int | None:
    """Tokens that an edit's input picture adds to a sequence; None where they are as many as the target's."""
    if EDIT not in kinds_of(config).values():
        return 0
    side = config.encode.edit.condition_side
    return None if side is None else (side // 16) ** 2
