"""The figures of `produce` in W&B, in the group of the run that trains on them.

Place in the flow: the driver's process makes one where `logger` asks for it, beside the Ray gauges; both are told by
the progress display. Over units brought up to date by this start: pictures opened and kept, reasons, rate, what is
left; at the end the funnel as a table. Refuses to fail producing: a tracker that is lost, or does not start again, is
said once and left out.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from producers.unit import UnitReport
from qwenimg_dist.config import LoggerConfig
from qwenimg_dist.metrics import PRODUCE_STEP_KEY, Wandb
from qwenimg_dist.report.table import Table

_EVERY_S: Final = 10.0
"""A curve needs no point per unit, and a server none per second."""


def start_tracking(config: LoggerConfig, folder: Path, *, group: str, say: Callable[[str], None]) -> WandbGauges | None:
    """Offline files go to `folder`. Where W&B does not start, a first start says so (ValueError); producing that was
    tracked before, as the folder tells, goes on without, as training does: None, and a line."""
    is_first = not folder.exists()
    folder.mkdir(exist_ok=True)
    try:
        return WandbGauges(config, folder, group=group)
    except ValueError as error:
        if is_first:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        say(f"warning: {error}; producing goes on without it")
        return None


class WandbGauges:
    """`Gauges` of the progress display. Raises ValueError if W&B does not start."""

    def __init__(self, config: LoggerConfig, folder: Path, group: str) -> None:
        """Offline files go to `folder`."""
        try:
            self._wandb: Wandb | None = Wandb(
                config, folder, run_id=None, values={}, step_key=PRODUCE_STEP_KEY, group=group
            )
        except Exception as error:
            raise ValueError(
                f"W&B does not start ({type(error).__name__}: {error}): log in, or choose logger=offline or logger=off"
            ) from error
        self._units = self._opened = self._kept = 0
        self._reasons: Counter[str] = Counter()
        self._last = 0.0

    def unit_done(self, report: UnitReport) -> None:
        self._units += 1
        self._opened += report.decoded
        self._kept += report.num_kept
        self._reasons.update(report.reasons)

    def state(self, *, images_per_s: float, units_left: int, left_s: float) -> None:
        if units_left and time.monotonic() - self._last < _EVERY_S:
            return
        self._last = time.monotonic()
        values: dict[str, float] = {
            "images_per_s": images_per_s,
            "units_left": units_left,
            "left_s": left_s,
            "opened": self._opened,
            "kept": self._kept,
            "not_admitted": self._reasons.total(),
            **{f"not_admitted/{reason}": count for reason, count in self._reasons.items()},
        }
        self._guard(lambda wandb: wandb.log(self._units, {f"produce/{name}": value for name, value in values.items()}))

    def finish(self, tables: Sequence[Table]) -> None:
        """The data set's funnel and reasons as tables; ends the run in W&B."""
        for table in tables:
            self._guard(partial(self._log_table, table))
        self._guard(lambda wandb: wandb.close())
        self._wandb = None

    def _log_table(self, table: Table, wandb: Wandb) -> None:
        name = f"produce/{table.title.lower().replace(' ', '_')}"
        wandb.log_table(self._units, name, table.columns, table.rows)

    def _guard(self, action: Callable[[Wandb], None]) -> None:
        if self._wandb is None:
            return
        try:
            action(self._wandb)
        except Exception as error:  # a lost tracker must not cost what is being made
            sys.stderr.write(f"warning: W&B failed and is off from here on ({type(error).__name__}: {error})\n")
            self._wandb = None
