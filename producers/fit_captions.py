"""Which rows of a unit have a caption that the caption filters leave: asked before duplicates are settled.

Place in the flow: part of a scan task, after the scan -> **captions-<id>** -> dedup. Captions need no picture, so what
the filters say of them is known before the first is opened; the tokenizer that some count by lives with the workers,
who run ahead, not with the driver. The facet's name is of the filters, so other thresholds are judged anew. The
decision on the row itself is `decide.py`'s, by the same `judge`.
"""

from __future__ import annotations

import pyarrow as pa

from producers.captions import caption_rejection, judge
from producers.commit import commit_part
from producers.filters.base import Scorers
from producers.plan import Plan
from producers.state import read_unsettled
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.schema import CAPTIONS_COLUMNS, LISTING


def judge_unit(dataset: Dataset, unit: int, *, plan: Plan, scorers: Scorers) -> None:
    """Judge the rows that were listed, or listed with other captions, since the last time; commits one part for them.

    Call after the unit's scan is committed.
    """
    facet = plan.dedup.captions_facet
    if facet is None:
        return
    listing, judged = dataset.unit_parts(LISTING, unit), dataset.unit_parts(facet, unit)
    num_judged = int(dataset.meta(judged[-1])["inputs"][LISTING]) if judged else 0
    newer = {row for part in listing[num_judged:] for row in dataset.read(part, ["row"])["row"].to_pylist()}
    known = set(dataset.merge(judged, ["row"])["row"].to_pylist()) - newer if judged else set()
    # Rows whose part `data repair` moved aside are in no newer part of the listing, and missing all the same.
    todo = [row for row in read_unsettled(dataset, unit) if row.row not in known]
    if judged and not todo:
        return
    answers = [(one.row.row, caption_rejection(one, plan) is None) for one in judge(todo, plan, scorers)]
    columns = [pa.array([row for row, _ in answers], pa.int64()), pa.array([fit for _, fit in answers], pa.bool_())]
    table = pa.Table.from_arrays(columns, schema=CAPTIONS_COLUMNS)
    extra = {"inputs": {LISTING: len(listing)}}
    commit_part(dataset, dataset.next_part(facet, unit), table, config_hash=plan.config_hash, extra=extra)
