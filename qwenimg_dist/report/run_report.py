"""The report of a training run: key figures, curves, sample grids along the way, the data's funnel, the config.

Place in the flow: reads a run directory (`metrics.jsonl`, `samples/`, `config.yaml`, `environment.json`) and a data
set, whatever of them there is; `page.write_report` makes a file of the sections. Draws the metrics that are there and
invents none; may be made while the run is at work.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from omegaconf import OmegaConf

from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.report.curves import INK, Line, Mark, Panel, draw
from qwenimg_dist.report.funnel import funnel
from qwenimg_dist.report.metrics_file import Column, read_metrics
from qwenimg_dist.report.page import Code, Figure, KeyFigure, KeyFigures, Paragraph, Picture, Pictures, Piece, Section
from qwenimg_dist.report.stats import stats
from qwenimg_dist.report.table import show

_GRID: Final = re.compile(r"^step-(\d+)-?(.*)\.png$")
_QUANTILE: Final = re.compile(r"^eval/loss_q([0-9.]+)$")
_GRIDS_SHOWN: Final = 12
_PAGE_PX: Final = 1032  # width of the report's column
# Few and cold to many and warm: the quantile is an ordered thing, so its colours are too.
_SEQUENCE: Final = ("#3b2f6b", "#33568a", "#2a7a8c", "#2f9a78", "#7ab648", "#d8b52b")
_ENGINE_PANELS: Final = (
    ("Gradient norm (before clipping)", ("train/grad_norm",), True),
    ("Learning rate", ("train/lr",), False),
    ("Images per second", ("train/images_per_s",), False),
    ("Tokens per second", ("train/tokens_per_s",), False),
    ("Step time (s)", ("train/step_s", "train/data_wait_s"), False),
    ("Padding (share of tokens)", ("train/padding",), False),
    ("Model TFLOP per second, all ranks", ("train/model_tflops_per_s",), False),
    ("Model FLOPs utilisation", ("train/mfu",), False),
    ("Peak memory per rank (GB)", ("train/memory_gb", "train/host_memory_gb"), False),
)


def run_sections(run_dir: Path, data: Path | None = None) -> list[Section]:
    """Sections for `write_report`; what is not there is left out. Raises ValueError for damaged metrics."""
    metrics = read_metrics(run_dir / "metrics.jsonl")
    marks = phase_marks(metrics, _phase_names(run_dir))
    sections = [
        Section(title="Run", pieces=_overview(metrics)),
        Section(title="Loss", pieces=_losses(metrics, marks)),
        Section(title="Samples along the way", pieces=_grids(run_dir / "samples", marks)),
        Section(title="Steps and speed", pieces=_engine(metrics, marks)),
        *(data_sections(data) if data is not None else []),
        Section(title="Settings", pieces=_settings(run_dir)),
    ]
    return [section for section in sections if section.pieces]


def data_sections(data: Path) -> list[Section]:
    """The funnel and buckets of a data set."""
    dataset = Dataset.open(data)
    return [Section(title="Data", pieces=(*funnel(dataset).tables(), *stats(dataset).tables()))]


def phase_marks(metrics: Mapping[str, Column], names: Sequence[str] = ()) -> list[Mark]:
    """Where `train/phase` changes, labelled `high, 128 px` (the class only where a phase has just one)."""
    phase = metrics.get("train/phase")
    if phase is None or len(phase.steps) == 0:
        return []
    changes = np.flatnonzero(np.diff(phase.values)) + 1
    return [
        Mark(step=int(phase.steps[i]), label=_phase_label(metrics, int(phase.values[i]), names))
        for i in changes.tolist()
    ]


def _phase_label(metrics: Mapping[str, Column], index: int, names: Sequence[str]) -> str:
    label = names[index] if index < len(names) else f"phase {index}"
    phase, resolution = metrics["train/phase"], metrics.get("train/resolution")
    if resolution is not None and len(resolution.values) == len(phase.values):
        classes = np.unique(resolution.values[phase.values == index])
        if len(classes) == 1:
            return f"{label}, {int(classes[0])} px"
    return label


def _phase_names(run_dir: Path) -> list[str]:
    """The curriculum's names of the phases; none where the run has no readable config."""
    file = run_dir / "config.yaml"
    if not file.is_file():
        return []
    phases = OmegaConf.select(OmegaConf.load(file), "curriculum.phases")
    return [str(phase.get("name") or f"phase {i}") for i, phase in enumerate(phases or ())]


