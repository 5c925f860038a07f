"""Draws prompts with fixed seeds into one grid.

    qwenimg-dist sample sample.path=PIPELINE 'sample.prompts=["a red circle"]'           PIPELINE-grid.png beside it
    qwenimg-dist sample run.path=RUN sample.prompts_file=prompts.txt    newest valid checkpoint, EMA: RUN/grid.png
    qwenimg-dist sample run.path=RUN 'sample.prompts=["make it red"]' 'sample.images=[photo.png]'          an edit

Noise belongs to (prompt, seed), not to the batch, so a grid can be compared cell by cell with another one.
`sample.cells=DIR` also writes each picture as `NNNN.png`, in the grid's order; `sample.enhance=true` rewrites the
prompts first. Runs in one process on one device: a model that does not fit there is sampled by the grids of `train`.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qwenimg_dist.commands.inputs import usable_device, wanted_weights
from qwenimg_dist.config import Config
from qwenimg_dist.config_of_run import config_for_drawing
from qwenimg_dist.models.prompt_enhance import NEGATIVE_PROMPT, enhance
from qwenimg_dist.prompts_file import prompts_of

if TYPE_CHECKING:
    from PIL import Image

_REAL_BLOCKS: Final = 60
SUMMARY: Final = "a grid of pictures from a checkpoint or an export, fixed seeds"


def run(args: list[str]) -> int:
    """Write the grid. Raises ValueError without prompts or without anything to sample from."""
    config = config_for_drawing(args)
    prompts = read_prompts(config)
    given = config.sample.path or config.export.path
    if given is not None and (Path(given) / "checkpoints").is_dir():
        raise ValueError(f"{given} is a run directory: sample from its newest checkpoint with run.path={given}")
    if given is not None and Path(given).is_absolute() and not Path(given).exists():
        raise ValueError(f"sample.path={given} is not there")  # said before torch and diffusers take their seconds
    pictures = draw(config, prompts)
    labels = [prompt for prompt in prompts for _ in config.sample.seeds]
    from qwenimg_dist.models.generate import save_grid

    if config.sample.cells is not None:
        cells = Path(config.sample.cells)
        cells.mkdir(parents=True, exist_ok=True)
        for index, picture in enumerate(pictures):
            picture.save(cells / f"{index:04d}.png")
    out = save_grid(pictures, labels, grid_file(config), columns=config.sample.columns)
    print(f"{len(pictures)} pictures of {pictures[0].width}x{pictures[0].height} in {out}")
    return 0


def grid_file(config: Config) -> Path:
    """`sample.out`, or the file beside what is drawn from."""
    if config.sample.out is not None:
        return Path(config.sample.out)
    given = config.sample.path or config.export.path
    if given is not None and Path(given).is_dir():
        folder = Path(os.path.abspath(given))  # of a link, what it is called here
        return folder.with_name(f"{folder.name}-grid.png")
    return Path(config.run.path if given is None and config.run.path else ".") / "grid.png"


def read_prompts(config: Config) -> list[str]:
    """`sample.prompts`, then those of `sample.prompts_file`."""
    prompts = [prompt.text for prompt in prompts_of(config)]
    if not prompts:
        raise ValueError("nothing to draw: set sample.prompts=[...] or sample.prompts_file=FILE")
    return prompts


def conditions(config: Config, prompts: list[str]) -> tuple[list[str], str]:
    """What the model is given for each prompt, and the negative prompt."""
    sample = config.sample
    if not sample.enhance:
        return prompts, sample.negative_prompt
    return [enhance(prompt) for prompt in prompts], sample.negative_prompt or NEGATIVE_PROMPT


def draw(config: Config, prompts: list[str]) -> list[Image.Image]:
    """One picture per (prompt, seed), prompts outermost."""
    import torch

    from qwenimg_dist.commands.sample_edit import condition_latents, edit_features, open_images, size_of_edit
    from qwenimg_dist.models.generate import generate, load_scheduler_config
    from qwenimg_dist.models.text_encoder import TextEncoder
    from qwenimg_dist.models.vae import LatentCodec

    sample = config.sample
    device = usable_device(config.cluster.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    folder, transformer = load_transformer(config, dtype, device)
    encoder = TextEncoder.load(folder, dtype=dtype, device=device, max_sequence_length=config.model.max_text_tokens)
    texts, negative = conditions(config, prompts)
    distinct = sorted({*texts, negative})
    images, edit = open_images(sample.images), config.encode.edit
    if images:
        features = edit_features(edit, folder, encoder, images, distinct)
    else:
        features = {text: encoder.encode([text])[0] for text in distinct}
    del encoder  # 14 GB at full size, not needed while drawing
    side = max(config.resolutions)
    height, width = size_of_edit(images, side) if images else (side, side)
    height, width = sample.height or height, sample.width or width
    codec = LatentCodec.load(folder, dtype=dtype, device=device)
    return generate(
        transformer,
        codec,
        [features[text] for text in texts for _ in sample.seeds],
        features[negative],
        height=height,
        width=width,
        num_steps=sample.num_steps,
        guidance=sample.guidance,
        seeds=[seed for _ in prompts for seed in sample.seeds],
        scheduler_config=load_scheduler_config(folder),
        device=device,
        conditions=condition_latents(codec, images, edit.condition_side or math.isqrt(height * width)),
    )


def load_transformer(config: Config, dtype: Any, device: Any) -> tuple[Path, Any]:
    """(pipeline directory, transformer) from an export, or from the newest valid checkpoint of a run."""
    from diffusers import QwenImageTransformer2DModel

    from qwenimg_dist.models.pipeline import pipeline_dir, resolve_pipeline

    given = config.sample.path or config.export.path
    if given is not None:
        folder = resolve_pipeline(given, config.model.revision)
    elif config.run.path is None:
        folder = pipeline_dir(config.model)
    else:
        return _from_checkpoint(Path(config.run.path), config, dtype, device)
    refuse_settings_of_another(config, folder)
    model = QwenImageTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=dtype)
    return folder, model.eval().to(device)


def refuse_settings_of_another(config: Config, folder: Path) -> None:
    """Raise ValueError for a model of the real size that would be drawn at the tiny one's sizes and steps."""
    from qwenimg_dist.models.transformer import load_transformer_config

    num_blocks = load_transformer_config(folder / "transformer")["num_layers"]
    if config.model.name == "tiny" and num_blocks >= _REAL_BLOCKS:
        raise ValueError(
            f"{folder} holds a model of {num_blocks} blocks, and sizes and steps would be the tiny model's "
            f"({max(config.resolutions)} px, {config.sample.num_steps} steps): add model=qwen_image_2512"
        )


def _from_checkpoint(run_dir: Path, config: Config, dtype: Any, device: Any) -> tuple[Path, Any]:
    from consumers.checkpoint_reader import open_checkpoint
    from qwenimg_dist.models.pipeline import pipeline_dir
    from qwenimg_dist.models.transformer import assemble_transformer, load_transformer_config

    folder = pipeline_dir(config.model)
    reader = open_checkpoint(run_dir, config.export.step)
    which = wanted_weights(config, reader)
    architecture = load_transformer_config(folder / "transformer")
    model = assemble_transformer(architecture, lambda name: reader.read(name, which), dtype=dtype, device=device)
    return folder, model
