"""Pictures of many prompts and seeds by a sharded model, and what rewards say of them: one file each, so that a job
that was ended goes on with those that are missing.

Place in the flow: `comparison.py` calls it for each of two models. Under ZeRO-3 a forward is collective, so all ranks
draw equally many pictures in lock-step (a rank without one of its own repeats one), decode and save their own. Prompts
are encoded once, by rank 0, before any transformer is built, and lie in files, since a thousand of them are gigabytes.
Noise belongs to the seed alone: the same cell of two models begins at the same noise. Judging is split over the ranks.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from PIL import Image

from consumers.ranks import Ranks
from consumers.reference_pass import Watch
from consumers.zero_engine import FrozenModel
from qwenimg_dist.config import Config
from qwenimg_dist.debug import fault_point
from qwenimg_dist.files import write_bytes
from qwenimg_dist.models.generate import generate_latents, seeded_noise, to_pictures
from qwenimg_dist.models.text_encoder import TextEncoder
from qwenimg_dist.models.vae import LatentCodec
from qwenimg_dist.patience import patiently
from qwenimg_dist.rewards.base import Prompt, Score, Scores

_JUDGED_AT_ONCE: Final = 16
Values = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One picture."""

    prompt: int
    """Position among the prompts."""
    seed: int

    def file(self, folder: Path) -> Path:
        return folder / f"{self.prompt:05d}-{self.seed}.png"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How all pictures are drawn."""

    height: int
    width: int
    num_steps: int
    guidance: float
    negative_prompt: str
    scheduler: Mapping[str, Any]
    batch_size: int
    """Pictures that one rank draws at once."""


class TextFolder:
    """Features of prompts, a file each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, text: str) -> torch.Tensor:
        """(T, D) fp32."""
        file = self._file(text)
        features: torch.Tensor = safetensors.torch.load(patiently(file.read_bytes, str(file)))["text"]
        return features

    def encode(self, config: Config, pipeline: Path, texts: Sequence[str], ranks: Ranks, watch: Watch) -> None:
        """Encode those that are missing. Collective; call before an engine is built."""

        def missing_ones() -> None:
            missing = sorted({text for text in texts if not self._file(text).is_file()})
            if not missing:
                return
            self._folder.mkdir(parents=True, exist_ok=True)
            dtype = torch.bfloat16 if config.encode.compute_dtype == "bfloat16" else torch.float32
            most = config.model.max_text_tokens
            encoder = TextEncoder.load(pipeline, dtype=dtype, device=ranks.device, max_sequence_length=most)
            for text in missing:
                watch.stage("encoding the prompts")
                features = encoder.encode([text])[0].float().cpu().contiguous()
                write_bytes(self._file(text), safetensors.torch.save({"text": features}))
            del encoder
            if ranks.device.type == "cuda":
                torch.cuda.empty_cache()

        ranks.on_first(missing_ones)

    def _file(self, text: str) -> Path:
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.safetensors"


def missing_cells(cells: Sequence[Cell], folder: Path) -> list[int]:
    """Those without a file. By the folder's listing: NFS remembers for a while that a name asked for was not there, on
    this whole machine, and other machines draw it meanwhile."""
    try:
        there = set(patiently(lambda: os.listdir(folder), str(folder)))
    except FileNotFoundError:
        there = set()
    return [i for i, cell in enumerate(cells) if cell.file(folder).name not in there]


def read_picture(file: Path) -> Image.Image:
    """A cell's file, as RGB."""

    def opened() -> Image.Image:
        with Image.open(file) as picture:
            return picture.convert("RGB")

    return patiently(opened, str(file))


