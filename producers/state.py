"""What is known of a unit, read from its committed parts: rows, decisions, and which features lie where.

Place in the flow: `unit.py` reads a `UnitState` first, and does what is missing in it. Pure reading.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from producers.filters import FILTERS
from producers.filters.base import Value
from producers.plan import Plan
from producers.scan import PASSING
from qwenimg_dist.data.facets import Dataset, Part
from qwenimg_dist.schema import IMAGE, LABEL_PREFIX, LISTING, ROWS, SCAN, SCORE_PREFIX, Kind


@dataclass(frozen=True, kw_only=True)
class Further:
    """A further picture of a row, as it was scanned."""

    uri: str
    sha256: str
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One listed row with all that came before filters. Facts of a file are those of its own picture."""

    row: int
    key: str
    uri: str
    captions: tuple[str, ...]
    caption_fault: str | None
    num_bytes: int
    sha256: str | None
    width: int
    height: int
    orientation: int
    fault: str | None
    detail: str | None
    duplicate_of: int
    """-1: not a duplicate, or not settled (a fault says why)."""
    kind: Kind = IMAGE
    others: tuple[Further, ...] = ()
    """Empty where a fault came before their scan."""
    meta: str | None = None
    labels: Mapping[str, Value] = field(default_factory=dict)
    """That the source gives."""
    fault_detail: str | None = None
    """Says more of `caption_fault`."""
    near_duplicate_of: int = -1
    """-1: no near duplicate, or takes no part."""
    near_distance: int = -1


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A row of the `rows` facet."""

    status: str
    reason: str = ""
    detail: str = ""
    scores: Mapping[str, Value]
    """Scores and labels, by name."""
    caption_faults: tuple[str, ...] = ()
    """Beside each listed caption, why nothing trains on it, or the empty word; no entries where all are fit."""
    labels: Mapping[str, Value] = field(default_factory=dict)
    """That the source gives; scores and labels of filters are in `scores`."""

    @property
    def kept(self) -> bool:
        return self.status == "kept"


@dataclass(frozen=True, kw_only=True)
class UnitState:
    """One unit as it is committed."""

    rows: tuple[Row, ...]
    decisions: Mapping[int, Decision]
    """Row -> the newest committed decision, without scores that would be made otherwise now."""
    committed: Mapping[int, Decision]
    """The same with all their scores, as they stand in the parts."""
    record: Mapping[str, Any]
    """Commit meta of the newest rows part; empty if there is none."""
    num_parts: Mapping[str, int]
    """Facet -> committed parts of this unit."""
    latents: Mapping[str, frozenset[int]]
    """Latents facet -> rows in it; the plan's facets, and those that the record carries."""
    texts: frozenset[str]
    """Keys of the captions with features in the plan's text facet."""

    @property
    def inputs(self) -> dict[str, int]:
        """The parts that the newest decisions were made from."""
        return dict(self.record.get("inputs", {}))

    @property
    def scorers(self) -> dict[str, str]:
        """Filter -> fingerprint of what made its scores."""
        return dict(self.record.get("scorers", {}))


def read_state(dataset: Dataset, unit: int, plan: Plan, *, only: Collection[int] | None = None) -> UnitState:
    """Read the unit's parts. Raises `DataError` naming a file that cannot be read.

    `only`: its `rows` are these alone, so that rows listed since the last scan may lie beside them.
    """
    record = read_record(dataset, unit)
    facets = [*plan.settled, *plan.facets, *(f for f in record.get("inputs", {}) if f.startswith("latents-"))]
    parts = {facet: dataset.unit_parts(facet, unit) for facet in dict.fromkeys(facets)}

    def merged(facet: str, columns: list[str] | None = None) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = dataset.merge(parts[facet], columns).to_pylist() if parts[facet] else []
        return rows

    scans = {entry["row"]: entry for entry in merged(SCAN)}
    duplicates = {entry["row"]: entry["duplicate_of"] for entry in merged(plan.dedup.facet)}
    committed = _read_decisions(dataset, unit, plan.labels)
    near = {entry["row"]: entry for entry in (merged(plan.near.facet) if plan.near is not None else ())}
    return UnitState(
        rows=tuple(
            _row(entry, scans[entry["row"]], duplicates.get(entry["row"], -1), near.get(entry["row"], {}))
            for entry in merged(LISTING)
            if only is None or entry["row"] in only
        ),
        decisions=_without(
            _without(committed, _stale(record, plan)),
            caption_scores(plan),
            only=_recaptioned(dataset, parts[LISTING], record),
        ),
        committed=committed,
        record=record,
        num_parts={facet: len(of_facet) for facet, of_facet in parts.items()},
        latents={
            facet: frozenset(entry["row"] for entry in merged(facet, ["row"]))
            for facet in parts
            if facet.startswith("latents-")
        },
        texts=frozenset(entry["key"] for entry in merged(plan.text_facet, ["key"])),
    )


