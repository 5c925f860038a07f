"""A training run's curves: losses, the guard's view by resolution, the optimiser, speed and memory; phases marked.

Place in the flow: `run_report` puts these pieces under its titles. Draws the metrics that are there and invents none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from qwenimg_dist.report.curves import COLOURS, INK, Line, Mark, Panel, draw
from qwenimg_dist.report.metrics_file import Column
from qwenimg_dist.report.page import Figure, Piece

Metrics = Mapping[str, Column]

_QUANTILE: Final = re.compile(r"^eval/loss_q([0-9.]+)$")
_CLASS: Final = re.compile(r"^eval/loss_(\d+)$")
_TEXT: Final = re.compile(r"^eval/text/(\d+)(.*)$")
# Few and cold to many and warm: quantiles and lengths are ordered things, so their colours are too.
_SEQUENCE: Final = ("#3b2f6b", "#33568a", "#2a7a8c", "#2f9a78", "#7ab648", "#d8b52b")
_EXACT: Final = ("train/lr", "train/memory_gb", "train/host_memory_gb")
"""Drawn as they are: settings and high-water marks, which do not scatter."""
_ENGINE_PANELS: Final = (
    ("Gradient norm (before clipping)", ("train/grad_norm",), True),
    ("Learning rate", ("train/lr",), False),
    ("Images per second", ("train/images_per_s",), False),
    ("Tokens per second", ("train/tokens_per_s",), False),
    ("Step time (s)", ("train/step_s",), False),
    ("Of it: rollouts, rewards, updates (s)", ("train/rollout_s", "train/reward_s", "train/update_s"), False),
    ("Data wait (share of step time)", ("train/data_wait_share",), False),
    ("Padding (share)", ("train/padding", "train/padding_flops"), False),
    ("Model TFLOP per second, all ranks", ("train/model_tflops_per_s",), False),
    ("Model FLOPs utilisation", ("train/mfu",), False),
    ("Own step time (s)", ("train/own_step_s_max", "train/own_step_s_min"), False),
    ("Peak GPU memory, largest rank (GB)", ("train/memory_gb",), False),
    ("Peak host memory, largest rank (GB)", ("train/host_memory_gb",), False),
)


_REWARD: Final = re.compile(r"reward/(?!group_)\w+_std$")
_POLICY_PANELS: Final = (
    ("Spread of rewards within groups", ("reward/group_std",)),
    ("Groups without a spread, pictures without a reward", ("reward/flat_groups", "reward/without")),
    ("Ratios beyond the clip (share)", ("train/clip_fraction",)),
    ("Distance of ratios from 1", ("train/ratio_error", "train/ratio_error_of_first_update")),
    ("Divergence from the starting model", ("train/kl",)),
)


def phase_marks(metrics: Metrics, names: Sequence[str] = ()) -> list[Mark]:
    """Where `train/phase` changes, labelled `high, 128 px` (the class only where a phase has just one)."""
    phase = metrics.get("train/phase")
    if phase is None or len(phase.steps) == 0:
        return []
    changes = np.flatnonzero(np.diff(phase.values)) + 1
    return [
        Mark(step=int(phase.steps[i]), label=_phase_label(metrics, int(phase.values[i]), names))
        for i in changes.tolist()
    ]


def losses(metrics: Metrics, marks: Sequence[Mark]) -> tuple[Piece, ...]:
    """Training loss; held-out loss by sigma quantile, by resolution class beside the starting model's, by text."""
    pieces: list[Piece] = []
    if "train/loss" in metrics:
        loss = metrics["train/loss"]
        panel = Panel(title="Training loss", lines=(line("loss", loss, smooth=half_life(loss)),), log=True)
        caption = "Each logged step, faint, and a running mean. A new phase has other sigmas, so its level differs."
        pieces.append(Figure(svg=draw([panel], marks), caption=caption if marks else ""))
    held_out = (
        (
            "Held-out loss at fixed sigma quantiles, fixed noise",
            held_out_lines(metrics),
            "Dashed: mean of the model that the run started from, on the same samples.",
        ),
        (
            "Held-out loss by resolution class, trained or not",
            class_lines(metrics),
            "Dashed, in the same colour: the starting model at that class. Above it the run has made the model worse.",
        ),
        ("Held-out loss by text length (tokens)", _text_lines(metrics), ""),
    )
    for title, lines, caption in held_out:
        if lines:
            panel = Panel(title=title, lines=tuple(lines), log=True)
            dashed = any(one.dashed for one in lines)
            pieces.append(Figure(svg=draw([panel], marks, height_in=3.8), caption=caption if dashed else ""))
    return tuple(pieces)


