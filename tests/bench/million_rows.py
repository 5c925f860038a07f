"""The driver's memory and time for sources of up to a million rows: parquet manifest, jsonl manifest, folder.

    python tests/bench/million_rows.py [--quick] [--kinds parquet jsonl folder] [--rows 100000 1000000] [--out FILE]

Real: the source, the listing, what is pending, the settling of duplicates, the schedule, and the funnel at the end;
each in the driver's own process, which is started anew per size. **Stubbed: reading pictures, scanning and encoding.**
The stub commits the scan and rows parts that workers would, without tensors; nothing is fsynced. So the seconds are
those of the driver's own work, and a folder's pictures are hard links to a few small files.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import harness
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from producers.dedup import load_index
from producers.driver import Driver
from producers.plan import Plan, make_plan
from producers.sources import open_source
from producers.unit import UnitReport
from producers.workers import Outcome, Task
from qwenimg_dist.compose import load_config
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.report.funnel import funnel
from qwenimg_dist.schema import (
    CAPTIONS_COLUMNS,
    LISTING,
    ROWS,
    ROWS_COLUMNS,
    SCAN,
    SCAN_COLUMNS,
    latents_facet,
    text_facet,
)

KINDS: Final = ("parquet", "jsonl", "folder")
ROWS_FULL: Final = (100_000, 300_000, 1_000_000)
ROWS_QUICK: Final = (20_000, 40_000)
WORDS: Final = tuple("a red kite over the harbour at dusk with two boats and a quiet sky of even grey".split())  # noqa: SIM905


def main() -> int:
    options = harness.parser(__doc__, repeats=1)
    options.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options.add_argument("--rows", nargs="+", type=int, default=None)
    args = options.parse_args()
    if args.worker is not None:
        harness.answer(args.worker, measure(args.worker))
        return 0
    return compare(args).finish(args)


def compare(args: argparse.Namespace) -> harness.Report:
    """Every kind at every size, and the slope between the smallest and the largest."""
    sizes = sorted(args.rows or (ROWS_QUICK if args.quick else ROWS_FULL))
    report = harness.Report(
        name="million_rows",
        what="the driver's peak memory above import, and its seconds, by rows of the source",
        settings={"unit_size": 512, "caption_words": "5-16"},
        targets=["peak <= 1 GB above import at a million rows; slope <= 100 bytes per row"],
        notes=[
            "reading, scanning and encoding are stubbed (their parts are committed without tensors), and no fsync",
            "list: look at the source and commit the listing; again: the same look, nothing new; produce: pending, "
            "settle, schedule; resume: pending and all settled digests loaded in a fresh driver; then the funnel",
        ],
    )
    peaks: dict[tuple[str, int], float] = {}
    with harness.scratch("million-rows") as folder:
        for kind in args.kinds:
            for size in sizes:
                place = folder / f"{kind}-{size}"
                write_source(place, kind, size)
                job = {"kind": kind, "folder": str(place)}
                (figures,) = harness.run_ranks(__file__, 1, job, place / "run")
                report.add(f"{kind}, {size:,} rows", [figures])
                peaks[kind, size] = figures["peak MB"]
    for kind in args.kinds:
        if len(sizes) > 1:
            slope = (peaks[kind, sizes[-1]] - peaks[kind, sizes[0]]) * 1e6 / (sizes[-1] - sizes[0])
            report.notes.append(f"{kind}: {slope:.0f} bytes per row between {sizes[0]:,} and {sizes[-1]:,} rows")
    return report


def write_source(place: Path, kind: str, num_rows: int) -> None:
    """A source without pictures (a folder has hard links to a few)."""
    place.mkdir(parents=True)
    if kind == "parquet":
        schema = pa.schema([("uri", pa.string()), ("caption", pa.string())])
        with pq.ParquetWriter(place / "list.parquet", schema) as writer:
            for entries in _pieces(num_rows):
                table = {"uri": [uri for uri, _ in entries], "caption": [text for _, text in entries]}
                writer.write_table(pa.table(table, schema=schema))
        return
    name, uri_key, text_key = (
        ("list.jsonl", "uri", "caption") if kind == "jsonl" else ("pictures/metadata.jsonl", "file_name", "text")
    )
    (place / "pictures").mkdir()
    with open(place / name, "w") as lines:
        for entries in _pieces(num_rows):
            lines.writelines(json.dumps({uri_key: uri, text_key: text}) + "\n" for uri, text in entries)
            if kind == "folder":
                _link(place / "pictures", [uri for uri, _ in entries])


def _pieces(num_rows: int, size: int = 10_000) -> Iterator[list[tuple[str, str]]]:
    """(uri, caption); uris as img2dataset names them: a folder per ten thousand."""
    for start in range(0, num_rows, size):
        rows = range(start, min(start + size, num_rows))
        yield [(f"{row // size:05d}/{row:09d}.jpg", " ".join(WORDS[: 5 + row * 7 % 12]) + f" {row}") for row in rows]


def _link(root: Path, uris: Sequence[str]) -> None:
    folder = root / uris[0].split("/")[0]
    folder.mkdir()
    seed = folder / "seed.bin"  # file systems allow some ten thousand links to one file
    seed.write_bytes(b"x")
    for uri in uris:
        os.link(seed, root / uri)
    seed.unlink()


@dataclass
class StubWorkers:
    """Commits what workers would, without reading or encoding anything."""

    dataset: Dataset
    plan: Plan
    num_workers: int = 1
    _queue: deque[Task] = field(default_factory=deque)

    def num_idle(self) -> int:
        return 1 - len(self._queue)

    def submit(self, task: Task) -> None:
        self._queue.append(task)

    def wait(self, timeout_s: float) -> Sequence[Outcome]:
        task = self._queue.popleft()
        listing = self.dataset.read_unit(LISTING, task.unit, ["row", "key"])
        assert listing is not None
        make = self._scan if task.kind == "scan" else self._encode
        report = make(task.unit, listing["row"].to_pylist(), listing["key"].to_pylist())
        return [Outcome(task=task, report=report)]

    def _scan(self, unit: int, rows: list[int], keys: list[str]) -> None:
        # Every tenth row has the bytes of the one before it; keys are hashes already.
        sha = [
            (key * 4)[:64] if row % 10 else (keys[index - 1] * 4)[:64]
            for index, (row, key) in enumerate(zip(rows, keys))
        ]
        facts: dict[str, Any] = {"bytes": 100_000, "format": "JPEG", "mode": "RGB", "width": 512, "height": 512}
        table = _table(SCAN_COLUMNS, len(rows), row=rows, sha256=sha, orientation=1, **facts)
        self.dataset.commit(self.dataset.next_part(SCAN, unit), table, config_hash=self.plan.config_hash)
        facet = self.plan.dedup.captions_facet
        assert facet is not None  # caption filters are on by default
        fit = _table(CAPTIONS_COLUMNS, len(rows), row=rows, fit=True)
        self.dataset.commit(self.dataset.next_part(facet, unit), fit, config_hash=self.plan.config_hash)

    def _encode(self, unit: int, rows: list[int], keys: list[str]) -> UnitReport:
        table = _table(
            ROWS_COLUMNS, len(rows), row=rows, key=keys, status="kept", reason="", detail="", width=512, height=512
        )
        inputs = dict.fromkeys((*self.plan.settled, *self.plan.facets), 1)
        extra = {"inputs": inputs, "plan": self.plan.digest, "counts": {"kept": len(rows)}, "left_out": {}}
        self.dataset.commit(self.dataset.next_part(ROWS, unit), table, config_hash=self.plan.config_hash, extra=extra)
        return UnitReport(unit=unit, num_rows=len(rows), num_kept=len(rows), decoded=0, latents=0, captions=0)


def _table(schema: pa.Schema, num_rows: int, **columns: Any) -> pa.Table:
    """A table of lists and of constants; other columns are null."""
    arrays = {
        field.name: pa.array(
            value if isinstance(value := columns.get(field.name), list) else [value] * num_rows, type=field.type
        )
        for field in schema
    }
    return pa.table(arrays, schema=schema)


def measure(job: dict[str, Any]) -> harness.Figures:
    """In a process of its own: one life of the driver, its peak memory per stretch."""
    folder = Path(job["folder"])
    os.fsync = lambda handle: None  # type: ignore[assignment]
    path = {"parquet": "list.parquet", "jsonl": "list.jsonl", "folder": "pictures"}[job["kind"]]
    kind = "folder" if job["kind"] == "folder" else "manifest"
    config = load_config([f"source={kind}", f"source.path={folder / path}"])
    facets = {64: latents_facet(64, "0123456789ab")}
    plan = make_plan(config, text_facet=text_facet("0123456789ab"), latents_facets=facets)
    dataset = Dataset.create(folder / "data", 512)
    np.sort(np.zeros(10))  # whatever loads at first use
    base = _status("VmRSS")
    figures: harness.Figures = {}

    def make_driver() -> Driver:
        return Driver(dataset=dataset, plan=plan, root=str(folder), make_workers=lambda: StubWorkers(dataset, plan))

    def stretch(name: str, run: Callable[[], object]) -> None:
        _reset_peak()
        began = time.perf_counter()
        run()
        figures[f"{name} s"] = time.perf_counter() - began
        figures[f"{name} MB"] = (_status("VmHWM") - base) / 1e6

    drivers = [make_driver()]
    source = open_source(config.source)
    state: dict[str, int] = {}

    def look() -> None:
        state["rows"] = drivers[0].list_source(source.find()).num_rows

    def produce() -> None:
        if not drivers[0].produce(drivers[0].pending(), state["rows"]):
            raise RuntimeError("the driver stopped")

    def resume() -> None:
        drivers.clear()  # with all it remembers, as if the process had ended
        if make_driver().pending():
            raise RuntimeError("units are pending after they were produced")
        if not len(load_index(dataset, plan.dedup)):
            raise RuntimeError("nothing is settled")

    def count() -> None:
        if funnel(dataset).decided != state["rows"]:
            raise RuntimeError("rows are lost")

    for name, run in (("list", look), ("again", look), ("produce", produce), ("resume", resume), ("funnel", count)):
        stretch(name, run)
    figures["peak MB"] = max(value for name, value in figures.items() if name.endswith(" MB"))
    return figures


def _status(field_name: str) -> float:
    """A line of /proc/self/status, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field_name + ":"):
            return float(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field_name}: this benchmark needs Linux")


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    sys.exit(main())