def read_unsettled(dataset: Dataset, unit: int) -> list[Row]:
    """The unit's listed and scanned rows with captions, before anything is settled."""
    listing, scan = dataset.read_unit(LISTING, unit), dataset.read_unit(SCAN, unit)
    assert listing is not None  # units come from the listing
    assert scan is not None  # and are read here after their scan
    scans = {entry["row"]: entry for entry in scan.to_pylist()}
    listed = [entry for entry in listing.to_pylist() if entry["caption_fault"] is None]
    return [_row(entry, scans[entry["row"]], -1, {}) for entry in listed]


def read_record(dataset: Dataset, unit: int) -> dict[str, Any]:
    """Commit meta of the newest rows part, or nothing."""
    parts = dataset.unit_parts(ROWS, unit)
    return dataset.meta(parts[-1]) if parts else {}


def is_done(dataset: Dataset, unit: int, plan: Plan) -> bool:
    """Whether the newest decisions were made by this plan, from all parts that there are of what it settles by."""
    record = read_record(dataset, unit)
    inputs = record.get("inputs", {})
    return (
        record.get("plan") == plan.digest
        and all(inputs.get(facet, 0) >= 1 for facet in plan.facets)
        and all(inputs.get(facet) == len(dataset.unit_parts(facet, unit)) for facet in plan.settled)
    )


@dataclass(frozen=True, kw_only=True)
class PassingFault:
    """A row that was lost, or lacks something, for a fault that may have passed."""

    row: int
    uris: tuple[str, ...]
    reason: str
    by_scan: bool
    """The scan saw it, and must look again."""
    listed_anew: bool
    """Since it was decided: its picture may lie elsewhere now."""


def passing_faults(dataset: Dataset, unit: int) -> list[PassingFault]:
    """Of the rows whose newest decision is such a fault, and of kept ones that lack something for one; in a unit that
    was scanned and not yet decided, those that the scan has."""
    record = read_record(dataset, unit)
    faulty = {int(row): one["reason"] for row, one in record.get("lacking", {}).items() if one["reason"] in PASSING}
    if any(record.get("counts", {}).get(reason) for reason in PASSING):
        decisions = _read_decisions(dataset, unit)
        faulty |= {row: decision.reason for row, decision in decisions.items() if decision.reason in PASSING}
    if record and not faulty:
        return []
    scan = dataset.read_unit(SCAN, unit, ["row", "fault"])
    if not record and scan is not None:
        faulty = {entry["row"]: entry["fault"] for entry in scan.to_pylist() if entry["fault"] in PASSING}
    if not faulty:
        return []
    listing = dataset.read_unit(LISTING, unit, ["row", "uri", "others"])
    assert listing is not None  # there are decisions
    # A repair may have moved the scan aside; what it says is then asked again anyway.
    scanned = {entry["row"]: entry["fault"] in PASSING for entry in scan.to_pylist()} if scan is not None else {}
    anew = _listed_anew(dataset, dataset.unit_parts(LISTING, unit), record) if record else frozenset()
    return [
        PassingFault(
            row=entry["row"],
            uris=(entry["uri"], *(entry.get("others") or ())),
            reason=faulty[entry["row"]],
            by_scan=scanned.get(entry["row"], False),
            listed_anew=entry["row"] in anew,
        )
        for entry in listing.to_pylist()
        if entry["row"] in faulty
    ]