def rewards(metrics: Metrics, marks: Sequence[Mark]) -> tuple[Piece, ...]:
    """Rewards of rollouts by component, and how the policy moves; nothing for runs without rollouts."""
    names = sorted(name.removesuffix("_std") for name in metrics if _REWARD.match(name))
    if not names:
        return ()
    total = [name for name in names if name == "reward/total"]
    chosen = [*total, *(name for name in names if name not in total)]
    lines = tuple(line(name.removeprefix("reward/"), metrics[name], smooth=half_life(metrics[name])) for name in chosen)
    pieces = [Figure(svg=draw([Panel(title="Rewards of rollouts, means over a step's pictures", lines=lines)], marks))]
    panels = []
    for title, wanted in _POLICY_PANELS:
        there = tuple(
            line(name.partition("/")[2].replace("_", " "), metrics[name], smooth=half_life(metrics[name]))
            for name in wanted
            if name in metrics
        )
        if there:
            panels.append(Panel(title=title, lines=there))
    return (*pieces, Figure(svg=draw(panels, marks, columns=2, height_in=2.5))) if panels else tuple(pieces)


def engine(metrics: Metrics, marks: Sequence[Mark]) -> tuple[Piece, ...]:
    """Optimiser, rates, waiting, padding, memory: one small panel each."""
    panels = []
    for title, names, log in _ENGINE_PANELS:
        there = [name for name in names if name in metrics]
        lines = tuple(
            line(
                name.removeprefix("train/").replace("_", " "),
                metrics[name],
                smooth=0.0 if name in _EXACT else half_life(metrics[name]),
            )
            for name in there
        )
        if lines:
            panels.append(Panel(title=title, log=log, lines=lines))
    return (Figure(svg=draw(panels, marks, columns=2, height_in=2.5)),) if panels else ()


def held_out_lines(metrics: Metrics) -> list[Line]:
    """The quantiles, their mean, and the starting model's."""
    quantiles = sorted((float(m[1]), name) for name in metrics if (m := _QUANTILE.match(name)))
    lines: list[Line] = []
    for position, (quantile, name) in enumerate(quantiles):
        colour = _shade(position, len(quantiles))
        lines.append(line(f"q {quantile:g}", _from_start(metrics, name), colour=colour))
    if "eval/loss" in metrics:
        lines.append(line("mean", _from_start(metrics, "eval/loss"), colour=INK, strong=True))
    if "eval/start_loss" in metrics:
        lines.append(line("starting model", _at_zero(metrics["eval/start_loss"]), colour=INK, dashed=True))
    return lines


def class_lines(metrics: Metrics) -> list[Line]:
    """Each resolution class, and dashed the starting model at it."""
    lines: list[Line] = []
    classes = sorted((int(m[1]), name) for name in metrics if (m := _CLASS.match(name)))
    for position, (resolution, name) in enumerate(classes):
        colour = COLOURS[position % len(COLOURS)]
        lines.append(line(f"{resolution} px", _from_start(metrics, name), colour=colour))
        start = metrics.get(name.replace("eval/loss", "eval/start_loss"))
        if start is not None:
            lines.append(line(f"{resolution} px at start", _at_zero(start), colour=colour, dashed=True))
    return lines


def line(
    label: str,
    column: Column,
    *,
    colour: str | None = None,
    dashed: bool = False,
    strong: bool = False,
    smooth: float = 0.0,
) -> Line:
    """A column as a curve."""
    return Line(
        label=label,
        steps=column.steps,
        values=column.values,
        colour=colour,
        dashed=dashed,
        strong=strong,
        smooth=smooth,
    )


def half_life(column: Column) -> float:
    """Smoothing that grows with the curve; a short one is shown as it is, since a mean would lag behind it."""
    return len(column.steps) / 40 if len(column.steps) >= 40 else 0.0


def _text_lines(metrics: Metrics) -> list[Line]:
    found = sorted((int(m[1]), name) for name in metrics if (m := _TEXT.match(name)))
    return [
        line(name.removeprefix("eval/text/"), metrics[name], colour=_shade(position, len(found)))
        for position, (_, name) in enumerate(found)
    ]


def _shade(position: int, count: int) -> str:
    return _SEQUENCE[round(position * (len(_SEQUENCE) - 1) / max(count - 1, 1))]


def _from_start(metrics: Metrics, name: str) -> Column:
    """A held-out loss with its value at step 0, which is the starting model's by definition."""
    start = metrics.get(name.replace("eval/loss", "eval/start_loss"))
    return metrics[name] if start is None else _at_zero(metrics[name], float(start.values[0]))


def _at_zero(column: Column, value: float | None = None) -> Column:
    if column.steps[0] == 0:
        return column
    first = float(column.values[0]) if value is None else value
    return Column(steps=np.insert(column.steps, 0, 0), values=np.insert(column.values, 0, first))


def _phase_label(metrics: Metrics, index: int, names: Sequence[str]) -> str:
    label = names[index] if index < len(names) else f"phase {index}"
    phase, resolution = metrics["train/phase"], metrics.get("train/resolution")
    if resolution is not None and len(resolution.values) == len(phase.values):
        classes = np.unique(resolution.values[phase.values == index])
        if len(classes) == 1:
            return f"{label}, {int(classes[0])} px"
    return label
