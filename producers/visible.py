"""What one machine committed is not always seen by another at once: how many parts there are is told, and waited for.

Place in the flow: a task says how many parts of its unit the driver knows of, an outcome how many the worker left;
whoever reads next waits until it sees as many. An NFS client remembers for half a minute that a name it once asked for
was not there (mount option `lookupcache=positive` turns that off); a scan that is not seen would be made again or end
the command, near duplicates that are not seen would be kept. Refuses to go on where parts do not appear. Told are only
facets that the teller has committed itself, or was told of: to ask for what another machine is about to commit makes
this one remember that it is not there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

from producers.plan import Plan
from qwenimg_dist.data.facets import DataError, Dataset
from qwenimg_dist.schema import LISTING, ROWS, SCAN

_VISIBLE_S: Final = 90.0
"""NFS clients ask a directory anew after 30 to 60 s."""
_POLL_S: Final = 0.2


def parts_of_driver(dataset: Dataset, unit: int, plan: Plan) -> dict[str, int]:
    """Facet -> parts of the unit, of what the driver commits."""
    near = (plan.near.facet,) if plan.near is not None else ()
    return {facet: len(dataset.unit_parts(facet, unit)) for facet in (LISTING, plan.dedup.facet, *near)}


def parts_of_workers(dataset: Dataset, unit: int, plan: Plan) -> dict[str, int]:
    """Facet -> parts of the unit, of what workers commit and the driver or the next worker reads."""
    captions = (plan.dedup.captions_facet,) if plan.dedup.captions_facet is not None else ()
    return {facet: len(dataset.unit_parts(facet, unit)) for facet in (SCAN, ROWS, *captions)}


def wait_for_parts(dataset: Dataset, unit: int, parts: Mapping[str, int]) -> None:
    """Until as many parts of the unit are seen here. Raises `DataError` if they do not appear."""
    deadline = time.monotonic() + _VISIBLE_S
    while True:
        dataset.refresh_unit(unit)
        seen = {facet: len(dataset.unit_parts(facet, unit)) for facet in parts}
        late = [facet for facet, number in parts.items() if seen[facet] < number]
        if not late:
            return
        if time.monotonic() > deadline:
            raise DataError(
                f"unit {unit} of {dataset.root}: {parts[late[0]]} parts of {late[0]} were committed by another "
                f"machine, and after {_VISIBLE_S:g} s this one sees {seen[late[0]]}: it is no shared file system, or "
                "shows new files too late (NFS: mount it with lookupcache=positive)"
            )
        time.sleep(_POLL_S)
