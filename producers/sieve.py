"""Opens pictures of a unit one at a time, before the unit is encoded or judged, to find those that kill the process.

Place in the flow: part of a careful task (see `poison.py`). Each picture goes through all that the unit pipeline does
with it alone: decode, every filter, the cut to its buckets; results are thrown away. The encoders are not loaded yet,
so a further death costs little. The unit is then encoded by `produce_unit` as ever.
"""

from __future__ import annotations

from collections.abc import Sequence

from producers.decide import Assessment
from producers.filters.base import Scorers
from producers.plan import Plan
from producers.poison import Watch, record_poison
from producers.unit import ask_models, cut, open_row
from qwenimg_dist.data.facets import Dataset


def sieve_unit(
    dataset: Dataset,
    unit: int,
    known: Sequence[Assessment],
    *,
    plan: Plan,
    root: str,
    scorers: Scorers,
    watch: Watch,
) -> None:
    """Open the rows that have no decision yet, then record what killed earlier tries. May well end this process."""
    todo = [one for one in known if one.decision is None]
    # Loaded before any picture is open: a death while loading is not a picture's.
    scorers.load([one for one in plan.filters if one.filter.load is not None])
    with watch:
        for one in todo:
            if one.row.row in watch.poison:
                continue
            watch.opening(one.row.row)
            for opened in ask_models([open_row(one, plan, root)], plan, scorers):
                for _ in cut(opened, plan):
                    pass
    record_poison(dataset, unit, watch.poison, config_hash=plan.config_hash)
    watch.forget()
