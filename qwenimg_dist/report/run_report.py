"""The report of a training run, one file that opens without network: `RUN/report.html`.

    write_run_report(run_dir)                 # what `qwenimg-dist report` and the trainer's rank 0 do
    run_sections(run_dir, [data])             # the sections alone, for a report of one's own (the demo's)

Place in the flow: reads a run directory (`metrics.jsonl`, `samples/`, `checkpoints/`, `config.yaml`, ...) and the data
sets that its config names, whatever of them there is; `page.write_report` makes a file of the sections. Invents
nothing; may be made while the run is at work, and knows neither torch nor the trainer, so that it costs seconds.
The tables of a data set are kept in `.report-data.json`, since a million rows take longer to count than to draw.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from omegaconf import OmegaConf

from qwenimg_dist.config import stable_hash
from qwenimg_dist.config.data import DataConfig
from qwenimg_dist.data.facets import DataError, Dataset
from qwenimg_dist.data.mirror import data_root
from qwenimg_dist.files import write_json
from qwenimg_dist.report import run_curves, run_events
from qwenimg_dist.report.curves import Mark
from qwenimg_dist.report.funnel import funnel
from qwenimg_dist.report.metrics_file import Column, read_metrics
from qwenimg_dist.report.page import (
    Code,
    KeyFigure,
    KeyFigures,
    Paragraph,
    Picture,
    Pictures,
    Piece,
    Section,
    write_report,
)
from qwenimg_dist.report.stats import stats
from qwenimg_dist.report.table import Table, show

REPORT: Final = "report.html"
_DATA_CACHE: Final = ".report-data.json"
_GRID: Final = re.compile(r"^step-(\d+)-?(.*)\.png$")
_GRIDS_SHOWN: Final = 12
_PAGE_PX: Final = 1032  # width of the report's column


def write_run_report(run_dir: Path, data: Sequence[Path] | None = None) -> Path:
    """Write `RUN/report.html`; the data sets are those of the run's config unless given. Raises ValueError if `run_dir`
    is no run directory, or its metrics are damaged.
    """
    config = _config(run_dir)
    if not config and not (run_dir / "metrics.jsonl").is_file():
        raise ValueError(f"{run_dir} is not a run directory (neither config.yaml nor metrics.jsonl)")
    sections = run_sections(run_dir, data_paths(config) if data is None else data)
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    model, stage = OmegaConf.select(config, "model.name"), OmegaConf.select(config, "stage")
    subtitle = ", ".join(str(word) for word in (model, stage, f"written {now}") if word)
    write_report(run_dir / REPORT, title=f"Run {run_dir.resolve().name}", subtitle=subtitle, sections=sections)
    return run_dir / REPORT


def run_sections(run_dir: Path, data: Sequence[Path] = ()) -> list[Section]:
    """Sections for `write_report`; what is not there is left out. Raises ValueError for damaged metrics."""
    metrics = read_metrics(run_dir / "metrics.jsonl")
    config = _config(run_dir)
    marks = run_curves.phase_marks(metrics, _phase_names(config))
    sections = [
        Section(title="Run", pieces=_overview(run_dir, metrics, config)),
        Section(title="Loss", pieces=(*run_curves.losses(metrics, marks), *run_events.worst_samples(run_dir))),
        Section(title="Rewards", pieces=run_curves.rewards(metrics, marks)),
        Section(title="Samples along the way", pieces=_grids(run_dir / "samples", marks)),
        Section(title="Steps and speed", pieces=run_curves.engine(metrics, marks)),
        Section(title="Faults survived", pieces=run_events.events(run_dir, metrics)),
        Section(title="Checkpoints", pieces=run_events.checkpoints(run_dir)),
        *data_sections(data, run_dir / _DATA_CACHE),
        Section(title="Settings and versions", pieces=_settings(run_dir)),
    ]
    return [section for section in sections if section.pieces]


def data_paths(config: Any, place: Callable[[str, DataConfig], Path] = data_root) -> list[Path]:
    """The data sets that a run reads: those of `data.mix`, else `data.path`; each once. `place` says where one is."""
    mix = OmegaConf.select(config, "data.mix") or {}
    found = [one.get("path") for one in mix.values()] or [OmegaConf.select(config, "data.path")]
    kept = {key: OmegaConf.select(config, f"data.{key}") for key in ("cache", "cache_bytes")}
    data = DataConfig.model_validate({key: value for key, value in kept.items() if value is not None})
    return list(dict.fromkeys(place(str(path), data) for path in found if path))


def data_sections(data: Sequence[Path], cache: Path | None = None) -> list[Section]:
    """Funnel and buckets of each data set; where one cannot be read, that is said instead."""
    sections = []
    for path in data:
        title = "Data" if len(data) == 1 else f"Data: {path.name}"
        try:
            pieces: tuple[Piece, ...] = (Paragraph(text=str(path)), *_data_tables(path, cache))
        except (DataError, OSError) as problem:
            pieces = (Paragraph(text=f"{path} could not be read: {problem}"),)
        sections.append(Section(title=title, pieces=pieces))
    return sections


def _data_tables(path: Path, cache: Path | None) -> list[Table]:
    """Counted anew only when parts were added or removed since."""
    dataset = Dataset.open(path)
    dataset.refresh()
    parts = {facet: [dataset.parquet(part).name for part in dataset.parts(facet)] for facet in dataset.facets()}
    state = stable_hash([str(path.resolve()), {facet: sorted(names) for facet, names in parts.items()}])
    kept: dict[str, Any] = {}
    if cache is not None:
        with contextlib.suppress(OSError, ValueError):
            kept = json.loads(cache.read_text(encoding="utf-8"))
    if state in kept:
        return [
            Table(title=one["title"], columns=tuple(one["columns"]), rows=tuple(tuple(row) for row in one["rows"]))
            for one in kept[state]
        ]
    tables = [*funnel(dataset).tables(), *stats(dataset).tables()]
    if cache is not None:
        plain = [{"title": one.title, "columns": one.columns, "rows": one.rows} for one in tables]
        with contextlib.suppress(OSError):  # a full disk must not cost the report
            write_json(cache, {**dict(list(kept.items())[-7:]), state: plain})
    return tables


def _config(run_dir: Path) -> Any:
    """The run's resolved config; an empty one where there is none."""
    file = run_dir / "config.yaml"
    return OmegaConf.load(file) if file.is_file() else OmegaConf.create({})


