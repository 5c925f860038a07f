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
from dataclasses import dataclass, field
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.report.table import Table, show_share
from qwenimg_dist.schema import DEDUP, LISTING, NEAR_DUPLICATE, NEAR_PREFIX, ROWS, SCAN, is_dedup

LATENTS_PREFIX = "latents-"
TEXT_PREFIX = "text-"
STAGES: Final = {
    1: "files, sizes, duplicates",
    2: "picture quality",
    3: "captions",
    4: "rendered text",
    5: "aesthetics, watermarks",
    6: "categories",
    7: "selection",
}
"""The report's seven stages; a filter names the one it belongs to."""
_NUM_EXAMPLES: Final = 2
_URI_CHARS: Final = 44


@dataclass(frozen=True, kw_only=True)
class Funnel:
    """Counts of rows, each stage a subset of the one before it."""

    units: int
    """Units with a listing part."""
    listed: int
    readable: int
    """The scan could read and identify the file."""
    captioned: int
    """Readable, and with a caption."""
    unique: int
    """With a caption that the caption filters leave, and no kept earlier row has the same bytes."""
    distinct: int | None
    """Unique, and by now not decided to look like a kept earlier row; None where near duplicates were never settled."""
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
    examples: dict[tuple[str, str], tuple[str, ...]]
    """(status, reason) -> uris of such rows, at most two."""
    stages: dict[str, int] = field(default_factory=dict)
    """Reason -> which of the seven stages rejects for it, as the units' records say."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "units": self.units,
            "listed": self.listed,
            "readable": self.readable,
            "captioned": self.captioned,
            "unique": self.unique,
            "distinct": self.distinct,
            "decided": self.decided,
            "admitted": self.admitted,
            "encoded": dict(self.encoded),
            "too_small": dict(self.too_small),
            "captions": dict(self.captions),
            "reasons": [
                {
                    "status": status,
                    "reason": reason,
                    "stage": self.stages.get(reason),
                    "rows": n,
                    "examples": list(self.examples[status, reason]),
                }
                for (status, reason), n in self.reasons.items()
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
        if self.distinct is not None:
            stages.append(("no near duplicate", self.distinct))
        if self.decided != self.listed:
            stages.append(("decided so far", self.decided))
        stages.append(("admitted", self.admitted))
        stages += [(f"encoded {label}", self.encoded[name]) for name, label in facet_labels(self.encoded).items()]
        rows = tuple((name, count, show_share(count, self.listed)) for name, count in stages)
        small = tuple((f"{px} px", count, show_share(count, self.admitted)) for px, count in self.too_small.items())
        tables = [Table(title="Funnel", columns=("stage", "rows", "of listed"), rows=rows)]
        if self.stages and self.reasons:
            tables.append(self._by_stage())
        if self.reasons:
            reasons = tuple(
                (reason, status, count, show_share(count, self.listed), _shortened(self.examples[status, reason]))
                for (status, reason), count in self.reasons.items()
            )
            columns = ("reason", "status", "rows", "of listed", "for example")
            tables.append(Table(title="Not admitted", columns=columns, rows=reasons))
        if any(self.too_small.values()):
            title = "Admitted, but too small for a class"
            tables.append(Table(title=title, columns=("class", "rows", "of admitted"), rows=small))
        return tables

    def _by_stage(self) -> Table:
        """What each stage took, and what it left over; stages that took nothing are not shown."""
        lost: Counter[int] = Counter()
        for (_, reason), count in self.reasons.items():
            lost[self.stages.get(reason, 1)] += count
        rows, left = [], self.decided
        for stage, count in sorted(lost.items()):
            left -= count
            named = f"{stage}. {STAGES[stage]}"
            rows.append((named, count, show_share(count, self.decided), left, show_share(left, self.decided)))
        columns = ("stage", "rows lost", "of decided", "rows left", "of decided")
        return Table(title="By stage", columns=columns, rows=tuple(rows))


def funnel(dataset: Dataset) -> Funnel:
    """Count a data set's committed parts. Raises `DataError` naming a part that cannot be read."""
    facets = dataset.facets()
    latents = sorted((name for name in facets if name.startswith(LATENTS_PREFIX)), key=latents_order)
    texts = [name for name in facets if name.startswith(TEXT_PREFIX)]
    dedups = [name for name in facets if is_dedup(name)]
    parts = {name: dataset.parts_by_unit(name) for name in (LISTING, SCAN, ROWS, *dedups, *latents)}
    counts: Counter[str] = Counter()
    encoded: Counter[str] = Counter(dict.fromkeys(latents, 0))
    too_small: Counter[str] = Counter()
    reasons: Counter[tuple[str, str]] = Counter()
    stages: dict[str, int] = {}
    first: dict[tuple[str, str], list[int]] = {}
    for unit in sorted(parts[LISTING]):
        tables = {
            name: dataset.merge(parts[name][unit], columns) for name, columns in _COLUMNS.items() if unit in parts[name]
        }
        record = dataset.meta(parts[ROWS][unit][-1]) if ROWS in tables else {}
        settled_by = _settled_by(record, [name for name in dedups if unit in parts[name]])
        if settled_by is not None:
            tables[DEDUP] = dataset.merge(parts[settled_by][unit], ["row", "duplicate_of"])
        counts.update(_count_unit(tables))
        if ROWS not in tables:
            continue
        for reason, (count, rows) in _reasons(tables[ROWS]).items():
            reasons[reason] += count
            first[reason] = [*first.get(reason, []), *rows][:_NUM_EXAMPLES]
        too_small.update(record.get("left_out", {}))
        stages.update(record.get("stages", {}))
        kept = _rows_where(tables[ROWS], pc.equal(tables[ROWS]["status"], "kept"))
        for name in latents:
            if unit in parts[name]:
                rows = dataset.merge(parts[name][unit], ["row"])["row"]
                encoded[name] += _true(pc.is_in(rows, value_set=kept))
    near = any(name.startswith(NEAR_PREFIX) for name in facets)
    return Funnel(
        units=len(parts[LISTING]),
        listed=counts["listed"],
        readable=counts["readable"],
        captioned=counts["captioned"],
        unique=counts["unique"],
        distinct=counts["unique"] - reasons["rejected", NEAR_DUPLICATE] if near else None,
        decided=counts["decided"],
        admitted=counts["admitted"],
        encoded=dict(encoded),
        too_small={px: too_small[px] for px in sorted(too_small, key=int)},
        captions={name: count_captions(dataset, name) for name in texts},
        reasons=dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
        examples=_uris(dataset, first),
        stages={reason: stage for reason, stage in sorted(stages.items()) if any(reason == r for _, r in reasons)},
    )