def _overview(metrics: Mapping[str, Column]) -> tuple[Piece, ...]:
    if "train/loss" not in metrics:
        return (Paragraph(text="No step was logged yet."),)
    loss = metrics["train/loss"]
    figures = [
        KeyFigure(label="steps", value=f"{int(loss.steps[-1]):,}", note=_phases_note(metrics)),
        KeyFigure(label="training loss", value=show(_tail(loss)), note="mean of the last tenth"),
    ]
    if "eval/loss" in metrics:
        figures.append(_held_out_figure(metrics))
    for name, label in (("train/images_per_s", "images per second"), ("train/tokens_per_s", "tokens per second")):
        if name in metrics:
            figures.append(KeyFigure(label=label, value=show(_median(metrics[name])), note="median"))
    if "train/mfu" in metrics:
        figures.append(
            KeyFigure(label="FLOPs utilisation", value=f"{_median(metrics['train/mfu']):.1%}", note="median")
        )
    if "train/images" in metrics:
        seen = int(metrics["train/images"].values[-1])
        figures.insert(1, KeyFigure(label="images seen", value=f"{seen:,}", note=_epochs_note(metrics)))
    skipped = metrics.get("train/skipped_steps")
    if skipped is not None and skipped.values[-1] > 0:
        figures.append(KeyFigure(label="skipped steps", value=show(int(skipped.values[-1])), note="not finite"))
    return (KeyFigures(figures=tuple(figures)),)


def _losses(metrics: Mapping[str, Column], marks: Sequence[Mark]) -> tuple[Piece, ...]:
    pieces: list[Piece] = []
    if "train/loss" in metrics:
        loss = metrics["train/loss"]
        line = _line("loss", loss, smooth=_half_life(loss))
        panel = Panel(title="Training loss", lines=(line,), log=True)
        caption = "Each logged step, faint, and a running mean. A new phase has other sigmas, so its level differs."
        pieces.append(Figure(svg=draw([panel], marks), caption=caption if marks else ""))
    lines = _held_out_lines(metrics)
    if lines:
        panel = Panel(title="Held-out loss at fixed sigma quantiles, fixed noise", lines=tuple(lines), log=True)
        dashed = any(line.dashed for line in lines)
        caption = "Dashed: mean of the model that the run started from, on the same samples." if dashed else ""
        pieces.append(Figure(svg=draw([panel], marks, height_in=3.8), caption=caption))
    return tuple(pieces)


def _held_out_lines(metrics: Mapping[str, Column]) -> list[Line]:
    quantiles = sorted((float(m[1]), name) for name in metrics if (m := _QUANTILE.match(name)))
    lines: list[Line] = []
    for position, (quantile, name) in enumerate(quantiles):
        colour = _SEQUENCE[round(position * (len(_SEQUENCE) - 1) / max(len(quantiles) - 1, 1))]
        lines.append(_line(f"q {quantile:g}", _from_start(metrics, name), colour=colour))
    if "eval/loss" in metrics:
        lines.append(_line("mean", _from_start(metrics, "eval/loss"), colour=INK, strong=True))
    if "eval/start_loss" in metrics:
        lines.append(_line("starting model", _at_zero(metrics["eval/start_loss"]), colour=INK, dashed=True))
    return lines


def _from_start(metrics: Mapping[str, Column], name: str) -> Column:
    """A held-out loss with its value at step 0, which is the starting model's by definition."""
    start = metrics.get(name.replace("eval/loss", "eval/start_loss"))
    return metrics[name] if start is None else _at_zero(metrics[name], float(start.values[0]))


def _at_zero(column: Column, value: float | None = None) -> Column:
    if column.steps[0] == 0:
        return column
    first = float(column.values[0]) if value is None else value
    return Column(steps=np.insert(column.steps, 0, 0), values=np.insert(column.values, 0, first))


