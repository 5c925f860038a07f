"""`data repair --lift-poison`: takes back the verdict that pictures kill the process that opens them.

For when it was not the pictures: a library that was mended since, too little memory. The rows become the passing fault
`unreadable`, and their units wait; the next `produce` scans and opens them again, carefully if they kill again, and
decides anew. Nothing is removed: further `scan` and `rows` parts say so. Killed halfway, run it again.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from rich.console import Console

from producers import fence
from producers.poison import POISON
from producers.scan import UNREADABLE
from qwenimg_dist.commands.data_verify_units import REPAIRED
from qwenimg_dist.data.facets import DataError, Dataset
from qwenimg_dist.schema import LISTING, ROWS, SCAN, SOURCE_COMPLETE

_WORKERS_GONE_S = 10.0
_DETAIL = "was poison, and that was lifted: the next `produce` opens it again"
_STAMPED = ("schema_version", "config_hash", "tars")


def lift_poison(dataset: Dataset, console: Console) -> int:
    """Lift every verdict of the data set, and say of which rows; 0."""
    lifted = 0
    with dataset.lock(), fence.alone(dataset.root, timeout_s=_WORKERS_GONE_S):
        for unit in dataset.units(SCAN):
            rows = _lift(dataset, unit)
            if rows:
                some = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
                console.print(f"unit {unit}: row {some}: no poison any more", markup=False, highlight=False)
            lifted += len(rows)
    said = f"{lifted} rows will be opened again by the next `qwenimg-dist produce`" if lifted else "there is no poison"
    console.print(f"{dataset.root}: {said}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _lift(dataset: Dataset, unit: int) -> list[int]:
    """Rows of the unit that were poison. The decisions first: without them the scan would say so again."""
    scan, decided = dataset.read_unit(SCAN, unit), dataset.read_unit(ROWS, unit)
    assert scan is not None  # one of its units
    condemned = [entry for entry in scan.to_pylist() if entry["fault"] == POISON]
    judged = [entry for entry in decided.to_pylist() if entry["reason"] == POISON] if decided is not None else []
    if not condemned and not judged:
        return []
    (dataset.root / SOURCE_COMPLETE).unlink(missing_ok=True)
    if decided is not None:
        meta = dataset.meta(dataset.unit_parts(ROWS, unit)[-1])
        counts = {reason: count for reason, count in meta.get("counts", {}).items() if reason != POISON}
        counts[UNREADABLE] = counts.get(UNREADABLE, 0) + len(judged)
        inputs = {facet: count for facet, count in meta.get("inputs", {}).items() if facet != LISTING}
        extra = {name: value for name, value in meta.items() if name not in _STAMPED}
        extra |= {"inputs": inputs, "plan": "", "counts": counts, REPAIRED: "lift-poison"}
        _commit(dataset, ROWS, unit, [{**e, "reason": UNREADABLE, "detail": _DETAIL} for e in judged], decided, extra)
    if condemned:
        _commit(dataset, SCAN, unit, [{**e, "fault": UNREADABLE, "detail": _DETAIL} for e in condemned], scan, {})
    return sorted({entry["row"] for entry in (*condemned, *judged)})


def _commit(
    dataset: Dataset, facet: str, unit: int, rows: list[dict[str, Any]], like: pa.Table, extra: dict[str, Any]
) -> None:
    part = dataset.next_part(facet, unit)
    table = pa.Table.from_pylist(rows, schema=like.schema.remove_metadata())
    config_hash = dataset.meta(dataset.unit_parts(facet, unit)[-1])["config_hash"]
    if not dataset.commit(part, table, config_hash=config_hash, extra=extra):
        raise DataError(f"{dataset.parquet(part)} appeared meanwhile: is a `produce` at work? Run this again after it")
