"""`ckpt list`: one line per checkpoint, with what its certificate says, and the chain of stages it came out of.

`vs stock` is the largest absolute difference of one forward from stock diffusers (see `consumers/certificate.py`), in
brackets how large velocities were. Sizes and manifests are checked, bytes are not; that is `ckpt verify`.
"""

from __future__ import annotations

import contextlib
import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenimg_dist.report.lineage import lineage_tables
from qwenimg_dist.report.run_events import difference_text, lineage_text
from qwenimg_dist.report.table import Table

if TYPE_CHECKING:
    from consumers.checkpoint_files import CheckpointInfo

_COLUMNS = ("step", "written", "ranks", "GB", "images", "data", "started from", "vs stock", "state")


def checkpoint_table(run_dir: Path) -> Table:
    """The checkpoints of a run by step, valid or not."""
    from consumers.checkpoint_files import list_checkpoints

    return Table(title=str(run_dir), columns=_COLUMNS, rows=tuple(_row(info) for info in list_checkpoints(run_dir)))


def lineage_of_run(run_dir: Path) -> list[Table]:
    """What the run came from: one table, or several where its checkpoints differ in that (`model.path` was moved)."""
    from consumers.checkpoint_files import CheckpointError, list_checkpoints, read_certificate

    found: dict[int, dict[str, Any]] = {}
    for info in list_checkpoints(run_dir):
        with contextlib.suppress(CheckpointError):  # the list says so
            found[info.step] = read_certificate(info.path) or {}
    return lineage_tables(found)


def _row(info: CheckpointInfo) -> tuple[str, ...]:
    from consumers.checkpoint_files import CheckpointError, read_certificate

    state, told = info.fault or "valid", dict[str, Any]()
    try:
        told = read_certificate(info.path) or {}
    except CheckpointError as error:
        state = info.fault or str(error)
    return (
        str(info.step),
        _written(info.path),
        str(info.num_ranks),
        f"{info.size_bytes / 1e9:.3f}",
        f"{told['images']:,}" if "images" in told else "-",
        str(told.get("data", {}).get("fingerprint", "-")),
        lineage_text(told.get("lineage")),
        difference_text(told.get("parity")),
        state,
    )


def _written(path: Path) -> str:
    try:
        moment = (path / "manifest.json").stat().st_mtime
    except OSError:
        return "-"
    return datetime.datetime.fromtimestamp(moment, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