@torch.no_grad()
def draw_pictures(
    model: FrozenModel,
    codec: LatentCodec,
    cells: Sequence[Cell],
    prompts: Sequence[Prompt],
    texts: TextFolder,
    sampling: Sampling,
    folder: Path,
    ranks: Ranks,
    watch: Watch,
) -> None:
    """Draw the cells that have no file in `folder` yet. Collective. Raises ValueError on all ranks where one cannot
    write, and what `watch.stop` raises."""
    missing: list[int] = ranks.on_first(lambda: missing_cells(cells, folder))
    per_round = sampling.batch_size * ranks.world_size
    negative = ranks.together(lambda: texts.read(sampling.negative_prompt))
    rounds = range(0, len(missing), per_round)
    for number, first in enumerate(rounds):
        watch.stop()
        watch.stage("drawing pictures")
        todo = missing[first : first + per_round]
        size = -(-len(todo) // ranks.world_size)
        mine = [todo[min(ranks.rank * size + i, len(todo) - 1)] for i in range(size)]
        chosen = [cells[i] for i in mine]
        latents = generate_latents(
            model.transformer,
            ranks.together(lambda: [texts.read(prompts[cell.prompt].text) for cell in chosen]),  # noqa: B023 - at once
            negative,
            seeded_noise([cell.seed for cell in chosen], sampling.height, sampling.width).to(ranks.device),
            num_steps=sampling.num_steps,
            guidance=sampling.guidance,
            scheduler_config=sampling.scheduler,
        )
        own = len(todo[ranks.rank * size : (ranks.rank + 1) * size])
        ranks.together(lambda: _save(codec, latents[:own], [c.file(folder) for c in chosen[:own]]))  # noqa: B023
        fault_point("eval_pictures")
        if (number + 1) % 20 == 0 or number + 1 == len(rounds):
            watch.say(f"{folder.name}: {len(cells) - len(missing) + first + len(todo)} of {len(cells)} pictures")


def judge_pictures(
    score: Score, cells: Sequence[Cell], prompts: Sequence[Prompt], folder: Path, ranks: Ranks, watch: Watch
) -> dict[str, Any]:
    """What the rewards say of the cells' files: `components` and `total`, lists beside the cells with None where a
    picture could not be judged, and `notes`. Collective: each rank judges its share."""
    mine = range(ranks.rank, len(cells), ranks.world_size)

    def judge() -> list[Scores]:
        parts = []
        for first in range(0, len(mine), _JUDGED_AT_ONCE):
            watch.stage("judging pictures")
            some = [cells[i] for i in mine[first : first + _JUDGED_AT_ONCE]]
            parts.append(
                score([read_picture(cell.file(folder)) for cell in some], [prompts[cell.prompt] for cell in some])
            )
        watch.stage("waiting for the other ranks' rewards")
        return parts

    parts = ranks.together(judge)
    told = ranks.gather_json(
        {
            "total": _numbers([part.total for part in parts]),
            "components": {
                name: _numbers([part.components[name] for part in parts])
                for name in (parts[0].components if parts else ())
            },
            "notes": sorted({note for part in parts for note in part.notes}),
        }
    )
    names = list(told[0]["components"])
    return {
        "total": _in_order([one["total"] for one in told], len(cells)),
        "components": {
            name: _in_order([one["components"].get(name, []) for one in told], len(cells)) for name in names
        },
        "notes": sorted({note for one in told for note in one["notes"]}),
    }


def _in_order(by_rank: Sequence[Sequence[float | None]], count: int) -> list[float | None]:
    """Rank r has every r-th of them."""
    return [by_rank[i % len(by_rank)][i // len(by_rank)] for i in range(count)]


def _numbers(parts: Sequence[Values]) -> list[float | None]:
    """JSON knows no NaN."""
    return [float(value) if np.isfinite(value) else None for part in parts for value in part]


def _save(codec: LatentCodec, latents: torch.Tensor, files: Sequence[Path]) -> None:
    for one, file in zip(latents, files, strict=True):
        (picture,) = to_pictures(codec.decode(one[None]))
        sink = io.BytesIO()
        picture.save(sink, format="PNG")
        patiently(lambda: write_bytes(file, sink.getvalue()), str(file))  # noqa: B023 - called at once
