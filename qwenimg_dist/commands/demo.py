"""The README's main job on one CPU machine: pictures -> produce -> train -> export -> sample, with a report.

    qwenimg-dist demo [demo.path=demo] [demo.num_images=1500]

Everything but the generated pictures is done by the same commands that a user would type; they are printed, and stand
in the report. Run again, it goes on where it was ended. Deliberately no shortcut of its own: what it shows, `produce`,
`train`, `ckpt export` and `sample` do on other people's pictures too.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rich.console import Console

from qwenimg_dist.compose import load_config
from qwenimg_dist.config import Config
from qwenimg_dist.demo.scores import Score, score_cells
from qwenimg_dist.demo.shapes import caption, split, write_folder

SUMMARY: Final = "the whole chain on one CPU machine in minutes, tiny model, pictures and a report at the end"

LOW_PX: Final = 64
HIGH_PX: Final = 128
GRIDS: Final = {
    "untrained": LOW_PX,
    "seen-64px": LOW_PX,
    "held-out-64px": LOW_PX,
    "seen-128px": HIGH_PX,
    "held-out-128px": HIGH_PX,
}
"""Grid -> side of its pictures."""
# 60 seen scenes and 12 held-out ones: enough seeds for 120 and 72 cells.
_SEEDS: Final = {"seen": "[0,1]", "held-out": "[0,1,2,3,4,5]"}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of the demo."""

    title: str
    args: tuple[str, ...]
    typical_s: float
    """Duration seen on two cores; only for the display of what remains."""
    done_if: Path | None = None
    """Skip the step when this exists: an earlier demo finished it."""


@dataclass
class Progress:
    """What runs, and how long the rest still takes: typical durations, scaled by how this machine does."""

    steps: Sequence[Step]
    console: Console
    started: float = field(default_factory=time.monotonic)
    spent_typical_s: float = 0.0

    def announce(self, index: int) -> None:
        step = self.steps[index]
        rest = sum(later.typical_s for later in self.steps[index:])
        speed = (time.monotonic() - self.started) / self.spent_typical_s if self.spent_typical_s > 20 else 1.0
        left = f"about {max(rest * speed / 60, 0.1):.1f} min left"
        self.console.rule(f"[bold]{index + 1}/{len(self.steps)} {step.title}[/] ({left})")
        self.console.print(f"$ {shown(step.args)}", style="cyan", soft_wrap=True, highlight=False)


def run(args: list[str]) -> int:
    """Run or continue the demo. Returns 1 if a command of it fails."""
    config = load_config(["stage=demo", *args])
    root = Path(config.demo.path)
    console = Console(soft_wrap=True)
    make_pictures(config, console)
    write_prompts(root)
    steps = plan(root, [word for word in args if not word.startswith("demo.")])
    begin = time.monotonic()
    if not run_steps(steps, console):
        return 1
    return conclude(root, steps, console, time.monotonic() - begin)


def make_pictures(config: Config, console: Console) -> None:
    """The folder that plays the user's pictures, if it is not there yet."""
    pictures = Path(config.demo.path) / "pictures"
    if not (pictures / "metadata.jsonl").is_file():
        counts = write_folder(pictures, num_images=config.demo.num_images, seed=config.demo.seed)
        console.print(f"made {sum(counts.values())} files in {pictures}: {counts}", highlight=False)


def run_steps(steps: Sequence[Step], console: Console) -> bool:
    """Run what is not done yet, in order; False where a command failed."""
    progress = Progress(steps, console)
    for index, step in enumerate(steps):
        if step.done_if is not None and step.done_if.exists():
            console.print(f"{index + 1}/{len(steps)} {step.title}: done before ({step.done_if})", highlight=False)
            continue
        progress.announce(index)
        code = subprocess.run([sys.executable, "-m", "qwenimg_dist", *step.args], check=False).returncode
        if code != 0:
            again = "the same command again goes on from here"
            console.print(f"[red]step {step.title!r} ended with exit code {code}[/]; {again}")
            return False
        progress.spent_typical_s += step.typical_s
    return True


def plan(root: Path, extra: Sequence[str]) -> list[Step]:
    """The commands of the demo in order."""
    data, run_dir = root / "data", root / "run"
    common = ("stage=demo", *extra)
    boundary = load_config(common).curriculum.phases[0].steps
    exports = {LOW_PX: root / "pipeline-64px", HIGH_PX: root / "pipeline"}
    produce = ("produce", *common, f"source.path={root / 'pictures'}", f"data.path={data}")
    train = ("train", *common, f"data.path={data}", f"run.path={run_dir}")
    export = ("ckpt", "export", f"run.path={run_dir}", "export.dtype=float32")
    steps = [
        Step(title="produce: filter and encode at 64 and 128 px", args=produce, typical_s=60),
        Step(title="train: 64 px, then 128 px, on two ZeRO-3 ranks", args=train, typical_s=300),
        Step(
            title="export the end of the 64 px phase",
            args=(*export, f"export.path={exports[LOW_PX]}", f"export.step={boundary}"),
            typical_s=8,
            done_if=exports[LOW_PX],
        ),
        Step(
            title="export the finished model",
            args=(*export, f"export.path={exports[HIGH_PX]}"),
            typical_s=8,
            done_if=exports[HIGH_PX],
        ),
    ]
    for name, side in GRIDS.items():
        prompts = _prompts_of(name)
        place = [] if name == "untrained" else [f"sample.path={exports[side]}"]
        size = (f"sample.height={side}", f"sample.width={side}", "sample.columns=12", f"sample.seeds={_SEEDS[prompts]}")
        files = (f"sample.prompts_file={root / f'prompts-{prompts}.txt'}", f"sample.out={root / f'{name}.png'}")
        steps.append(
            Step(
                title=f"sample: {name.replace('-', ' ')}",
                args=("sample", *common, *place, *files, f"sample.cells={cells_of(root, name)}", *size),
                typical_s=12,
                done_if=root / f"{name}.png",
            )
        )
    return steps


def write_prompts(root: Path) -> None:
    """One prompt per line and scene; a held-out prompt names a pair of colour and shape never trained on."""
    seen, held_out = split()
    for name, scenes in (("seen", seen), ("held-out", held_out)):
        lines = [caption(scene) for scene in scenes]
        (root / f"prompts-{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def cells_of(root: Path, name: str) -> Path:
    """Where a grid's single pictures lie."""
    return root / "cells" / name


def shown(args: Sequence[str]) -> str:
    """The command as a reader would type it."""
    return shlex.join(["qwenimg-dist", *args])


def conclude(root: Path, steps: Sequence[Step], console: Console, seconds: float) -> int:
    """Judge the grids, write the report, print where everything lies."""
    from qwenimg_dist.commands.demo_report import write_demo_report

    scores = {name: score_cells(cells_of(root, name), root / f"prompts-{_prompts_of(name)}.txt") for name in GRIDS}
    report = write_demo_report(root, scores, [shown(step.args) for step in steps], seconds)
    console.rule("[bold]result, read from the pixels")
    for name, score in scores.items():
        console.print(f"{name:<16} {describe(score)}", highlight=False)
    console.print(
        f"\nreport: {report}\npipeline: {root / 'pipeline'} (stock QwenImagePipeline loads it)", highlight=False
    )
    console.print("the same commands work on your own pictures: they are printed above and in the report")
    return 0


def _prompts_of(name: str) -> str:
    return "held-out" if name.startswith("held-out") else "seen"


def describe(score: Score) -> str:
    """A score in one line."""
    return f"colour {score.colour:.0%}, shape {score.shape:.0%}, both {score.both:.0%} of {score.num_cells} cells"
