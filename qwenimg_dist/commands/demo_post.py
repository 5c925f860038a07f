"""What comes after pretraining, on one CPU machine: finetuning, DPO on pairs that a rule chose, GRPO on that rule.

    qwenimg-dist demo-post [demo.path=demo]

Goes on from an early checkpoint of `demo`, made here where there is none: of its pictures about half are right, and RL
needs such a spread. Each stage starts from the one before by `start_from`; pictures of the same prompts and seeds are
drawn after each and judged from the pixels, and `eval` puts the end beside the beginning. Everything is done by
commands that a user would type; they are printed, and stand in the report. Run again, it goes on where it was ended.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console

from qwenimg_dist.commands.demo import Step, make_pictures, run_steps, shown
from qwenimg_dist.compose import load_config
from qwenimg_dist.config import Config
from qwenimg_dist.demo.shapes import all_captions, caption, split

SUMMARY: Final = "after the demo: SFT, DPO, GRPO on the tiny model, each stage's pictures judged, and a report"

PX: Final = 64
STAGES: Final = ("early", "sft", "dpo", "grpo")
"""In order; each but the first starts from the one before."""
_SEEDS: Final = (0, 1)
_SIZE: Final = (f"sample.height={PX}", f"sample.width={PX}", "sample.num_steps=16")
# One resolution, short runs: evaluated at their ends, and without what the demo has shown already.
_SHORT: Final = (
    "model=tiny",
    "~curriculum.phases.high",
    "evaluate.resolutions=[64]",
    "evaluate.guard=warn",
    "evaluate.weights=ema",
    "checkpoint.certify=off",
)


def run(args: list[str]) -> int:
    """Run or continue. Returns 1 if a command of it fails."""
    extra = [word for word in args if not word.startswith("demo.")]
    config = load_config(["stage=demo", *args])
    root, console = Path(config.demo.path), Console(soft_wrap=True)
    make_pictures(config, console)
    write_prompts(root / "post")
    steps = plan(config, extra)
    begin = time.monotonic()
    if not run_steps(steps, console):
        return 1
    from qwenimg_dist.commands.demo_post_report import conclude

    return conclude(root, [shown(step.args) for step in steps], console, time.monotonic() - begin)


def plan(config: Config, extra: Sequence[str]) -> list[Step]:
    """The commands in order."""
    root = Path(config.demo.path)
    runs = {stage: root / "post" / f"run-{stage}" for stage in STAGES}
    early = _early_run(root, config.demo.early_step)
    runs["early"] = early
    steps = [*_early(config, early, extra), _sampled(root, "early", early, extra, step=config.demo.early_step)]
    begin: tuple[str, ...] = (f"start_from.path={early}", f"start_from.step={config.demo.early_step}")
    for stage, make in (("sft", _sft), ("dpo", _dpo), ("grpo", _grpo)):
        steps += make(config, begin, runs, extra)
        steps.append(_sampled(root, stage, runs[stage], extra))
        begin = (f"start_from.path={runs[stage]}",)
    steps.append(_judged(root, runs, early, config.demo.early_step, extra))
    return steps


def write_prompts(folder: Path) -> None:
    """Each scene once in a wording that no pair and no rollout is drawn for; and those that they are drawn for."""
    folder.mkdir(parents=True, exist_ok=True)
    seen, _ = split()
    for name, lines in (("prompts", all_captions()[1::3]), ("prompts-drawn", [caption(scene) for scene in seen])):
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def cells_of(root: Path, stage: str) -> Path:
    """Where a stage's single pictures lie."""
    return root / "post" / "cells" / stage


def _early_run(root: Path, step: int) -> Path:
    """The demo's own run where it has the early checkpoint or has not begun; else one beside it."""
    checkpoints = root / "run" / "checkpoints"
    there = [one.name for one in checkpoints.glob("step-*")] if checkpoints.is_dir() else []
    return root / "run" if not there or f"step-{step:08d}" in there else root / "post" / "run-early"


def _early(config: Config, run_dir: Path, extra: Sequence[str]) -> list[Step]:
    root, step = Path(config.demo.path), config.demo.early_step
    done = run_dir / "checkpoints" / f"step-{step:08d}" / "manifest.json"
    common = ("stage=demo", *extra)
    produce = ("produce", *common, f"source.path={root / 'pictures'}", f"data.path={root / 'data'}")
    data = (f"data.path={root / 'data'}", f"run.path={run_dir}")
    train = ("train", *common, *data, f"train.stop_after={step}", f"checkpoint.every={step}")
    return [
        Step(title="produce: the demo's pictures", args=produce, typical_s=60, done_if=done),
        Step(title=f"train: the demo's first {step} steps", args=train, typical_s=75, done_if=done),
    ]


