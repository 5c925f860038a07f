"""Which rows of a data set get pictures on the contact sheet: a fair sample, one page, or what an expression selects.

Place in the flow: `data inspect` asks this first. All work per row is numpy; a million rows take well under a second.
A sample gives half of its places to kept rows and half to the others, which share theirs among the reasons, so that a
rare reason is seen too; what is left out is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qwenimg_dist.config import InspectConfig
from qwenimg_dist.data.row_columns import Pairs, RowColumns
from qwenimg_dist.data.where import compile_where
from qwenimg_dist.report.contact_sheet import Cluster

Group = tuple[str, str]
"""(status, reason)."""
Ints = npt.NDArray[np.int64]

_CLUSTER_ROWS: Final = 8
_MAX_REASONS_SAID: Final = 6


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Rows to show, and how many there are of each kind."""

    rows: Ints
    """Ascending."""
    selected: npt.NDArray[np.bool_]
    """Over all decided rows: what `inspect.where` and `inspect.reason` select."""
    there: dict[Group, int]
    """Selected rows."""
    shown: dict[Group, int]
    asked_for: str
    """The selection in words; empty where all rows are selected."""
    page: int | None = None
    num_pages: int = 1

    @property
    def said(self) -> tuple[str, ...]:
        """What the page says about its selection, and about rows it does not show."""
        return tuple(filter(None, (self._selection, self._left_out)))

    @property
    def _selection(self) -> str:
        if not self.asked_for:
            return ""
        kept = sum(count for (status, _), count in self.there.items() if status == "kept")
        return (
            f"Only {self.asked_for}: {sum(self.there.values()):,} of {len(self.selected):,} decided rows, {kept:,} of "
            "them kept. Training takes kept rows only."
        )

    @property
    def _left_out(self) -> str:
        there, shown = sum(self.there.values()), sum(self.shown.values())
        if shown == there:
            return ""
        if self.page is not None:
            return f"Page {self.page:,} of {self.num_pages:,} (inspect.page), in order of rows."
        groups = sorted(self.there.items(), key=lambda item: -item[1])
        kinds = [f"{self.shown[group]:,} of {count:,} {' '.join(filter(None, group))}" for group, count in groups]
        if len(kinds) > _MAX_REASONS_SAID:
            kinds[_MAX_REASONS_SAID:] = [f"{len(kinds) - _MAX_REASONS_SAID} other reasons"]
        return (
            f"A sample, evenly spaced: {shown:,} of {there:,} rows ({', '.join(kinds)}). inspect.max_rows shows more, "
            "inspect.page=1 goes through all, inspect.where or inspect.reason selects."
        )


