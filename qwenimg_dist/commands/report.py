"""The report of a training run: one HTML file with curves, grids, funnel, faults, checkpoints and settings.

    qwenimg-dist report run.path=RUN [data.path=DATA]
    qwenimg-dist report dashboard [logger.project=PROJECT]      a view of it in W&B, made anew each time

Written to RUN/report.html, also while the run is at work; `train` writes it at checkpoints and at its end
(`train.report`). DATA is what the run was trained on, unless it was moved. The dashboard needs the extra `dashboard`,
an account (WANDB_API_KEY) and the network; its panels are those of `report/wandb_dashboard.py`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from qwenimg_dist.commands.inputs import required
from qwenimg_dist.compose import load_config
from qwenimg_dist.data.mirror import data_root
from qwenimg_dist.report.run_report import write_run_report

SUMMARY: Final = "write a run's report.html: curves, grids, funnel, faults, checkpoints"


def run(args: list[str]) -> int:
    """Write the report and print where. Raises ValueError if run.path is no run directory."""
    if args[:1] == ["dashboard"]:
        return _dashboard(args[1:])
    config = load_config(args)
    run_dir = Path(required(config.run.path, "run.path"))
    data = [data_root(config.data.path, config.data)] if config.data.path else None
    print(write_run_report(run_dir, data))
    return 0


def _dashboard(args: list[str]) -> int:
    from qwenimg_dist.report.wandb_dashboard import build_dashboard

    view = build_dashboard(load_config(args).logger.project, os.environ.get("WANDB_ENTITY", ""))
    try:
        print(view.save().url)
    except Exception as error:  # its own kinds of network and login errors
        raise ValueError(
            f"W&B does not take the dashboard ({type(error).__name__}: {error}): log in (WANDB_API_KEY), and name the "
            "team by WANDB_ENTITY"
        ) from error
    return 0