def _read_decisions(dataset: Dataset, unit: int, labels: Sequence[str] = ()) -> dict[int, Decision]:
    """Row -> its newest decision; columns named in `labels` are the source's."""
    parts = dataset.unit_parts(ROWS, unit)
    if not parts:
        return {}
    table = dataset.merge(parts)
    columns = {
        name: name.removeprefix(prefix)
        for prefix in (SCORE_PREFIX, LABEL_PREFIX)
        for name in table.column_names
        if name.startswith(prefix)
    }
    return {
        entry["row"]: Decision(
            status=entry["status"],
            reason=entry["reason"] or "",
            detail=entry["detail"] or "",
            scores=_values(entry, {column: name for column, name in columns.items() if name not in labels}),
            caption_faults=tuple(entry.get("caption_faults") or ()),
            labels=_values(entry, {column: name for column, name in columns.items() if name in labels}),
        )
        for entry in table.to_pylist()
    }


def _values(entry: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Value]:
    return {name: entry[column] for column, name in columns.items() if entry[column] is not None}


def _stale(record: Mapping[str, Any], plan: Plan) -> frozenset[str]:
    """Scores and labels that the plan's filters would make otherwise than they were made: another model, say."""
    made_by = record.get("scorers", {})
    stale = (one for one in plan.filters if made_by.get(one.name, one.fingerprint) != one.fingerprint)
    return frozenset(name for one in stale for name in one.filter.names)


def caption_scores(plan: Plan) -> frozenset[str]:
    """Scores and labels of pictures that depend on the captions too, also those of filters that are off now."""
    filters = (*FILTERS.values(), *(one.filter for one in plan.filters))
    return frozenset(name for one in filters if one.reads_captions for name in one.names)


def _listed_anew(dataset: Dataset, listing: Sequence[Part], record: Mapping[str, Any]) -> frozenset[int]:
    """Rows listed again since the newest decisions were made; all, where a repair withdrew the record that says so."""
    newer = listing[record.get("inputs", {}).get(LISTING, 0) :]
    return frozenset(row for part in newer for row in dataset.read(part, ["row"])["row"].to_pylist())


def _recaptioned(dataset: Dataset, listing: Sequence[Part], record: Mapping[str, Any]) -> frozenset[int]:
    """Those of them that have other captions; a row whose labels changed, or whose tar was written anew, keeps what
    its captions scored."""
    anew = _listed_anew(dataset, listing, record)
    num_known = record.get("inputs", {}).get(LISTING, 0)
    if not anew or not num_known:
        return anew
    before, now = (
        {entry["row"]: entry["captions"] for entry in dataset.merge(parts, ["row", "captions"]).to_pylist()}
        for parts in (listing[:num_known], listing)
    )
    return frozenset(row for row in anew if before.get(row) != now[row])


def _without(
    decisions: dict[int, Decision], names: frozenset[str], *, only: frozenset[int] | None = None
) -> dict[int, Decision]:
    """The decisions without these scores; with `only`, those rows' alone."""
    if not names:
        return decisions
    return {
        row: replace(one, scores={name: value for name, value in one.scores.items() if name not in names})
        if only is None or row in only
        else one
        for row, one in decisions.items()
    }


def _row(listed: Mapping[str, Any], scan: Mapping[str, Any], duplicate_of: int, near: Mapping[str, Any]) -> Row:
    return Row(
        row=listed["row"],
        key=listed["key"],
        uri=listed["uri"],
        captions=tuple(listed["captions"]),
        caption_fault=listed["caption_fault"],
        num_bytes=scan["bytes"],
        sha256=scan["sha256"],
        width=scan["width"],
        height=scan["height"],
        orientation=scan["orientation"],
        fault=scan["fault"],
        detail=scan["detail"],
        duplicate_of=duplicate_of,
        kind=listed.get("kind") or IMAGE,
        others=tuple(
            Further(uri=uri, sha256=facts["sha256"] or "", width=facts["width"], height=facts["height"])
            for uri, facts in zip(listed.get("others") or (), scan.get("others") or ())
        ),
        meta=listed.get("meta"),
        labels=json.loads(listed.get("labels") or "{}"),
        fault_detail=listed.get("fault_detail"),
        near_duplicate_of=near.get("near_duplicate_of", -1),
        near_distance=near.get("distance", -1),
    )
