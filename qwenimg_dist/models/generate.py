"""Prompts' features to pictures: the pipeline's sampling loop, with noise that belongs to each picture alone.

Place in the flow: the `sample` command, the evaluation's grids and the demo call `generate`; `save_grid`
lays the pictures out. A picture depends on its own seed, text and size only (up to rounding), not on which
batch it is in.

Refuses: several sizes in one call. Under ZeRO-3 every forward is collective: each rank must call `generate`
with the same number of pictures, `num_steps`, `batch_size` and guidance.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from qwenimg_dist.flow.samplers import ode_schedule, sample_ode, true_guidance
from qwenimg_dist.models.text_batch import collate_text
from qwenimg_dist.models.transformer import (
    LATENT_CHANNELS,
    pack_latents,
    predict_velocity,
    unpack_latents,
)
from qwenimg_dist.models.vae import SIDE_MULTIPLE, LatentCodec

LABEL_SIZE_PX = 12
MARGIN_PX = 4
MIN_CELL_PX = 96
_MAX_CELLS_PIXELS = 80_000_000
"""Of all cells of a grid: Pillow, and with it W&B, takes a picture of twice this for an attack; few viewers show it."""


def load_scheduler_config(pipeline_dir: str | Path) -> dict[str, Any]:
    """PIPELINE/scheduler/scheduler_config.json, for `ode_schedule`; refuses another scheduler class."""
    file = Path(pipeline_dir) / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        raise ValueError(f"{file}: missing; expected a diffusers pipeline directory")
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if config.get("_class_name") != "FlowMatchEulerDiscreteScheduler":
        raise ValueError(f"{file}: {config.get('_class_name')}, expected FlowMatchEulerDiscreteScheduler")
    return config


def seeded_noise(seeds: Sequence[int], height: int, width: int) -> torch.Tensor:
    """Initial noise (N,16,height/8,width/8) fp32 on the CPU, one generator per seed; sides in pixels."""
    if not seeds or height % SIDE_MULTIPLE or width % SIDE_MULTIPLE or min(height, width) <= 0:
        raise ValueError(f"need a seed and sides that are multiples of {SIDE_MULTIPLE}, got {height}x{width}")
    shape = (LATENT_CHANNELS, height // 8, width // 8)
    return torch.stack([torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def generate_latents(
    transformer: Callable[..., Any],
    text: Sequence[torch.Tensor],
    negative_text: torch.Tensor | None,
    noise: torch.Tensor,
    *,
    num_steps: int,
    guidance: float,
    scheduler_config: Mapping[str, Any],
    conditions: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """Normalised latents (B,16,h,w) fp32 from `noise` of that shape, in one batch, on the noise's device.

    `text` holds B features (T_i,D), `negative_text` one (T,D) for all. There is no guidance when `guidance`
    <= 1 or `negative_text` is None: then each step costs one forward instead of two. `conditions` are the latents
    (B,16,h_i,w_i) of an edit's pictures, which both forwards see, as in the stock pipelines; the schedule is of the
    drawn picture's tokens alone.
    """
    if len(text) != noise.shape[0]:
        raise ValueError(f"{len(text)} prompts for {noise.shape[0]} pictures")
    height, width = noise.shape[2:]
    positive, positive_mask = _on_device(collate_text(text), noise.device)
    sigmas = ode_schedule(num_steps, height * width // 4, scheduler_config)
    given = [one.to(noise.device) for one in conditions]
    if negative_text is None or guidance <= 1.0:
        return sample_ode(
            lambda x, sigma: predict_velocity(transformer, x, sigma, positive, positive_mask, given), noise, sigmas
        )
    negative = negative_text.to(noise.device)[None].expand(len(text), -1, -1)

    def predict(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        with_prompt = predict_velocity(transformer, x, sigma, positive, positive_mask, given)
        without = predict_velocity(transformer, x, sigma, negative, None, given)
        guided = true_guidance(pack_latents(with_prompt), pack_latents(without), guidance)
        return unpack_latents(guided, height, width)

    return sample_ode(predict, noise, sigmas)


def generate(
    transformer: Callable[..., Any],
    codec: LatentCodec,
    text: Sequence[torch.Tensor],
    negative_text: torch.Tensor | None,
    *,
    height: int,
    width: int,
    num_steps: int,
    guidance: float,
    seeds: Sequence[int],
    scheduler_config: Mapping[str, Any],
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    conditions: Sequence[torch.Tensor] = (),
) -> list[Image.Image]:
    """One RGB picture of `height` x `width` pixels per (text, seed) pair, in order; `conditions` (16,h_i,w_i) are the
    same for all of them.

    `transformer` is anything with the transformer's forward, on `device`. See `generate_latents` for the
    rest.
    """
    if len(seeds) != len(text) or batch_size < 1:
        raise ValueError(f"{len(text)} prompts, {len(seeds)} seeds, batch_size {batch_size}: need one seed each")
    pictures: list[Image.Image] = []
    for start in range(0, len(seeds), batch_size):
        part = slice(start, start + batch_size)
        latents = generate_latents(
            transformer,
            text[part],
            negative_text,
            seeded_noise(seeds[part], height, width).to(device),
            num_steps=num_steps,
            guidance=guidance,
            scheduler_config=scheduler_config,
            conditions=[one.expand(len(seeds[part]), *one.shape) for one in conditions],
        )
        pictures.extend(to_pictures(codec.decode(latents)))
    return pictures


def to_pictures(images: torch.Tensor) -> list[Image.Image]:
    """(B,3,H,W) in [-1,1] to RGB pictures, rounded as diffusers' `VaeImageProcessor.postprocess` does."""
    levels = ((images.float() * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
    return [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in levels]


def save_grid(images: Sequence[Image.Image], labels: Sequence[str], path: str | Path, *, columns: int = 8) -> Path:
    """Writes a PNG of `images` row by row with `labels` under the cells, wrapped to the cell's width.

    Cells take the largest picture's size. Where that is under 96 px, every pixel becomes a square of pixels, so that
    tiny pictures can be seen and labels fit; where all cells together have more pixels than viewers take, they are
    scaled down. The built-in font has Latin letters only.
    """
    if not images or len(labels) != len(images) or columns < 1:
        raise ValueError(f"{len(images)} images, {len(labels)} labels, {columns} columns: nothing to lay out")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    images = _to_be_seen(images, rows * columns)
    cell_width, cell_height = max(i.width for i in images), max(i.height for i in images)
    font = ImageFont.load_default(LABEL_SIZE_PX)
    wrapped = [_wrap(label, font, cell_width) for label in labels]
    label_height = max(len(lines) for lines in wrapped) * (LABEL_SIZE_PX + 2)
    step_x, step_y = cell_width + MARGIN_PX, cell_height + label_height + MARGIN_PX
    grid = Image.new("RGB", (columns * step_x + MARGIN_PX, rows * step_y + MARGIN_PX), "white")
    draw = ImageDraw.Draw(grid)
    for index, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        left, top = MARGIN_PX + index % columns * step_x, MARGIN_PX + index // columns * step_y
        grid.paste(image, (left, top))
        for number, line in enumerate(lines):
            draw.text((left, top + cell_height + number * (LABEL_SIZE_PX + 2)), line, fill="black", font=font)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    grid.save(target, format="PNG")
    return target


def _to_be_seen(images: Sequence[Image.Image], num_cells: int) -> list[Image.Image]:
    """Tiny pictures with every pixel a square of pixels; many large ones smaller, all by the same factor."""
    width, height = max(i.width for i in images), max(i.height for i in images)
    factor, how = float(math.ceil(MIN_CELL_PX / width)), Image.Resampling.NEAREST
    if (most := math.sqrt(_MAX_CELLS_PIXELS / (num_cells * width * height))) < factor:
        factor, how = most, Image.Resampling.LANCZOS
    return [i.resize((max(1, int(i.width * factor)), max(1, int(i.height * factor))), how) for i in images]


def _wrap(label: str, font: Any, width: int) -> list[str]:
    """Greedy line breaking by measured width; a word wider than the cell is cut."""
    lines = [""]
    for full_word in label.split():
        word = full_word
        while font.getlength(word) > width and len(word) > 1:
            word = word[:-1]
        candidate = f"{lines[-1]} {word}".strip()
        if font.getlength(candidate) <= width or not lines[-1]:
            lines[-1] = candidate
        else:
            lines.append(word)
    return lines


def _on_device(
    pair: tuple[torch.Tensor, torch.Tensor | None], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    text, mask = pair
    return text.to(device), mask.to(device) if mask is not None else None
