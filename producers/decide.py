"""The decision on a row, as far as it can be taken without opening the picture, and what is then left to do.

Place in the flow: `unit.py` assesses every row of a unit; only rows that come back without a decision are decoded. Pure
functions of what is committed, so a repeated unit decides alike. Order of reasons: the file, its caption, duplicates,
near duplicates, filters on the header and captions, too small for every bucket, filters on the pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Final

from producers.captions import Judged, caption_rejection
from producers.filters.base import BoundFilter, Facts, Value, Values
from producers.load import Loaded
from producers.pictures import CHANGED_FILE, placements, too_small
from producers.plan import Plan
from producers.state import Decision, Row, UnitState, caption_scores
from qwenimg_dist.data.buckets import Placement
from qwenimg_dist.schema import DUPLICATE, EDIT, IMAGE, NEAR_DUPLICATE, PROMPT, TOO_SMALL, edit_caption_key

# Found at the decode, and the same at each try: the picture is not opened again for them.
LASTING: Final = frozenset({"truncated", "decode_error", "unsupported_mode", "too_many_pixels", CHANGED_FILE})


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """A row, and what is left to do for it."""

    row: Row
    scores: Values
    """Known so far."""
    placements: Mapping[int, Placement]
    """Resolution class -> how the picture goes in; of all classes of the plan that it is large enough for."""
    missing: tuple[int, ...] = ()
    """Classes without latents; the picture must be opened for them."""
    texts: tuple[str, ...] = ()
    """Texts without features that see the further pictures; those must be opened for them."""
    decision: Decision | None = None
    """None: the picture must be opened first."""
    has_latents: bool = False
    """Encoded at some class: kept, though its file may be gone by now."""


def assess(judged: Judged, state: UnitState, plan: Plan) -> Assessment:
    """Everything that is known of the row before it is decoded."""
    row = judged.row
    before = state.decisions.get(row.row)
    scores = _scores_before(before, judged, plan)
    early = _without_scores(row, plan)
    if early is not None:
        return _decided(row, scores, *early)
    facts = facts_of(row)
    for one in plan.filters:
        if one.filter.looks_at == "header" and row.kind != PROMPT:
            scores |= one.score(facts)
    scores |= judged.values
    rejected = _early_rejection(judged, scores, plan)
    if rejected is not None:
        return _decided(row, scores, *rejected)
    if row.kind == PROMPT:
        return _decided(row, scores, "kept", "", "")
    fitting = placements(row, plan)
    # A row that another resolution's facet holds stays, though none of this plan's classes takes it.
    if not fitting and not any(row.row in rows for rows in state.latents.values()):
        return _decided(row, scores, "rejected", TOO_SMALL, too_small(row, plan))
    lasting = _lasting_fault(before)
    if lasting is not None:
        return _decided(row, scores, *lasting)
    return _after_header(row, scores, fitting, state, plan)


def assess_pixels(judged: Judged, state: UnitState, plan: Plan) -> Assessment:
    """What filters on pixels say of the row, whatever it is a copy of and whichever classes it fits.

    For `verdicts.py`: of a row that the header and the caption filters admit. Nothing counts as missing.
    """
    row = judged.row
    before = state.decisions.get(row.row)
    scores = _scores_before(before, judged, plan)
    if row.fault is not None:
        return _decided(row, scores, "fault", row.fault, row.detail or "")
    told = _lasting_fault(before)
    filters, known = _pixel_filters(scores, plan)
    told = told or first_rejection(known, scores)
    if told is not None:
        return _decided(row, scores, *told)
    has_latents = any(row.row in rows for rows in state.latents.values())
    decision = Decision(status="kept", scores=scores) if len(known) == len(filters) else None
    return Assessment(row=row, scores=scores, placements={}, decision=decision, has_latents=has_latents)


def facts_of(row: Row, loaded: Loaded | None = None) -> Facts:
    """What filters may look at, before the decode or after it."""
    return Facts(
        num_bytes=row.num_bytes,
        width=row.width,
        height=row.height,
        orientation=row.orientation,
        captions=row.captions,
        num_frames=loaded.num_frames if loaded is not None else None,
        image=loaded.image if loaded is not None else None,
    )


def first_rejection(filters: Sequence[BoundFilter], scores: Values) -> tuple[str, str, str] | None:
    """(status, reason, detail) by the first filter that does not admit the row."""
    for one in filters:
        rejection = one.admit(scores)
        if rejection is not None:
            return "rejected", rejection.reason, rejection.detail
    return None


def _scores_before(before: Decision | None, judged: Judged, plan: Plan) -> dict[str, Value]:
    """What the row scored before and still holds: scores of captions only as long as the same captions are left."""
    if before is None:
        return {}
    stale = {name for one in plan.filters if one.filter.looks_at == "captions" for name in one.filter.names}
    if before.caption_faults != judged.faults:
        stale |= caption_scores(plan)
    return {name: value for name, value in before.scores.items() if name not in stale}


def _early_rejection(judged: Judged, scores: Values, plan: Plan) -> tuple[str, str, str] | None:
    """(status, reason, detail) by the first filter on header or captions that does not admit the row."""
    header = [one for one in plan.filters if one.filter.looks_at == "header"]
    rejected = first_rejection(header, scores) if judged.row.kind != PROMPT else None
    if rejected is not None:
        return rejected
    rejection = caption_rejection(judged, plan)
    return ("rejected", rejection.reason, rejection.detail) if rejection is not None else None


def edit_texts(row: Row, known: frozenset[str]) -> tuple[str, ...]:
    """Instructions of an edit, and the empty one that stands in when they are dropped, that have no features yet."""
    if row.kind != EDIT:
        return ()
    sha256s = [one.sha256 for one in row.others]
    wanted = dict.fromkeys(("", *row.captions))
    return tuple(text for text in wanted if edit_caption_key(text, sha256s) not in known)


def _after_header(
    row: Row, scores: dict[str, Value], fitting: Mapping[int, Placement], state: UnitState, plan: Plan
) -> Assessment:
    filters, known = _pixel_filters(scores, plan)
    rejected = first_rejection(known, scores)
    if rejected is not None:
        return _decided(row, scores, *rejected)
    missing = tuple(r for r in fitting if row.row not in state.latents[plan.latents_facets[r]])
    texts = edit_texts(row, state.texts)
    if missing or texts or len(known) < len(filters):
        # An edit without text features could not be trained on, and these need its pictures.
        has_latents = any(row.row in rows for rows in state.latents.values()) and not texts
        return Assessment(
            row=row, scores=scores, placements=fitting, missing=missing, texts=texts, has_latents=has_latents
        )
    kept = Decision(status="kept", scores=scores)
    return Assessment(row=row, scores=scores, placements=fitting, decision=kept)


def _pixel_filters(scores: Values, plan: Plan) -> tuple[list[BoundFilter], list[BoundFilter]]:
    """Those on pixels, and of them those up to the first that has not scored the row."""
    filters = [one for one in plan.filters if one.filter.looks_at == "pixels"]
    return filters, list(takewhile(lambda one: one.scored(scores), filters))


def _lasting_fault(before: Decision | None) -> tuple[str, str, str] | None:
    if before is not None and before.status == "fault" and before.reason in LASTING:
        return before.status, before.reason, before.detail
    return None


def _without_scores(row: Row, plan: Plan) -> tuple[str, str, str] | None:
    if row.fault is not None:
        return "fault", row.fault, row.detail or ""
    if row.caption_fault is not None:
        return "fault", row.caption_fault, row.fault_detail or "no usable caption in the source"
    if row.kind == EDIT and plan.edit.template == "single" and len(row.others) > 1:
        detail = f"{len(row.others)} source pictures, and encode.edit.template=single takes one: plus takes several"
        return "rejected", "too_many_pictures", detail
    if row.duplicate_of >= 0:
        what = "same bytes as" if row.kind == IMAGE else "same pictures, and text where it counts, as"
        return "rejected", DUPLICATE, f"{what} row {row.duplicate_of}"
    if row.near_duplicate_of >= 0:
        detail = f"looks like row {row.near_duplicate_of}: {row.near_distance} of 64 bits differ"
        return "rejected", NEAR_DUPLICATE, detail
    return None


def _decided(row: Row, scores: Values, status: str, reason: str, detail: str) -> Assessment:
    decision = Decision(status=status, reason=reason, detail=detail, scores=scores)
    return Assessment(row=row, scores=scores, placements={}, decision=decision)
