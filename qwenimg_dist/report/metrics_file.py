"""Reads a run's `metrics.jsonl` back into columns.

A line is one JSON object with `step` and numbers. The last line may be torn (the run is at work, or was killed); any
other damage is refused.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class Column:
    """One metric over the steps at which it was logged."""

    steps: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]


def read_metrics(file: Path) -> dict[str, Column]:
    """Metric name -> column, steps ascending. A missing file gives no columns. Raises ValueError naming the line."""
    if not file.is_file():
        return {}
    steps: defaultdict[str, list[int]] = defaultdict(list)
    values: defaultdict[str, list[float]] = defaultdict(list)
    lines = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            step = int(entry["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # no newline after it: still being written
                break
            raise ValueError(f"{file}, line {number} is damaged ({error!r}); remove the line") from error
        for name, value in entry.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                steps[name].append(step)
                values[name].append(float(value))
            elif value is None or value in ("NaN", "Infinity", "-Infinity"):
                steps[name].append(step)
                values[name].append(math.nan)
    return {name: _column(steps[name], values[name]) for name in steps}


def _column(steps: list[int], values: list[float]) -> Column:
    order = np.argsort(np.array(steps, dtype=np.int64), kind="stable")
    return Column(
        steps=np.array(steps, dtype=np.int64)[order],
        values=np.array(values, dtype=np.float64)[order],
    )
