"""The W&B dashboard as code: one saved view per project, with panels for training, validation, rewards, data, machines.

    build_dashboard(entity, project)            # the view; nothing is sent
    build_dashboard(...).save().url             # needs the network and an account

Place in the flow: `qwenimg-dist report dashboard`. Panels name metrics that runs log; tests hold the names to the
code that logs them. Needs the extra `dashboard` (wandb-workspaces).
"""

from __future__ import annotations

from typing import Any, Final

from qwenimg_dist.metrics import PRODUCE_STEP_KEY, STEP_KEY

PANELS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "Is it getting better": {
        "training loss": ("train/loss",),
        "held-out loss, and the starting model's": ("eval/loss", "eval/start_loss"),
        "held-out loss by sigma": ("eval/loss_q0.1", "eval/loss_q0.5", "eval/loss_q0.9"),
    },
    "Preferences": {
        "implicit accuracy": ("train/implicit_accuracy",),
        "winner's error and the reference's": ("train/winner_error", "train/winner_reference_error"),
        "margin": ("train/margin",),
    },
    "Rewards": {
        "reward": ("reward/total",),
        "spread within groups": ("reward/group_std",),
        "failed, timed out": ("reward/failures", "reward/timeouts"),
    },
    "Steps": {
        "gradient norm": ("train/grad_norm",),
        "learning rate": ("train/lr",),
        "resolution": ("train/resolution",),
        "skipped steps, bad samples": ("train/skipped_steps", "train/bad_samples"),
    },
    "Speed": {
        "images per second": ("train/images_per_s",),
        "model TFLOP/s per device": ("train/model_tflops_per_s",),
        "MFU": ("train/mfu",),
        "share of the time spent waiting for data": ("train/data_wait_share",),
        "slowest and fastest rank, s per step": ("train/own_step_s_max", "train/own_step_s_min"),
        "memory, highest rank": ("train/memory_gb", "train/host_memory_gb"),
    },
    "Producing": {
        "images per second": ("produce/images_per_s",),
        "units left": ("produce/units_left",),
        "rows kept, not admitted": ("produce/kept", "produce/not_admitted"),
    },
}
"""Section -> panel's title -> metrics in it."""


def build_dashboard(project: str, entity: str = "", name: str = "qwenimg-dist") -> Any:
    """A `wandb_workspaces.workspaces.Workspace`. Raises ValueError if the extra is not installed."""
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise ValueError("the dashboard needs wandb-workspaces: pip install 'qwenimg-dist[dashboard]'") from error
    sections = []
    for title, plots in PANELS.items():
        axis = PRODUCE_STEP_KEY if title == "Producing" else STEP_KEY
        lines = [panels.LinePlot(title=plot, x=axis, y=list(metrics)) for plot, metrics in plots.items()]
        sections.append(workspaces.Section(name=title, panels=lines, is_open=True))
    pictures = panels.MediaBrowser(
        title="grids", media_keys=["eval/samples", "eval/samples-raw", "eval/edits", "eval/groups"]
    )
    sections.insert(1, workspaces.Section(name="Grids", panels=[pictures], is_open=True))
    return workspaces.Workspace(entity=entity, project=project, name=name, sections=sections)
