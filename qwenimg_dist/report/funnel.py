"""The funnel of a data set: how many rows reach each stage, and why the others did not.

Place in the flow: the one function that counts. `produce` prints it at its end, `data stats` and the run report show
it. It reads committed parts only, unit by unit (memory: one unit), so it may run beside a working `produce`; a unit
counts as decided when it has a `rows` part.

    from qwenimg_dist.report.funnel import funnel
    result = funnel(dataset)                 # Funnel
    for table in result.tables():            # Table: .rich() for a console, .text() for a log, .html()
        console.print(table.rich())
    result.as_dict()                         # for JSON
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.report.table import Table, show_share
from qwenimg_dist.schema import DEDUP, LISTING, ROWS, SCAN

LATENTS_PREFIX = "latents-"
TEXT_PREFIX = "text-"


@dataclass(frozen=True, kw_only=True)
class Funnel:
    """Counts of rows, each stage a subset of the one before it."""

    units: int
    """Units with a listing part."""
    listed: int
    readable: int
    """The scan could read and identify the file."""
    captioned: int
    """Readable, and with a caption; only such rows are compared with each other."""
    unique: int
    """Captioned, and no kept earlier row is the same picture."""
    decided: int
    """Rows with a decision; fewer than `listed` while `produce` is at work or was interrupted."""
    admitted: int
    """Kept by every filter."""
    encoded: dict[str, int]
    """Latents facet -> admitted rows in it."""
    too_small: dict[str, int]
    """Resolution class (px) -> admitted rows that are smaller than its buckets, so not encoded at it."""
    captions: dict[str, int]
    """Text facet -> distinct captions with features, the empty prompt included."""
    reasons: dict[tuple[str, str], int]
    """(status, reason) of the rows that were not admitted -> rows, most frequent first."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "units": self.units,
            "listed": self.listed,
            "readable": self.readable,
            "captioned": self.captioned,
            "unique": self.unique,
            "decided": self.decided,
            "admitted": self.admitted,
            "encoded": dict(self.encoded),
            "too_small": dict(self.too_small),
            "captions": dict(self.captions),
            "reasons": [
                {"status": status, "reason": reason, "rows": n} for (status, reason), n in self.reasons.items()
            ],
        }

    def tables(self) -> list[Table]:
        """The stages; and the reasons, if any row was not admitted."""
        stages: list[tuple[str, int]] = [
            ("listed", self.listed),
            ("readable", self.readable),
            ("with a caption", self.captioned),
            ("unique", self.unique),
        ]
        if self.decided != self.listed:
            stages.append(("decided so far", self.decided))
        stages.append(("admitted", self.admitted))
        stages += [(f"encoded {label}", self.encoded[name]) for name, label in facet_labels(self.encoded).items()]
        rows = tuple((name, count, show_share(count, self.listed)) for name, count in stages)
        small = tuple((f"{px} px", count, show_share(count, self.admitted)) for px, count in self.too_small.items())
        tables = [Table(title="Funnel", columns=("stage", "rows", "of listed"), rows=rows)]
        if self.reasons:
            reasons = tuple(
                (reason, status, count, show_share(count, self.listed))
                for (status, reason), count in self.reasons.items()
            )
            tables.append(Table(title="Not admitted", columns=("reason", "status", "rows", "of listed"), rows=reasons))
        if any(self.too_small.values()):
            columns = ("class", "rows", "of admitted")
            tables.append(Table(title="Admitted, but too small for a class", columns=columns, rows=small))
        return tables


