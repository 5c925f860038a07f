"""The report of `demo-post`: pictures, accuracy and reward after each stage, and what `eval` says of the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image
from rich.console import Console

from qwenimg_dist.commands.demo_post import STAGES, cells_of
from qwenimg_dist.demo.scores import Score, score_cells
from qwenimg_dist.demo.shapes import parse
from qwenimg_dist.report.page import Code, KeyFigure, KeyFigures, Paragraph, Picture, Pictures, Section, write_report
from qwenimg_dist.report.table import Table
from qwenimg_dist.rewards.shapes import grade

_TOLD: Final = {
    "early": "early checkpoint of the demo",
    "sft": "after SFT on square pictures",
    "dpo": "after DPO on pairs chosen by the rule",
    "grpo": "after GRPO on the rule",
}


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A stage's pictures."""

    score: Score
    reward: float
    """Mean grade of the rule."""


def conclude(root: Path, commands: Sequence[str], console: Console, seconds: float) -> int:
    """Judge the grids, write the report, print where it lies."""
    post = root / "post"
    judged = {stage: judge_stage(root, stage) for stage in STAGES}
    result = json.loads((post / "eval" / "eval.json").read_text(encoding="utf-8"))
    report = write_post_report(post, judged, result, commands, seconds)
    console.rule("[bold]result, read from the pixels")
    for stage, one in judged.items():
        shares = f"colour {one.score.colour:.0%}, shape {one.score.shape:.0%}, both {one.score.both:.0%}"
        console.print(f"{stage:<6} reward {one.reward:.3f}, {shares} of {one.score.num_cells} cells", highlight=False)
    console.print(
        f"\n{result['verdict']['line']}\nreport: {report}\neval: {post / 'eval' / 'eval.html'}", highlight=False
    )
    return 0


def judge_stage(root: Path, stage: str) -> Judged:
    """By the judge that counts right and wrong, and by the rule that was the reward."""
    prompts_file, folder = root / "post" / "prompts.txt", cells_of(root, stage)
    score = score_cells(folder, prompts_file)
    prompts = [line for line in prompts_file.read_text(encoding="utf-8").splitlines() if line]
    files = sorted(folder.glob("*.png"))
    per_prompt = len(files) // len(prompts)
    grades = []
    for index, file in enumerate(files):
        scene = parse(prompts[index // per_prompt])
        with Image.open(file) as picture:
            grades.append(grade(picture, scene.colour, scene.shape))
    return Judged(score=score, reward=float(np.mean(grades)))


def write_post_report(
    post: Path, judged: dict[str, Judged], result: dict[str, Any], commands: Sequence[str], seconds: float
) -> Path:
    """Write `post/report.html` and return its path."""
    out = post / "report.html"
    tiles = tuple(
        KeyFigure(label=_TOLD[stage], value=f"{one.reward:.2f}", note=f"reward; {one.score.both:.0%} wholly right")
        for stage, one in judged.items()
    )
    table = Table(
        title="What the judge read from the pixels",
        columns=("stage", "cells", "reward", "colour right", "shape right", "both right"),
        rows=tuple(
            (
                _TOLD[stage],
                one.score.num_cells,
                f"{one.reward:.3f}",
                f"{one.score.colour:.1%}",
                f"{one.score.shape:.1%}",
                f"{one.score.both:.1%}",
            )
            for stage, one in judged.items()
        ),
    )
    said = Paragraph(
        text=f"The end against the beginning, by `eval`: {result['verdict']['line']}. Its page: eval/eval.html."
    )
    grids = tuple(Picture.read(post / f"{stage}.png", _TOLD[stage]) for stage in judged)
    sections = [
        Section(title="Result", pieces=(KeyFigures(figures=tiles), table, said)),
        Section(title="The same prompts and seeds after each stage", pieces=(Pictures(pictures=grids, columns=1),)),
        Section(title="Commands", pieces=(Code(text="\n".join(commands)),)),
    ]
    write_report(
        out, title="After pretraining", subtitle=f"this part took {seconds / 60:.1f} minutes", sections=sections
    )
    return out
