"""The unit pipeline: what is missing for one unit -> load -> filter -> encode -> write -> commit.

Place in the flow: a worker runs `produce_unit` after the unit's scan and dedup are committed. The result depends on
what is committed, the source's bytes and the plan alone, so a unit may be repeated at any time: the same rows,
decisions and keys come out. The `rows` part is committed last, and names the parts of every facet that it belongs to:
it is what makes the unit ready. Each admitted picture is decoded once for all resolutions.

Refuses to encode bytes other than those that were scanned (`changed_file`). An encoded row whose file is gone when a
class or a filter is added keeps what it has; what it lacks stands in its detail and in the record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import pyarrow as pa
from PIL import Image

from producers import pictures
from producers.captions import judge
from producers.commit import commit_part
from producers.decide import Assessment, assess, facts_of, first_rejection
from producers.filters.base import BoundFilter, Facts, Scorers, Value
from producers.load import ImageFault
from producers.plan import Plan
from producers.scan import naming
from producers.state import Decision, Row, UnitState, read_state
from producers.write import Encoders, LatentsWriter, TextWriter
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.debug import fault_point
from qwenimg_dist.in_turn import in_turn
from qwenimg_dist.schema import EDIT, LABEL_PREFIX, LISTING, ROWS, ROWS_COLUMNS, SCORE_PREFIX

_BATCH_ROWS: Final = 16
_BATCH_PIXELS: Final = 64 * 1024 * 1024
"""200 MB of decoded pictures wait for a filter's model at most, or one picture that is larger."""


@dataclass(frozen=True, kw_only=True)
class UnitReport:
    """What one run of a unit did; small, since it travels as a message."""

    unit: int
    num_rows: int
    num_kept: int
    decoded: int
    latents: int
    captions: int
    reasons: Mapping[str, int] = field(default_factory=dict)
    """Why rows were not admitted -> how many."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A decoded row: the picture where no filter has rejected it so far."""

    assessment: Assessment
    decision: Decision
    facts: Facts | None = None
    others: tuple[Image.Image, ...] = ()
    """The further pictures, where they are wanted."""
    fault: str | None = None
    """Why the picture of a row that stays kept could not be opened for what it lacks."""


def produce_unit(
    dataset: Dataset, unit: int, *, plan: Plan, root: str, encoders: Encoders, scorers: Scorers, num_threads: int = 1
) -> UnitReport:
    """Bring the unit to what the plan wants. Raises `UnitConflictError` if another worker did so meanwhile."""
    fault_point("unit_start")
    state = read_state(dataset, unit, plan)
    judged = judge(state.rows, plan, scorers)
    assessed = [assess(one, state, plan) for one in judged]
    decisions = {one.row.row: one.decision for one in assessed if one.decision is not None}
    to_open = [one for one in assessed if one.decision is None]
    lacking: dict[str, Any] = {}
    with LatentsWriter(dataset, unit, plan, encoders) as latents, TextWriter(dataset, unit, plan, encoders) as texts:
        for opened in opened_rows(to_open, plan, root, scorers, num_threads):
            decisions[opened.assessment.row.row] = opened.decision
            if opened.fault is not None:
                missing = list(opened.assessment.missing)
                lacking[str(opened.assessment.row.row)] = {"reason": opened.fault, "classes": missing}
            for cut_one in cut(opened, plan):
                latents.add(cut_one)
            _queue_texts(opened, plan, texts)
        decisions = {
            one.row.row: replace(decisions[one.row.row], caption_faults=one.faults, labels=one.row.labels)
            for one in judged
        }
        plain = [one.row for one in judged if decisions[one.row.row].kept and one.row.kind != EDIT]
        num_captions = texts.commit([text for row in plain for text in row.captions], state.texts)
        num_latents = latents.commit()
    _commit_rows(dataset, unit, plan, state, decisions, lacking)
    return UnitReport(
        unit=unit,
        num_rows=len(state.rows),
        num_kept=sum(decision.kept for decision in decisions.values()),
        decoded=len(to_open),
        latents=num_latents,
        captions=num_captions,
        reasons=dict(Counter(decision.reason for decision in decisions.values() if not decision.kept)),
    )


def assess_unit(dataset: Dataset, unit: int, plan: Plan, scorers: Scorers) -> list[Assessment]:
    """What is known of each row before any is opened."""
    state = read_state(dataset, unit, plan)
    return [assess(one, state, plan) for one in judge(state.rows, plan, scorers)]


def opened_rows(
    to_open: Sequence[Assessment], plan: Plan, root: str, scorers: Scorers, num_threads: int
) -> Iterator[Opened]:
    """Each row decoded, scored by all filters on pixels and decided, in order."""
    for batch in _batches(_open_all(to_open, plan, root, num_threads)):
        yield from ask_models(batch, plan, scorers)


