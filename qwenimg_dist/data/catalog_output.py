"""What a catalog is made into, and how that is committed: arrays as `.npy`, a head, the list of parts, one rename.

Place in the flow: `catalog_build.py`, `catalog_captions.py` and `catalog_latents.py` fill an `Output`; nothing of it is
visible under its final name before all of it is there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qwenimg_dist.data.catalog import HEAD, Ints
from qwenimg_dist.data.part_tables import (
    FacetTable,
)
from qwenimg_dist.data.pins import (
    Pin,
    pin_to_json,
)
from qwenimg_dist.debug import fault_point
from qwenimg_dist.files import fsync_dir, temporary_name

PARTS: Final = "parts.json"


@dataclass(kw_only=True)
class Output:
    """What will be written."""

    arrays: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    head: dict[str, Any] = field(default_factory=dict)
    tars: list[tuple[str, str, int]] = field(default_factory=list)

    def add_tars(self, facet: FacetTable) -> dict[str, int]:
        """Number the facet's tars; returns name -> number."""
        numbers = {}
        for name in sorted(facet.tars):
            numbers[name] = len(self.tars)
            self.tars.append((facet.name, name, facet.tars[name]))
        return numbers


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Kept rows in listing order."""

    rows: Ints
    units: npt.NDArray[np.int32]
    keys: npt.NDArray[np.bytes_]
    table: pa.Table


def commit(out: Output, pins: Sequence[Pin], folder: Path) -> None:
    """Write under a temporary name, fsync, rename. A crash leaves no half catalog under the final name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(folder)
    temporary.mkdir()
    try:
        for name, array in out.arrays.items():
            _write(temporary / f"{name}.npy", partial(np.save, arr=array, allow_pickle=False))
        _write(temporary / PARTS, lambda sink: sink.write(json.dumps([pin_to_json(pin) for pin in pins]).encode()))
        _write(temporary / HEAD, lambda sink: sink.write(json.dumps(out.head, sort_keys=True).encode()))
        fsync_dir(temporary)
        if folder.exists():
            # Left by an attempt that died before it recorded its generation: nobody reads it.
            shutil.rmtree(folder)
        os.rename(temporary, folder)
        fsync_dir(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(file: Path, write: Callable[[Any], Any]) -> None:
    fault_point("catalog_write")
    with open(file, "wb") as sink:
        write(sink)
        sink.flush()
        os.fsync(sink.fileno())