def _engine(metrics: Mapping[str, Column], marks: Sequence[Mark]) -> tuple[Piece, ...]:
    panels = [
        Panel(
            title=title,
            log=log,
            lines=tuple(
                _line(
                    name.removeprefix("train/").replace("_", " "),
                    metrics[name],
                    smooth=0.0 if name == "train/lr" else _half_life(metrics[name]),
                )
                for name in names
                if name in metrics
            ),
        )
        for title, names, log in _ENGINE_PANELS
    ]
    panels = [panel for panel in panels if panel.lines]
    return (Figure(svg=draw(panels, marks, columns=2, height_in=2.5)),) if panels else ()


def _grids(folder: Path, marks: Sequence[Mark]) -> tuple[Piece, ...]:
    """Each kind of grid (what follows the step in its name) as a row of pictures, first and last always among them."""
    kinds: dict[str, list[tuple[int, Path]]] = {}
    for file in sorted(folder.glob("step-*.png")) if folder.is_dir() else []:
        match = _GRID.match(file.name)
        if match:
            kinds.setdefault(match[2], []).append((int(match[1]), file))
    pieces: list[Piece] = []
    for kind, found in sorted(kinds.items()):
        found.sort()
        chosen = sorted(set(np.linspace(0, len(found) - 1, min(len(found), _GRIDS_SHOWN)).round().astype(int).tolist()))
        left_out = f" ({len(chosen)} of {len(found)} grids shown)" if len(chosen) < len(found) else ""
        pieces.append(Paragraph(text=f"{kind or 'fixed prompts, fixed seeds'}{left_out}"))
        pictures = tuple(Picture.read(found[i][1], _grid_caption(found[i][0], marks)) for i in chosen)
        pieces.append(Pictures(pictures=pictures, columns=_columns(pictures)))
    return tuple(pieces)


def _columns(pictures: Sequence[Picture]) -> int:
    """As many side by side as the widest allows at its own size."""
    from PIL import Image

    widest = max(Image.open(io.BytesIO(picture.data)).width for picture in pictures)
    return max(1, min(len(pictures), 4, _PAGE_PX // widest))


def _grid_caption(step: int, marks: Sequence[Mark]) -> str:
    phase = [mark.label for mark in marks if mark.step <= step]
    return f"step {step:,}" + (f", {phase[-1]}" if phase else "")


def _settings(run_dir: Path) -> tuple[Piece, ...]:
    files = (("config.yaml", "Resolved config"), ("environment.json", "Environment"))
    return tuple(
        Code(text=(run_dir / name).read_text(encoding="utf-8"), summary=f"{title} ({name})")
        for name, title in files
        if (run_dir / name).is_file()
    )


def _line(
    label: str,
    column: Column,
    *,
    colour: str | None = None,
    dashed: bool = False,
    strong: bool = False,
    smooth: float = 0.0,
) -> Line:
    return Line(
        label=label,
        steps=column.steps,
        values=column.values,
        colour=colour,
        dashed=dashed,
        strong=strong,
        smooth=smooth,
    )


def _phases_note(metrics: Mapping[str, Column]) -> str:
    phase = metrics.get("train/phase")
    count = len(np.unique(phase.values)) if phase is not None else 1
    return f"{count} phases" if count > 1 else ""


def _epochs_note(metrics: Mapping[str, Column]) -> str:
    return f"epoch {int(metrics['train/epoch'].values[-1]) + 1}" if "train/epoch" in metrics else ""


def _held_out_figure(metrics: Mapping[str, Column]) -> KeyFigure:
    """The last held-out loss, beside the starting model's on the same samples."""
    now = float(metrics["eval/loss"].values[-1])
    note = f"at step {int(metrics['eval/loss'].steps[-1]):,}"
    if "eval/start_loss" in metrics:
        start = float(metrics["eval/start_loss"].values[-1])
        note = f"starting model {show(start)}" + (": it was better" if start < now else "")
    return KeyFigure(label="held-out loss", value=show(now), note=note)


def _half_life(column: Column) -> float:
    """Smoothing that grows with the curve; a short one is shown as it is, since a mean would lag behind it."""
    return len(column.steps) / 40 if len(column.steps) >= 40 else 0.0


def _tail(column: Column) -> float:
    return float(np.nanmean(column.values[-max(1, len(column.values) // 10) :]))


def _median(column: Column) -> float:
    return float(np.nanmedian(column.values))
