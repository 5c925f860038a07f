"""The report of a training run: one HTML file with curves, grids, funnel, faults, checkpoints and settings.

    qwenimg-dist report run.path=RUN [data.path=DATA]

Written to RUN/report.html, also while the run is at work; `train` writes it at checkpoints and at its end
(`train.report`). DATA is what the run was trained on, unless it was moved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from qwenimg_dist.commands.inputs import required
from qwenimg_dist.compose import load_config
from qwenimg_dist.report.run_report import write_run_report

SUMMARY: Final = "write a run's report.html: curves, grids, funnel, faults, checkpoints"


def run(args: list[str]) -> int:
    """Write the report and print where. Raises ValueError if run.path is no run directory."""
    config = load_config(args)
    run_dir = Path(required(config.run.path, "run.path"))
    data = [Path(config.data.path)] if config.data.path else None
    print(write_run_report(run_dir, data))
    return 0