def _open_all(to_open: Sequence[Assessment], plan: Plan, root: str, num_threads: int) -> Iterator[Opened]:
    """Open pictures in row order; with several threads, a few ahead of the encoder (Pillow lets threads run)."""
    return in_turn(partial(open_row, plan=plan, root=root), to_open, threads=num_threads)


def open_row(one: Assessment, plan: Plan, root: str) -> Opened:
    """Decode, score by the filters without a model, decide."""
    with naming(one.row.row, one.row.uri):
        return _open_row(one, plan, root)


def _open_row(one: Assessment, plan: Plan, root: str) -> Opened:
    row, scores = one.row, dict(one.scores)
    try:
        loaded = pictures.open_verified(root, row.uri, row.sha256)
        others = pictures.open_further(row, root) if one.missing or one.texts else ()
    except ImageFault as fault:
        if one.has_latents:
            lost = f"no latents at {', '.join(f'{px} px' for px in one.missing)}" if one.missing else "not scored anew"
            kept = Decision(status="kept", detail=f"{fault.reason}: {fault.detail}; {lost}", scores=scores)
            return Opened(assessment=one, decision=kept, fault=fault.reason)
        decision = Decision(status="fault", reason=fault.reason, detail=fault.detail, scores=scores)
        return Opened(assessment=one, decision=decision)
    facts = facts_of(row, loaded)
    filters = [each for each in plan.filters if each.filter.looks_at == "pixels" and each.filter.load is None]
    for each in filters:
        scores |= each.score(facts)
    kept = Decision(status="kept", scores=scores)
    return _decide(Opened(assessment=one, decision=kept, facts=facts, others=others), filters)


def _decide(opened: Opened, filters: Sequence[BoundFilter]) -> Opened:
    """The row after these filters; a rejected one lets go of its picture."""
    rejected = first_rejection(filters, opened.decision.scores)
    if rejected is None:
        return opened
    status, reason, detail = rejected
    decision = Decision(status=status, reason=reason, detail=detail, scores=opened.decision.scores)
    return replace(opened, decision=decision, facts=None, others=())


def _batches(opened: Iterable[Opened]) -> Iterator[list[Opened]]:
    """Rows in order, cut where their pictures would hold too much memory or be more than a model takes at once."""
    batch: list[Opened] = []
    pixels = 0
    for one in opened:
        size = one.facts.width * one.facts.height if one.facts is not None else 0
        size += sum(other.width * other.height for other in one.others)
        if batch and (pixels + size > _BATCH_PIXELS or len(batch) >= _BATCH_ROWS):
            yield batch
            batch, pixels = [], 0
        batch.append(one)
        pixels += size
    if batch:
        yield batch


def ask_models(batch: Sequence[Opened], plan: Plan, scorers: Scorers) -> list[Opened]:
    """Score by one model after the other, each for the rows that all before it admit."""
    asked = list(batch)
    for each in plan.filters:
        if each.filter.load is None or each.filter.looks_at == "captions":  # those were asked before
            continue
        admitted = [index for index, one in enumerate(asked) if one.facts is not None]
        todo = [index for index in admitted if not each.scored(asked[index].decision.scores)]
        facts = [one for index in todo if (one := asked[index].facts) is not None]
        for index, values in zip(todo, scorers.score(each, facts) if facts else [], strict=True):
            decision = asked[index].decision
            asked[index] = replace(asked[index], decision=replace(decision, scores={**decision.scores, **values}))
        for index in admitted:
            asked[index] = _decide(asked[index], [each])
    return asked


def cut(opened: Opened, plan: Plan) -> Iterator[pictures.Cut]:
    """Every missing class of a kept row."""
    one = opened.assessment
    if opened.facts is None or opened.facts.image is None or not one.missing:
        return
    missing = {resolution: one.placements[resolution] for resolution in one.missing}
    with naming(one.row.row, one.row.uri):
        yield from pictures.cut(one.row, opened.facts.image, opened.others, missing, plan)


def _queue_texts(opened: Opened, plan: Plan, writer: TextWriter) -> None:
    """The missing texts of a kept row that see its pictures."""
    one = opened.assessment
    if opened.facts is not None and one.texts:
        writer.add_edit(one.row, one.texts, pictures.vision_pixels(one.row, opened.others, plan))


