"""How a run stands, from outside: phase, step, rate, time left, checkpoints, what it survived, and its data.

Place in the flow: reads the ends of a run directory's files and counts file names of its data sets, so it takes
milliseconds on a run of months, on any machine that sees the storage, with no Ray and no torch. Refuses nothing that is
merely missing: a run that has just started has little to say. It cannot know whether a process is alive; it says when
something was last written.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from omegaconf import OmegaConf

from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.data.mirror import data_dir
from qwenimg_dist.metrics import last_entries
from qwenimg_dist.report.run_events import last_warnings, num_restarts
from qwenimg_dist.report.run_report import data_paths
from qwenimg_dist.report.table import Table, show_time
from qwenimg_dist.schema import LISTING, ROWS, SOURCE_COMPLETE

_RECENT: Final = 50
"""Logged steps that the rate is the median of."""
_SIGNS: Final = ("train.log", "metrics.jsonl", "samples.jsonl", "bad_samples.jsonl", "starts.jsonl")


@dataclass(frozen=True, kw_only=True)
class DataStatus:
    """How far a data set is produced."""

    path: str
    units_listed: int
    units_done: int
    """With rows committed; units that a changed config would do again count as done."""
    source_complete: bool


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """What `run status` shows, and prints as JSON; None where nothing was logged yet."""

    run: str
    stage: str | None
    model: str | None
    complete: bool
    step: int
    steps: int | None
    phase: str | None
    resolution: int | None
    loss: float | None
    held_out: float | None
    held_out_at_start: float | None
    step_s: float | None
    images_per_s: float | None
    data_wait_share: float | None
    left_s: float | None
    """At the present rate: a later phase at another resolution has another."""
    last_checkpoint: int | None
    checkpoint_age_s: float | None
    checkpoints: int
    restarts: int
    skipped_steps: int
    bad_samples: int
    silent_s: float | None
    """Since anything was written."""
    warnings: tuple[str, ...]
    data: tuple[DataStatus, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> Table:
        """The same for a reader."""
        return Table(title=f"Run {self.run}", columns=("", ""), rows=tuple(self._rows()))

    def _rows(self) -> list[tuple[str, str]]:
        def known(value: float | None, shown: str) -> str:
            return "-" if value is None else shown.format(value)

        share = f" ({self.step / self.steps:.0%})" if self.steps else ""
        beside = f" (at the start {self.held_out_at_start:.4f})" if self.held_out_at_start is not None else ""
        saved = "none yet"
        if self.checkpoint_age_s is not None:
            saved = f"step {self.last_checkpoint}, {show_time(self.checkpoint_age_s)} ago, {self.checkpoints} kept"
        rows = [
            ("stage", f"{self.stage or '-'} of {self.model or '-'}"),
            ("step", f"{self.step:,} of {self.steps or 0:,}{share}{', complete' if self.complete else ''}"),
            ("phase", f"{self.phase or '-'}" + (f", {self.resolution} px" if self.resolution else "")),
            ("loss", known(self.loss, "{:.4f}")),
            ("held-out loss", known(self.held_out, "{:.4f}") + beside),
            (
                "rate",
                ", ".join([known(self.step_s, "{:.2f} s per step"), known(self.images_per_s, "{:,.1f} images/s")]),
            ),
            ("waiting for data", known(self.data_wait_share, "{:.1%} of the time")),
            ("left", "-" if self.left_s is None else f"{show_time(self.left_s)} at this rate"),
            ("last checkpoint", saved),
            (
                "survived",
                f"{self.restarts} restarts, {self.skipped_steps} skipped steps, {self.bad_samples} bad samples",
            ),
            ("last sign of life", f"{show_time(self.silent_s)} ago" if self.silent_s is not None else "none yet"),
        ]
        for one in self.data:
            state = "the source is complete" if one.source_complete else "more may come"
            rows.append(("data", f"{one.path}: {one.units_done:,} of {one.units_listed:,} units, {state}"))
        return [*rows, *(("warning", line) for line in self.warnings)]


def run_status(run_dir: Path, now: float | None = None) -> RunStatus:
    """Read it. Raises ValueError if `run_dir` is no run directory."""
    now = time.time() if now is None else now
    file = run_dir / "config.yaml"
    if not file.is_file():
        begun = run_dir.is_dir()  # by `train` or `run`, before there are units to train on and ranks
        told = ": its ranks have not begun yet, see the job's log" if begun else ", and no folder: is run.path right?"
        raise ValueError(f"{run_dir} is not a run directory (no config.yaml){told}")
    config = OmegaConf.load(file)
    recent = last_entries(run_dir / "metrics.jsonl", _RECENT)
    last: Mapping[str, Any] = recent[-1] if recent else {}
    evaluated: Mapping[str, Any] = next((one for one in reversed(recent) if "eval/loss" in one), {})
    steps = OmegaConf.select(config, "train.steps")
    step = int(last.get("step", 0))
    step_s = _median(recent, "train/step_s", last)
    saved = _checkpoints(run_dir)
    return RunStatus(
        run=str(run_dir),
        stage=OmegaConf.select(config, "stage"),
        model=OmegaConf.select(config, "model.name"),
        complete=steps is not None and step >= int(steps) and step in saved,
        step=step,
        steps=None if steps is None else int(steps),
        phase=_phase(run_dir, step),
        resolution=last.get("train/resolution"),
        loss=last.get("train/loss"),
        held_out=evaluated.get("eval/loss"),
        held_out_at_start=evaluated.get("eval/start_loss"),
        step_s=step_s,
        images_per_s=_median(recent, "train/images_per_s", last),
        data_wait_share=_median(recent, "train/data_wait_share", last),
        left_s=None if step_s is None or steps is None else max(0, int(steps) - step) * step_s,
        last_checkpoint=max(saved, default=None),
        checkpoint_age_s=now - saved[max(saved)] if saved else None,
        checkpoints=len(saved),
        restarts=num_restarts(run_dir),
        skipped_steps=int(last.get("train/skipped_steps", 0)),
        bad_samples=int(last.get("train/bad_samples", 0)),
        silent_s=_silent_s(run_dir, now),
        warnings=tuple(last_warnings(run_dir)[-3:]),
        data=tuple(_data(path) for path in data_paths(config, data_dir) if (path / "dataset.json").is_file()),
    )


def _median(recent: Sequence[Mapping[str, Any]], name: str, last: Mapping[str, Any]) -> float | None:
    """Of the entries at the last one's resolution: a phase before it had another rate."""
    same = [one for one in recent if one.get("train/resolution") == last.get("train/resolution")]
    values = [float(one[name]) for one in same if one.get(name) is not None]
    return statistics.median(values) if values else None


