"""What happened to a run besides its numbers: starts and restarts, skipped steps, dumps, bad samples, checkpoints.

Place in the flow: `run_report` shows these pieces. Each reads one small file of the run directory, and gives nothing
where it is not there. Refuses to be stopped by a damaged record: the line or file is passed over, since a report of
faults must survive them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from qwenimg_dist.report.lineage import lineage_tables
from qwenimg_dist.report.metrics_file import Column
from qwenimg_dist.report.page import Code, Paragraph, Piece
from qwenimg_dist.report.table import Table, show

STARTS: Final = "starts.jsonl"
"""One line per start of the gang; the trainer's rank 0 appends it."""
_SHOWN: Final = 20
_LOG_BYTES: Final = 1 << 20
_LOG_LINES: Final = 40


def events(run_dir: Path, metrics: Mapping[str, Column]) -> tuple[Piece, ...]:
    """Faults that the run met, in words; and what it says of them itself."""
    pieces: list[Piece] = [*_starts(run_dir), *_skipped(metrics), *_dumps(run_dir), *_bad_samples(run_dir)]
    if not pieces:
        return ()
    return (*pieces, *_warnings(run_dir))


def checkpoints(run_dir: Path) -> tuple[Piece, ...]:
    """The committed checkpoints with what their certificates say."""
    rows = []
    certificates: dict[int, dict[str, Any]] = {}
    for manifest in sorted((run_dir / "checkpoints").glob("step-*/manifest.json")):
        told = _json(manifest.with_name("certificate.json")) or {}
        files = (_json(manifest) or {}).get("files", {})
        certificates[int(manifest.parent.name.removeprefix("step-"))] = told
        size = sum(int(entry.get("size_bytes", 0)) for entry in files.values())
        rows.append(
            (
                int(manifest.parent.name.removeprefix("step-")),
                str(told.get("created", "-")),
                f"{size / 1e9:.3f} GB",
                told.get("images"),
                str(told.get("data", {}).get("fingerprint", "-")),
                lineage_text(told.get("lineage")),
                difference_text(told.get("parity")),
            )
        )
    columns = ("step", "written", "size", "images", "data", "started from", "vs stock diffusers")
    table = Table(title="Checkpoints", columns=columns, rows=tuple(rows))
    note = (
        "The last column is the largest difference of one forward from stock diffusers (in brackets: how large "
        "velocities were). certificate.json of each checkpoint says what was compared."
    )
    return (table, Paragraph(text=note), *lineage_tables(certificates)) if rows else ()


def worst_samples(run_dir: Path) -> tuple[Piece, ...]:
    """The newest table of held-out samples with the largest errors."""
    newest: dict[str, Any] = {}
    for entry in _lines(run_dir / "tables.jsonl"):
        if entry.get("table") == "worst_held_out" and entry.get("rows"):
            newest = entry
    if not newest:
        return ()
    columns = tuple(newest["rows"][0])
    rows = tuple(tuple(row.get(name) for name in columns) for row in newest["rows"])
    title = f"Held-out samples with the largest loss or rise, step {newest.get('step')}"
    return (Table(title=title, columns=tuple(name.replace("_", " ") for name in columns), rows=rows),)


def lineage_text(lineage: Mapping[str, Any] | None) -> str:
    """The model that a run started from; for an export of ours, the step and run that it was."""
    if not lineage:
        return "-"
    named = f"{lineage.get('model')} {lineage.get('fingerprint')}"
    if lineage.get("revision"):
        named += f" ({str(lineage['revision'])[:12]})"
    parent = lineage.get("parent")
    return f"{named}, step {parent.get('step')} of {parent.get('run')}" if parent else named


def difference_text(parity: Mapping[str, Any] | None) -> str:
    """What a certificate measured, in a few characters."""
    if not parity:
        return "-"
    if not parity.get("measured"):
        return "not measured"
    return f"{parity['max_difference']:.1e} (of {parity['max_velocity']:.2g})"


