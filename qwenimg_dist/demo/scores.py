"""How often a grid shows what its prompts asked for, judged from the pixels of the single pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from qwenimg_dist.demo.shapes import parse
from qwenimg_dist.rewards.shapes import judge


@dataclass(frozen=True, kw_only=True)
class Score:
    """Shares (0 to 1) of the cells in which the judge saw what the prompt names."""

    num_cells: int
    colour: float
    shape: float
    both: float


def score_cells(folder: Path, prompts_file: Path) -> Score:
    """Judge `NNNN.png` in `folder` against the lines of `prompts_file`: equally many pictures per line, in order.

    Raises ValueError if the pictures cannot be shared out evenly.
    """
    prompts = [line for line in prompts_file.read_text(encoding="utf-8").splitlines() if line]
    files = sorted(folder.glob("*.png"))
    if not files or not prompts or len(files) % len(prompts):
        raise ValueError(f"{folder} has {len(files)} pictures for the {len(prompts)} prompts of {prompts_file}")
    colour = shape = both = 0
    per_prompt = len(files) // len(prompts)
    for index, file in enumerate(files):
        scene = parse(prompts[index // per_prompt])
        with Image.open(file) as picture:
            verdict = judge(picture)
        colour += verdict.colour == scene.colour
        shape += verdict.shape == scene.shape
        both += verdict.colour == scene.colour and verdict.shape == scene.shape
    count = len(files)
    return Score(num_cells=count, colour=colour / count, shape=shape / count, both=both / count)