def _phase(run_dir: Path, step: int) -> str | None:
    """The phase that the next step belongs to, by the plan that the run began with."""
    try:
        phases = json.loads((run_dir / "plan.json").read_text(encoding="utf-8"))["phases"]
        reached = [str(one["name"]) for one in phases if int(one["first_step"]) <= step]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return reached[-1] if reached else None


def _checkpoints(run_dir: Path) -> dict[int, float]:
    """Step -> when it was committed."""
    found = {}
    for manifest in (run_dir / "checkpoints").glob("step-*/manifest.json"):
        with contextlib.suppress(FileNotFoundError):  # retired meanwhile
            found[int(manifest.parent.name.removeprefix("step-"))] = manifest.stat().st_mtime
    return found


def _silent_s(run_dir: Path, now: float) -> float | None:
    written = [file.stat().st_mtime for name in _SIGNS if (file := run_dir / name).is_file()]
    return max(0.0, now - max(written)) if written else None


def _data(path: Path) -> DataStatus:
    dataset = Dataset(path, unit_size=0)  # not opened: of a bucket's data set, what lies here is counted
    return DataStatus(
        path=str(path),
        units_listed=len(dataset.units(LISTING)),
        units_done=len(dataset.units(ROWS)),
        source_complete=(path / SOURCE_COMPLETE).is_file(),
    )
