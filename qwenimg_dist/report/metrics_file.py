"""Reads a run's `metrics.jsonl` back into columns.

A line is one JSON object with `step` and numbers; 100,000 of them with 30 numbers take some 50 MB here. The last line
may be torn (the run is at work, or was killed); any other damage is refused.
"""

from __future__ import annotations

import json
import math
from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class Column:
    """One metric over the steps at which it was logged."""

    steps: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]


def read_metrics(file: Path) -> dict[str, Column]:
    """Metric name -> column, steps ascending. A missing file gives no columns. Raises ValueError naming the line."""
    steps: defaultdict[str, array[int]] = defaultdict(lambda: array("q"))
    values: defaultdict[str, array[float]] = defaultdict(lambda: array("d"))
    for step, entry in read_lines(file):
        for name, value in entry.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                steps[name].append(step)
                values[name].append(float(value))
            elif value is None or value in ("NaN", "Infinity", "-Infinity"):
                steps[name].append(step)
                values[name].append(math.nan)
    return {name: _column(steps[name], values[name]) for name in steps}


def read_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(step, object) of each whole line; nothing if the file is missing. Raises ValueError naming a damaged line."""
    if not file.is_file():
        return
    with open(file, "rb") as source:
        for number, line in enumerate(source, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                step = int(entry["step"])
            except (ValueError, KeyError, TypeError) as error:
                if not line.endswith(b"\n"):  # still being written
                    return
                raise ValueError(f"{file}, line {number} is damaged ({error!r}); remove the line") from error
            yield step, entry


def _column(steps: array[int], values: array[float]) -> Column:
    order = np.argsort(np.array(steps, dtype=np.int64), kind="stable")
    return Column(
        steps=np.array(steps, dtype=np.int64)[order],
        values=np.array(values, dtype=np.float64)[order],
    )