def funnel(dataset: Dataset) -> Funnel:
    """Count a data set's committed parts. Raises `DataError` naming a part that cannot be read."""
    facets = dataset.facets()
    latents = sorted((name for name in facets if name.startswith(LATENTS_PREFIX)), key=latents_order)
    texts = [name for name in facets if name.startswith(TEXT_PREFIX)]
    parts = {name: dataset.parts_by_unit(name) for name in (LISTING, SCAN, DEDUP, ROWS, *latents)}
    counts: Counter[str] = Counter()
    encoded: Counter[str] = Counter(dict.fromkeys(latents, 0))
    too_small: Counter[str] = Counter()
    reasons: Counter[tuple[str, str]] = Counter()
    for unit in sorted(parts[LISTING]):
        tables = {
            name: dataset.merge(parts[name][unit], columns) for name, columns in _COLUMNS.items() if unit in parts[name]
        }
        counts.update(_count_unit(tables))
        if ROWS not in tables:
            continue
        reasons.update(_reasons(tables[ROWS]))
        too_small.update(dataset.meta(parts[ROWS][unit][-1]).get("left_out", {}))
        kept = _rows_where(tables[ROWS], pc.equal(tables[ROWS]["status"], "kept"))
        for name in latents:
            if unit in parts[name]:
                rows = dataset.merge(parts[name][unit], ["row"])["row"]
                encoded[name] += _true(pc.is_in(rows, value_set=kept))
    return Funnel(
        units=len(parts[LISTING]),
        listed=counts["listed"],
        readable=counts["readable"],
        captioned=counts["captioned"],
        unique=counts["unique"],
        decided=counts["decided"],
        admitted=counts["admitted"],
        encoded=dict(encoded),
        too_small={px: too_small[px] for px in sorted(too_small, key=int)},
        captions={name: count_captions(dataset, name) for name in texts},
        reasons=dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
    )


def count_captions(dataset: Dataset, facet: str) -> int:
    """Distinct captions of a text facet: a caption of several units is stored with each and counted once."""
    keys: set[str] = set()
    for part in dataset.parts(facet):
        keys.update(dataset.read(part, ["key"])["key"].to_pylist())
    return len(keys)


def facet_labels(names: Sequence[str] | Mapping[str, Any]) -> dict[str, str]:
    """Latents facet -> `64 px`, with the encoder's fingerprint where one resolution has several facets."""
    resolutions = Counter(latents_order(name)[0] for name in names)
    labels: dict[str, str] = {}
    for name in sorted(names, key=latents_order):
        resolution, fingerprint = latents_order(name)
        labels[name] = f"{resolution} px" if resolutions[resolution] == 1 else f"{resolution} px ({fingerprint})"
    return labels


def latents_order(name: str) -> tuple[int, str]:
    """(resolution, fingerprint) of `latents-<resolution>-<fingerprint>`; (0, name) of anything else."""
    _, _, rest = name.partition("-")
    resolution, _, fingerprint = rest.partition("-")
    return (int(resolution), fingerprint) if resolution.isdigit() else (0, name)


_COLUMNS = {
    LISTING: ["row", "caption_fault"],
    SCAN: ["row", "fault"],
    DEDUP: ["row", "duplicate_of"],
    ROWS: ["row", "status", "reason"],
}


def _count_unit(tables: Mapping[str, pa.Table]) -> dict[str, int]:
    counts = {"listed": tables[LISTING].num_rows}
    if SCAN in tables:
        readable = _rows_where(tables[SCAN], pc.is_null(tables[SCAN]["fault"]))
        counts["readable"] = len(readable)
        captioned = _rows_where(tables[LISTING], pc.is_null(tables[LISTING]["caption_fault"]))
        captioned = captioned.filter(pc.is_in(captioned, value_set=readable))
        counts["captioned"] = len(captioned)
        if DEDUP in tables:
            first = _rows_where(tables[DEDUP], pc.less(tables[DEDUP]["duplicate_of"], 0))
            counts["unique"] = _true(pc.is_in(first, value_set=captioned))
    if ROWS in tables:
        counts["decided"] = tables[ROWS].num_rows
        counts["admitted"] = _true(pc.equal(tables[ROWS]["status"], "kept"))
    return counts


def _reasons(rows: pa.Table) -> Counter[tuple[str, str]]:
    lost = rows.filter(pc.not_equal(rows["status"], "kept"))
    grouped = lost.group_by(["status", "reason"]).aggregate([([], "count_all")]).to_pydict()
    found: Counter[tuple[str, str]] = Counter()
    for status, reason, count in zip(grouped["status"], grouped["reason"], grouped["count_all"]):
        found[status, reason or "unknown"] += count
    return found


def _rows_where(table: pa.Table, mask: pa.ChunkedArray) -> pa.Array:
    return table.filter(mask)["row"].combine_chunks()


def _true(mask: Any) -> int:
    return int(pc.sum(mask).as_py() or 0)