def choose(columns: RowColumns, config: InspectConfig) -> Choice:
    """Raises ValueError for a page that is not there, `WhereError` for an unusable expression."""
    selected, asked_for = _selected(columns, config)
    positions = np.flatnonzero(selected)
    groups = _groups(columns, positions)
    there = {group: len(members) for group, members in groups.items()}
    if config.page is None:
        shown = allot(there, config.max_rows)
        chosen = [_evenly(groups[group], count) for group, count in shown.items()]
        picked = np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)
        return Choice(rows=columns.rows[picked], selected=selected, there=there, shown=shown, asked_for=asked_for)
    num_pages = max(1, -(-len(positions) // config.max_rows))
    if config.page > num_pages:
        raise ValueError(
            f"inspect.page={config.page}: there are {num_pages} pages of {config.max_rows} rows (inspect.max_rows)"
        )
    picked = positions[(config.page - 1) * config.max_rows : config.page * config.max_rows]
    shown = {group: len(members) for group, members in _groups(columns, picked).items()}
    return Choice(
        rows=columns.rows[picked],
        selected=selected,
        there=there,
        shown=shown,
        asked_for=asked_for,
        page=config.page,
        num_pages=num_pages,
    )


def allot(there: Mapping[Group, int], places: int) -> dict[Group, int]:
    """Places per group: half for kept rows, half for the others, shared evenly; what one does not need, others get."""
    kept = {group: count for group, count in there.items() if group[0] == "kept"}
    lost = {group: count for group, count in there.items() if group[0] != "kept"}
    for_lost = min(sum(lost.values()), max(places // 2, places - sum(kept.values())))
    return _share(kept, places - for_lost) | _share(lost, for_lost)


def clusters(columns: RowColumns, choice: Choice, found: Sequence[Pairs], limit: int) -> list[Cluster]:
    """The largest clusters of duplicates, `limit` of each kind, that have a selected row."""
    selected = columns.rows[choice.selected]
    shown: list[Cluster] = []
    for pairs in found:
        mine = np.isin(pairs.rows, selected) | np.isin(pairs.originals, selected)
        originals, sizes = np.unique(pairs.originals[mine], return_counts=True)
        for index in np.lexsort((originals, -sizes))[:limit].tolist():
            members = np.flatnonzero(pairs.originals == originals[index])
            some = members[: _CLUSTER_ROWS - 1]
            shown.append(
                Cluster(
                    kind=pairs.name,
                    rows=(int(originals[index]), *pairs.rows[some].tolist()),
                    distances=(0, *pairs.distance[some].tolist()),
                    size=len(members) + 1,
                )
            )
    return shown


def _selected(columns: RowColumns, config: InspectConfig) -> tuple[npt.NDArray[np.bool_], str]:
    selected = np.ones(len(columns.rows), dtype=np.bool_)
    asked_for = []
    if config.where is not None:
        selected &= _where_mask(config.where, columns)
        asked_for.append(config.where)
    if config.reason is not None:
        reasons = [reason for reason in columns.counts("reason") if reason]
        if config.reason not in reasons:
            raise ValueError(f"inspect.reason={config.reason}: no row has it; there is: {', '.join(reasons) or 'none'}")
        selected &= columns.is_word("reason", config.reason)
        asked_for.append(f"reason {config.reason}")
    return selected, " and ".join(asked_for)


def _where_mask(expression: str, columns: RowColumns) -> npt.NDArray[np.bool_]:
    """Among kept rows exactly what training would select; a share of the best (`top`) is of kept rows only there."""
    where = compile_where(expression)
    kept = columns.is_word("status", "kept")
    mask = where.mask(columns.columns, len(columns.rows))
    mask[kept] = where.mask(_Some(columns.columns, kept), int(kept.sum()))
    return mask


class _Some(Mapping[str, npt.NDArray[Any]]):
    """Columns of some of the rows; none is copied before it is asked for."""

    def __init__(self, columns: Mapping[str, npt.NDArray[Any]], rows: npt.NDArray[np.bool_]) -> None:
        self._columns, self._rows = columns, rows

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        some: npt.NDArray[Any] = self._columns[name][self._rows]
        return some

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


def _groups(columns: RowColumns, positions: npt.NDArray[np.intp]) -> dict[Group, npt.NDArray[np.intp]]:
    """(status, reason) -> ascending positions."""
    statuses, reasons = columns.words["status"], columns.words["reason"]
    codes = columns.arrays["status"][positions].astype(np.int64) * len(reasons) + columns.arrays["reason"][positions]
    return {
        (statuses[code // len(reasons)], reasons[code % len(reasons)]): positions[codes == code]
        for code in np.unique(codes).tolist()
    }


def _evenly(members: npt.NDArray[np.intp], count: int) -> npt.NDArray[np.intp]:
    if count >= len(members):
        return members
    return members[np.linspace(0, len(members) - 1, count).astype(np.int64)]


def _share(there: Mapping[Group, int], places: int) -> dict[Group, int]:
    """Evenly, but to none more than it has: the small groups first, the rest shares what they leave."""
    shares: dict[Group, int] = {}
    order = sorted(there.items(), key=lambda item: item[1])
    for position, (group, count) in enumerate(order):
        shares[group] = min(count, places // (len(order) - position))
        places -= shares[group]
    return shares
