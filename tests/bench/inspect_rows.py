"""`data inspect` and `data stats` on a million rows: seconds and memory of each part, and of the whole command.

The data set's parts are fabricated (no tensors, no pictures; 30 scores and 3 labels, all facets), so what is measured
is reading, selecting, counting and drawing, not decoding thumbnails: 2,000 of those cost the same whatever a data set's
size. Memory is the peak above what was there after the imports.

    python tests/bench/inspect_rows.py [--quick] [--out FILE]
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from harness import Figures, Report, parser, scratch, timed
from rich.console import Console

from qwenimg_dist.commands.data_inspect import inspect
from qwenimg_dist.commands.data_inspect_choice import choose
from qwenimg_dist.commands.data_thresholds import histograms
from qwenimg_dist.compose import load_config
from qwenimg_dist.data.facets import Dataset, Part
from qwenimg_dist.data.row_columns import load_row_columns
from qwenimg_dist.report.funnel import funnel
from qwenimg_dist.report.stats import stats
from qwenimg_dist.schema import (
    DEDUP,
    DEDUP_COLUMNS,
    LATENTS_COLUMNS,
    LISTING,
    LISTING_COLUMNS,
    ROWS,
    ROWS_COLUMNS,
    SCAN,
    SCAN_COLUMNS,
    TEXT_COLUMNS,
    caption_key,
    row_key,
)

UNIT: Final = 512
FULL: Final = 1_000_000
QUICK: Final = 20_000
NUM_SCORES: Final = 27
"""Besides those of filters that have thresholds: aspect, min_side, pixels."""
MB: Final = 1e6
REASONS: Final = ("", "", "", "", "too_small", "extreme_aspect", "duplicate", "truncated")


def write_unit(dataset: Dataset, unit: int, rows: range) -> None:
    """All facets of one unit, as `commit` writes them, without its fsync."""
    random = np.random.default_rng(unit)
    count = len(rows)
    keys = [row_key(f"pictures/{row:07d}.jpg") for row in rows]
    captions = [f"a picture of number {row} with some words about what it shows, as captions have" for row in rows]
    width, height = random.integers(40, 2048, (2, count))
    reason = [REASONS[row % len(REASONS)] for row in rows]
    status = ["kept" if not one else "fault" if one == "truncated" else "rejected" for one in reason]
    numbers = list(rows)
    _write(
        dataset,
        LISTING,
        unit,
        {
            "row": numbers,
            "key": keys,
            "uri": [f"pictures/{row:07d}.jpg" for row in rows],
            "captions": [[one] for one in captions],
        },
        LISTING_COLUMNS,
    )
    scanned = {"row": numbers, "bytes": width * height // 8, "sha256": keys, "format": ["JPEG"] * count}
    _write(dataset, SCAN, unit, {**scanned, "width": width, "height": height}, SCAN_COLUMNS)
    originals = [row - 1 if one == "duplicate" else -1 for row, one in zip(rows, reason)]
    _write(dataset, DEDUP, unit, {"row": numbers, "duplicate_of": originals}, DEDUP_COLUMNS)
    scores: dict[str, Any] = {
        "score_aspect": width / height,
        "score_min_side": np.minimum(width, height),
        "score_pixels": width * height,
    }
    scores |= {f"score_measured_{index:02d}": random.normal(size=count) for index in range(NUM_SCORES)}
    labels = {f"label_{name}": random.choice(["en", "zh", "other"], count) for name in ("language", "kind", "group")}
    decided = {"row": numbers, "key": keys, "status": status, "reason": reason, "width": width, "height": height}
    schema = ROWS_COLUMNS
    for name in scores:
        schema = schema.append(pa.field(name, pa.float64()))
    for name in labels:
        schema = schema.append(pa.field(name, pa.string()))
    _write(dataset, ROWS, unit, {**decided, **scores, **labels}, schema)
    place = {"tar": ["unit.tar"] * count, "offset": numbers, "nbytes": numbers, "dtype": ["bfloat16"] * count}
    texts = {"key": [caption_key(one) for one in captions], "num_tokens": random.integers(8, 300, count), **place}
    _write(dataset, "text-bench", unit, texts, TEXT_COLUMNS)
    sides = {f"{kind}_{side}": [256] * count for kind in ("bucket", "resized") for side in ("height", "width")}
    cut = {**sides, "crop_top": [0] * count, "crop_left": [0] * count}
    _write(dataset, "latents-256-bench", unit, {"row": numbers, "key": keys, **cut, **place}, LATENTS_COLUMNS)


def _write(dataset: Dataset, facet: str, unit: int, columns: dict[str, Any], schema: pa.Schema) -> None:
    count = len(next(iter(columns.values())))
    arrays = [
        pa.array(columns[field.name]).cast(field.type) if field.name in columns else pa.nulls(count, field.type)
        for field in schema
    ]
    meta = {"schema_version": 1, "config_hash": "bench", "tars": [], "left_out": {}}
    table = pa.Table.from_arrays(arrays, schema=schema).replace_schema_metadata({"qwenimg_dist": json.dumps(meta)})
    file = dataset.parquet(Part(facet=facet, unit=unit, part=0))
    file.parent.mkdir(exist_ok=True)
    pq.write_table(table, file, compression="zstd")


def status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measured(run: Callable[[], Any], baseline: int) -> tuple[Any, Figures]:
    """The result; seconds of wall and processor time; peak memory over the baseline."""
    Path("/proc/self/clear_refs").write_text("5")
    with timed() as clock:
        result = run()
    peak = (status_bytes("VmHWM") - baseline) / MB
    return result, {"wall s": clock.wall_s, "cpu s": clock.cpu_s, "peak MB": peak}


def main() -> int:
    args = parser(__doc__, repeats=1).parse_args()
    rows = QUICK if args.quick else FULL
    report = Report(
        name="inspect_rows",
        what="the parts of data inspect and data stats, and data inspect as a whole (2,000 rows, no thumbnails)",
        targets=["usable at a million rows: a minute or two, and memory of about the index"],
        settings={"rows": rows, "unit": UNIT, "scores": NUM_SCORES + 3, "labels": 3},
    )
    config = load_config(["inspect.thumbnail=64"])
    with scratch("inspect") as folder:
        dataset = Dataset.create(folder / "data", UNIT)
        for unit in range(-(-rows // UNIT)):
            write_unit(dataset, unit, range(unit * UNIT, min(rows, (unit + 1) * UNIT)))
        baseline = status_bytes("VmRSS")
        columns, figures = measured(lambda: load_row_columns(dataset), baseline)
        report.add("all rows' columns", [figures])
        for name, run in {
            "choose 2,000 by where": lambda: choose(
                columns, config.inspect.model_copy(update={"where": "aspect < 2 and language == 'zh'"})
            ),
            "histograms, thresholds": lambda: histograms(config, columns),
            "funnel": lambda: funnel(dataset),
            "stats": lambda: stats(dataset, columns),
        }.items():
            report.add(name, [measured(run, baseline)[1]])
        out = io.StringIO()
        whole, figures = measured(lambda: inspect(dataset, config, Console(file=out)), baseline)
        assert whole == 0, out.getvalue()
        report.add("data inspect, whole", [figures])
        report.notes.append(f"sheet: {(dataset.root / 'inspect.html').stat().st_size / MB:.1f} MB")
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(main())