def _sft(config: Config, begin: Sequence[str], runs: dict[str, Path], extra: Sequence[str]) -> list[Step]:
    """On the square pictures alone, at a lower rate that falls to nought."""
    steps, root = config.demo.sft_steps, Path(config.demo.path)
    words = ("optim.lr=5e-4", "optim.warmup_steps=5", "optim.ema_decay=0.9", "data.where=width == height")
    data = (f"data.path={root / 'data'}", f"run.path={runs['sft']}")
    args = ("train", "stage=sft", *_SHORT, *begin, *data, *_lasting(steps), *words, *extra)
    return [Step(title="SFT: square pictures only", args=args, typical_s=35, done_if=_last(runs["sft"], steps))]


def _dpo(config: Config, begin: Sequence[str], runs: dict[str, Path], extra: Sequence[str]) -> list[Step]:
    """Pictures of the finetuned model, best and worst of each prompt by the rule; then DPO on them."""
    steps, post = config.demo.dpo_steps, Path(config.demo.path) / "post"
    last = _last(runs["dpo"], steps)
    made, data = post / "pairs", post / "data-pairs"
    drawn = (f"sample.prompts_file={post / 'prompts-drawn.txt'}", f"pairs.num_seeds={config.demo.pair_seeds}")
    by = ("pairs", "model=tiny", f"run.path={runs['sft']}", f"pairs.path={made}")
    pairs = (*by, *drawn, *_SIZE, "reward.weights.shapes=1", *extra)
    encode = ("produce", "stage=dpo", *_SHORT, f"source.path={made}", f"data.path={data}", *extra)
    words = ("optim.lr=1e-4", "optim.warmup_steps=5", "optim.ema_decay=0.9", "objective.beta=500")
    place = (f"data.path={data}", f"run.path={runs['dpo']}")
    train = ("train", "stage=dpo", *_SHORT, *begin, *place, *_lasting(steps), *words, *extra)
    return [
        Step(title="pairs: best and worst picture of each prompt", args=pairs, typical_s=50, done_if=last),
        Step(title="produce: the pairs", args=encode, typical_s=25, done_if=last),
        Step(title="DPO on the pairs", args=train, typical_s=60, done_if=last),
    ]


def _grpo(config: Config, begin: Sequence[str], runs: dict[str, Path], extra: Sequence[str]) -> list[Step]:
    """Groups of pictures drawn as it trains, judged by the same rule."""
    steps, root = config.demo.grpo_steps, Path(config.demo.path)
    last, data = _last(runs["grpo"], steps), root / "post" / "data-prompts"
    source = f"source.path={root / 'post' / 'prompts-drawn.txt'}"
    encode = ("produce", "stage=grpo", *_SHORT, source, f"data.path={data}", *extra)
    words = (
        "reward.weights.shapes=1",
        f"evaluate.data_path={root / 'data'}",
        "curriculum.phases.low.global_batch=8",
        "optim.lr=1.5e-4",
        "optim.ema_decay=0.9",
        "objective.share_noise=true",
        "objective.group_size=8",
        "objective.num_steps=6",
        "objective.window_within=4",
        "objective.noise_level=0.7",
        "objective.guidance=3",
    )
    place = (f"data.path={data}", f"run.path={runs['grpo']}")
    train = ("train", "stage=grpo", *_SHORT, *begin, *place, *_lasting(steps), *words, *extra)
    return [
        Step(title="produce: the prompts", args=encode, typical_s=20, done_if=last),
        Step(title="GRPO on the prompts", args=train, typical_s=110, done_if=last),
    ]


def _sampled(root: Path, stage: str, run_dir: Path, extra: Sequence[str], *, step: int | None = None) -> Step:
    grid = root / "post" / f"{stage}.png"
    which = (f"export.step={step}",) if step is not None else ()
    files = (f"sample.prompts_file={root / 'post' / 'prompts.txt'}", f"sample.out={grid}")
    seeds = f"sample.seeds={list(_SEEDS)}".replace(" ", "")
    args = ("sample", "model=tiny", f"run.path={run_dir}", *which, *files, f"sample.cells={cells_of(root, stage)}")
    args = (*args, seeds, *_SIZE, "sample.columns=12", *extra)
    return Step(title=f"sample after {stage}", args=args, typical_s=15, done_if=grid)


def _judged(root: Path, runs: dict[str, Path], early: Path, step: int, extra: Sequence[str]) -> Step:
    out = root / "post" / "eval"
    against = f"eval.against={early / 'checkpoints' / f'step-{step:08d}'}"
    drawn = (f"sample.prompts_file={root / 'post' / 'prompts.txt'}", f"sample.seeds={list(_SEEDS)}".replace(" ", ""))
    words = ("reward.weights.shapes=1", *_SIZE, *extra)
    args = ("eval", f"run.path={runs['grpo']}", against, *drawn, f"eval.out={out}", *words)
    return Step(title="eval: the end against the beginning", args=args, typical_s=60, done_if=out / "eval.json")


def _lasting(steps: int) -> tuple[str, ...]:
    return (f"train.steps={steps}", f"evaluate.every={steps}", f"checkpoint.every={steps}", "train.log_every=5")


def _last(run_dir: Path, steps: int) -> Path:
    return run_dir / "checkpoints" / f"step-{steps:08d}" / "manifest.json"
