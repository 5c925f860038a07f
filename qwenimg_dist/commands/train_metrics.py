"""The figures of a training as Ray metrics, for the Prometheus endpoint that Ray has on each node.

Place in the flow: rank 0's process makes one and hands `set` to the consumers as a hook (`Hooks.observe`), who know no
Ray. Names in Ray: `qwenimg_dist_train_step`, `..._loss`, `..._images_per_second`, `..._data_wait_share` and the others
below, each with the tag `run`: the run directory's name. A figure that is not finite is not passed on: the last one
stays, and `..._skipped_steps` counts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Final

from ray.util.metrics import Gauge

PREFIX: Final = "qwenimg_dist_train"
FIGURES: Final[Mapping[str, tuple[str, str]]] = {
    "train/step": ("step", "steps done"),
    "train/images": ("images", "pictures trained on"),
    "train/loss": ("loss", "mean loss of the last logged step"),
    "train/grad_norm": ("grad_norm", "norm of the gradients before clipping"),
    "train/images_per_s": ("images_per_second", "pictures per second of all ranks since the last log"),
    "train/step_s": ("step_seconds", "seconds per step since the last log"),
    "train/data_wait_s": ("data_wait_seconds", "seconds per step that the slowest rank waited for data"),
    "train/data_wait_share": ("data_wait_share", "share of the time that the slowest rank waited for data"),
    "train/mfu": ("mfu", "share of the devices' peak that did useful work"),
    "train/skipped_steps": ("skipped_steps", "steps that were not finite on some rank"),
    "train/bad_samples": ("bad_samples", "samples that could not be read"),
    "eval/loss": ("held_out_loss", "held-out loss at the last evaluation"),
    "checkpoint/step": ("last_checkpoint_step", "step of the newest checkpoint"),
}
"""Key of the log -> name and what it is."""
_SAVED: Final = "checkpoint/step"


class TrainGauges:
    """Of one run. Needs a Ray that is initialised: a worker process of it."""

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}
        self._gauges = {
            key: Gauge(f"{PREFIX}_{name}", told, tag_keys=("run",)) for key, (name, told) in FIGURES.items()
        }
        told = "time of the newest checkpoint (Unix seconds)"
        self._saved_at = Gauge(f"{PREFIX}_last_checkpoint_time", told, tag_keys=("run",))

    def set(self, figures: Mapping[str, float]) -> None:
        """Pass on those that are known here."""
        for key, value in figures.items():
            if (gauge := self._gauges.get(key)) is not None and math.isfinite(value):
                gauge.set(value, tags=self._tags)
        if _SAVED in figures:
            self._saved_at.set(time.time(), tags=self._tags)