def _commit_rows(
    dataset: Dataset,
    unit: int,
    plan: Plan,
    state: UnitState,
    decisions: Mapping[int, Decision],
    lacking: Mapping[str, Any],
) -> None:
    """The unit's last part: changed decisions (perhaps none), and the record of the parts they belong to.

    `lacking`: kept row -> why its file could not be opened, and the classes that it has no latents of for that.
    """
    inputs = _carried_inputs(plan, state, decisions)
    for facet in plan.settled:
        inputs[facet] = state.num_parts[facet]
    for facet in plan.facets:
        inputs[facet] = dataset.next_part(facet, unit).part
    # Compared with what stands in the parts: a score that was found stale must not stay there as if it were fresh.
    changed = [row for row in state.rows if state.committed.get(row.row) != decisions[row.row]]
    schema = ROWS_COLUMNS
    for column, kind in sorted(_value_columns(decisions.values())):
        schema = schema.append(pa.field(column, kind))
    table = pa.Table.from_pylist([_rows_entry(row, decisions[row.row]) for row in changed], schema=schema)
    extra = {
        "inputs": inputs,
        "plan": plan.digest,
        "scorers": {**state.scorers, **{one.name: one.fingerprint for one in plan.filters}},
        "counts": dict(Counter(decision.reason or "kept" for decision in decisions.values())),
        "left_out": _left_out(plan, state, decisions),
        "lacking": lacking,
        "stages": _stages(plan, decisions.values()),
    }
    commit_part(dataset, dataset.next_part(ROWS, unit), table, config_hash=plan.config_hash, extra=extra)


def _stages(plan: Plan, decisions: Iterable[Decision]) -> dict[str, int]:
    """Reason -> which of the seven stages rejects for it. What no filter is responsible for belongs to the first: files
    that cannot be used, no caption at all, duplicates, too small for every bucket."""
    stages: dict[str, int] = {}
    for decision in decisions:
        if not decision.kept and decision.reason not in stages:
            stages[decision.reason] = next((one.filter.stage for one in plan.filters if _rejects(one, decision)), 1)
    return stages


def _rejects(one: BoundFilter, decision: Decision) -> bool:
    """Whether it is this filter that gives the decision's reason."""
    if one.filter.per_caption:
        return decision.reason in decision.caption_faults
    rejection = one.admit(decision.scores) if decision.status == "rejected" and one.scored(decision.scores) else None
    return rejection is not None and rejection.reason == decision.reason


def _carried_inputs(plan: Plan, state: UnitState, decisions: Mapping[int, Decision]) -> dict[str, int]:
    """Facets outside the plan for which the unit stays ready: those that hold all they need already.

    A row that is kept now and was not before may be missing there; a changed caption, or one that filters left out
    before, is missing in other text facets.
    """
    before = {row for row, decision in state.decisions.items() if decision.kept}
    kept = [row for row, decision in decisions.items() if decision.kept]
    grown = any(row not in before for row in kept)
    same_captions = state.inputs.get(LISTING) == state.num_parts[LISTING] and not any(
        _more_captions(state.decisions[row], decisions[row]) for row in kept if row in before
    )
    return {
        facet: count
        for facet, count in state.inputs.items()
        if facet.startswith(("text-", "latents-")) and not grown and (same_captions or not facet.startswith("text-"))
    }


def _more_captions(before: Decision, now: Decision) -> bool:
    """Whether a caption is fit now that was not before."""
    now_faults = now.caption_faults or ("",) * len(before.caption_faults)
    return any(then and not fault for then, fault in zip(before.caption_faults, now_faults, strict=False))


def _left_out(plan: Plan, state: UnitState, decisions: Mapping[int, Decision]) -> dict[str, int]:
    """Resolution class -> kept rows without latents of it: too small, or without a picture."""
    count = Counter(dict.fromkeys(plan.buckets, 0))
    for row in state.rows:
        if decisions[row.row].kept:
            fitting = pictures.placements(row, plan)
            count.update(resolution for resolution in plan.buckets if resolution not in fitting)
    return {str(resolution): number for resolution, number in count.items()}


def _rows_entry(row: Row, decision: Decision) -> dict[str, Any]:
    return {
        "row": row.row,
        "key": row.key,
        "status": decision.status,
        "reason": decision.reason,
        "detail": decision.detail,
        "width": row.width,
        "height": row.height,
        "caption_faults": list(decision.caption_faults) or None,
        **{_column(name, value)[0]: value for name, value in (*decision.scores.items(), *decision.labels.items())},
    }


def _value_columns(decisions: Iterable[Decision]) -> set[tuple[str, pa.DataType]]:
    return {
        _column(name, value)
        for decision in decisions
        for name, value in (*decision.scores.items(), *decision.labels.items())
    }


def _column(name: str, value: Value) -> tuple[str, pa.DataType]:
    return (LABEL_PREFIX + name, pa.string()) if isinstance(value, str) else (SCORE_PREFIX + name, pa.float64())