def _phase_names(config: Any) -> list[str]:
    phases = OmegaConf.select(config, "curriculum.phases")
    return [str(phase.get("name") or f"phase {i}") for i, phase in enumerate(phases or ())]


def _overview(run_dir: Path, metrics: Mapping[str, Column], config: Any) -> tuple[Piece, ...]:
    if "train/loss" not in metrics:
        return (Paragraph(text="No step was logged yet."),)
    loss = metrics["train/loss"]
    planned, done = OmegaConf.select(config, "train.steps"), int(loss.steps[-1])
    notes = [f"of {int(planned):,}" if planned and done < int(planned) else "", _phases_note(metrics)]
    figures = [
        KeyFigure(label="steps", value=f"{done:,}", note=", ".join(note for note in notes if note)),
        KeyFigure(label="training loss", value=show(_tail(loss)), note="mean of the last tenth"),
    ]
    if "eval/loss" in metrics:
        figures.append(_held_out_figure(metrics))
    for name, label in (("train/images_per_s", "images per second"), ("train/tokens_per_s", "tokens per second")):
        if name in metrics:
            figures.append(KeyFigure(label=label, value=show(_median(metrics[name])), note="median"))
    for name, label in (("train/mfu", "FLOPs utilisation"), ("train/data_wait_share", "waiting for data")):
        if name in metrics:
            figures.append(KeyFigure(label=label, value=f"{_median(metrics[name]):.1%}", note="median"))
    if "train/images" in metrics:
        seen = int(metrics["train/images"].values[-1])
        figures.insert(1, KeyFigure(label="images seen", value=f"{seen:,}", note=_epochs_note(metrics)))
    skipped = metrics.get("train/skipped_steps")
    if skipped is not None and skipped.values[-1] > 0:
        figures.append(KeyFigure(label="skipped steps", value=show(int(skipped.values[-1])), note="not finite"))
    if restarts := run_events.num_restarts(run_dir):
        figures.append(KeyFigure(label="restarts", value=show(restarts), note="went on from a checkpoint"))
    return (KeyFigures(figures=tuple(figures)),)


def _grids(folder: Path, marks: Sequence[Mark]) -> tuple[Piece, ...]:
    """Each kind of grid (what follows the step in its name) as a row of pictures, first and last always among them."""
    kinds: dict[str, list[tuple[int, Path]]] = {}
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(folder)):
            if match := _GRID.match(name):
                kinds.setdefault(match[2], []).append((int(match[1]), folder / name))
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
    files = (("config.yaml", "Resolved config"), ("environment.json", "Environment and versions"))
    return tuple(
        Code(text=(run_dir / name).read_text(encoding="utf-8"), summary=f"{title} ({name})")
        for name, title in files
        if (run_dir / name).is_file()
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


def _tail(column: Column) -> float:
    return float(np.nanmean(column.values[-max(1, len(column.values) // 10) :]))


def _median(column: Column) -> float:
    return float(np.nanmedian(column.values))