def num_restarts(run_dir: Path) -> int:
    """Starts after the first one."""
    return max(0, sum(1 for _ in _lines(run_dir / STARTS)) - 1)


def _starts(run_dir: Path) -> Iterator[Piece]:
    starts = list(_lines(run_dir / STARTS))
    if len(starts) < 2:
        return
    rows = tuple(
        (number, str(one.get("time", "-")), int(one.get("step", 0)), int(one.get("ranks", 0)), _skipped_text(one))
        for number, one in enumerate(starts, start=1)
    )
    shown = rows if len(rows) <= _SHOWN else (*rows[: _SHOWN // 2], *rows[-_SHOWN // 2 :])
    title = f"Started {len(starts)} times" + (f" ({len(shown)} shown)" if len(shown) < len(rows) else "")
    yield Table(title=title, columns=("start", "time", "from step", "ranks", "checkpoints passed over"), rows=shown)


def _skipped_text(start: Mapping[str, Any]) -> str:
    return "; ".join(str(one) for one in start.get("skipped_checkpoints", ())) or "-"


def _skipped(metrics: Mapping[str, Column]) -> Iterator[Piece]:
    column = metrics.get("train/skipped_steps")
    if column is None or not len(column.values) or not np.nanmax(column.values) > 0:
        return
    rose = column.steps[np.flatnonzero(np.diff(column.values, prepend=0.0) > 0)].tolist()
    listed = ", ".join(show(int(step)) for step in rose[:_SHOWN]) + (", ..." if len(rose) > _SHOWN else "")
    count = int(np.nanmax(column.values))
    yield Paragraph(text=f"{count:,} step(s) were not finite and were skipped on all ranks, at {listed}.")


def _dumps(run_dir: Path) -> Iterator[Piece]:
    folders = sorted((run_dir / "faults").glob("step-*-rank-*"))
    rows = []
    for folder in folders[:_SHOWN]:
        told = _json(folder / "batch.json") or {}
        guilty = [
            str(one.get("key"))
            for one in told.get("samples", ())
            if one.get("latents_not_finite") or one.get("text_not_finite")
        ]
        where = f"{folder.parent.name}/{folder.name}"
        rows.append((told.get("step"), told.get("rank"), str(told.get("bucket", "-")), ", ".join(guilty) or "-", where))
    if rows:
        title = f"Batches dumped for a loss that was not finite ({len(folders)})"
        columns = ("step", "rank", "bucket", "samples not finite", "folder")
        yield Table(title=title, columns=columns, rows=tuple(rows))


def _bad_samples(run_dir: Path) -> Iterator[Piece]:
    found: dict[str, str] = {}
    for entry in _lines(run_dir / "bad_samples.jsonl"):
        for one in entry.get("samples", ()):
            found.setdefault(str(one.get("key")), str(one.get("problem", "")))
    if found:
        rows = tuple(list(found.items())[:_SHOWN])
        yield Table(title=f"Samples that could not be read ({len(found)})", columns=("key", "problem"), rows=rows)


def last_warnings(run_dir: Path) -> list[str]:
    """The last lines of the command's log that tell of something wrong, oldest first."""
    file = run_dir / "train.log"
    if not file.is_file():
        return []
    with open(file, "rb") as source:
        source.seek(max(0, file.stat().st_size - _LOG_BYTES))
        text = source.read().decode("utf-8", errors="replace")
    told = [one for one in text.splitlines() if "warning" in one.lower() or "error" in one.lower() or "died" in one]
    return told[-_LOG_LINES:]


def _warnings(run_dir: Path) -> Iterator[Piece]:
    """The last warnings of the command's log, folded away."""
    if told := last_warnings(run_dir):
        yield Code(text="\n".join(told), summary="Last warnings of train.log")


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        return
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            yield entry


def _json(file: Path) -> dict[str, Any] | None:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None
