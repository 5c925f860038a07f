"""Committing a part that nobody else may have committed meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from qwenimg_dist.data.facets import Dataset, Part, Tar


class UnitConflictError(RuntimeError):
    """Another worker committed this part first (a unit given up as hung, which went on). Try the unit again: what is
    missing is decided anew, from what is committed now."""


def commit_part(
    dataset: Dataset,
    part: Part,
    table: pa.Table,
    *,
    config_hash: str,
    tars: Sequence[Tar] = (),
    extra: Mapping[str, Any] | None = None,
) -> None:
    """`Dataset.commit`, but an existing part raises `UnitConflictError`: its content is not what we computed."""
    if not dataset.commit(part, table, config_hash=config_hash, tars=tars, extra=extra):
        for tar in tars:
            dataset.tar(part.facet, tar.name).unlink(missing_ok=True)
        raise UnitConflictError(f"{part.stem} of {part.facet} was committed by somebody else meanwhile")