def count_captions(dataset: Dataset, facet: str) -> int:
    """Distinct captions of a text facet: a caption of several units is stored with each and counted once."""
    tables = [dataset.read(part, ["key"]) for part in dataset.parts(facet)]
    return int(pc.count_distinct(pa.concat_tables(tables)["key"]).as_py()) if tables else 0


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
    ROWS: ["row", "status", "reason"],
}


def _settled_by(record: Mapping[str, Any], there: Sequence[str]) -> str | None:
    """The facet of exact duplicates that the newest decisions follow; before there are any, one that is there."""
    followed = [name for name in there if name in record.get("inputs", {})]
    return next(iter([*followed, *there]), None)


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


def _reasons(rows: pa.Table) -> dict[tuple[str, str], tuple[int, list[int]]]:
    """(status, reason) -> how many, and one or two of them."""
    lost = rows.filter(pc.not_equal(rows["status"], "kept"))
    grouped = lost.group_by(["status", "reason"]).aggregate([([], "count_all"), ("row", "min"), ("row", "max")])
    found: dict[tuple[str, str], tuple[int, list[int]]] = {}
    for group in grouped.to_pylist():
        some = sorted({group["row_min"], group["row_max"]})
        found[group["status"], group["reason"] or "unknown"] = (group["count_all"], some)
    return found


def _uris(dataset: Dataset, rows: Mapping[tuple[str, str], Sequence[int]]) -> dict[tuple[str, str], tuple[str, ...]]:
    uris: dict[int, str] = {}
    wanted = sorted({row for some in rows.values() for row in some})
    for unit in sorted({row // dataset.unit_size for row in wanted}):
        listing = dataset.read_unit(LISTING, unit, ["row", "uri"])
        assert listing is not None  # the unit was counted by it
        listing = listing.filter(pc.is_in(listing["row"], value_set=pa.array(wanted)))
        uris.update(zip(listing["row"].to_pylist(), listing["uri"].to_pylist()))
    return {reason: tuple(uris[row] for row in some if row in uris) for reason, some in rows.items()}


def _shortened(uris: Sequence[str]) -> str:
    return ", ".join(uri if len(uri) <= _URI_CHARS else "..." + uri[-_URI_CHARS:] for uri in uris)


def _rows_where(table: pa.Table, mask: pa.ChunkedArray) -> pa.Array:
    return table.filter(mask)["row"].combine_chunks()


def _true(mask: Any) -> int:
    return int(pc.sum(mask).as_py() or 0)
