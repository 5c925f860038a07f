"""The chain of stages that a checkpoint came out of, from its certificate alone: run by run back to the first model.

Place in the flow: `ckpt list` and the run's report show it, `eval` finds by it what to compare with. A certificate
holds those of its ancestors, so the chain can be told where their directories are gone. Invents nothing: what an older
certificate did not note down is left open.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwenimg_dist.report.table import Table


@dataclass(frozen=True, kw_only=True)
class Ancestor:
    """Weights that a run started from."""

    path: str
    """The checkpoint they were, or the directory of the pipeline."""
    fingerprint: str | None
    """Of these weights, as the run that started from them noted it."""
    stage: str | None = None
    """Stage of the run whose checkpoint it was; None of a model that no run here has made."""
    step: int | None = None
    weights: str | None = None
    """`ema` or `raw`."""
    data: str | None = None
    """Fingerprint of the data that the run had been trained on by then."""
    model: str | None = None
    """Name and revision, of the first in the chain."""


def ancestors(lineage: Mapping[str, Any] | None) -> list[Ancestor]:
    """From the nearest to the first model. Empty if nothing was noted down."""
    found: list[Ancestor] = []
    while lineage:
        parent = lineage.get("parent")
        if not parent:
            revision = f" at {str(lineage['revision'])[:12]}" if lineage.get("revision") else ""
            model = f"{lineage.get('model')}{revision}"
            found.append(Ancestor(path=str(lineage.get("path")), fingerprint=lineage.get("fingerprint"), model=model))
            break
        theirs = parent.get("lineage")
        found.append(
            Ancestor(
                path=str(parent.get("run")),
                fingerprint=lineage.get("fingerprint"),
                stage=(theirs or {}).get("stage"),
                step=parent.get("step"),
                weights=parent.get("weights"),
                data=parent.get("data"),
            )
        )
        lineage = theirs
    return found


def lineage_table(certificate: Mapping[str, Any]) -> Table:
    """One row per stage, this run first; `trained on` is the data that led to the weights of that row."""
    lineage, run = certificate.get("lineage"), certificate.get("run") or {}
    own = (lineage or {}).get("stage")
    rows = [("this run", own or "-", str(run.get("path", "-")), "-", "-", "-", _data(certificate))]
    for one in ancestors(lineage):
        weights = f"step {one.step}, {one.weights or '?'}" if one.step is not None else "-"
        what = (one.stage or "-", one.path, weights)
        rows.append(("from", *what, one.fingerprint or "-", one.model or "-", one.data or "-"))
    columns = ("", "stage", "path", "weights", "fingerprint", "model", "trained on")
    return Table(title="Lineage", columns=columns, rows=tuple(rows))


def lineage_tables(certificates: Mapping[int, Mapping[str, Any]]) -> list[Table]:
    """The lineage of a run's checkpoints by step, newest first; once for all that share it."""
    tables: list[Table] = []
    told: list[list[Ancestor]] = []
    for step, certificate in sorted(certificates.items(), reverse=True):
        chain = ancestors(certificate.get("lineage"))
        if not chain or chain in told:
            continue
        told.append(chain)
        table = lineage_table(certificate)
        title = table.title if len(told) == 1 else f"Lineage of step {step} and before"
        tables.append(Table(title=title, columns=table.columns, rows=table.rows))
    return tables


def _data(certificate: Mapping[str, Any]) -> str:
    return str((certificate.get("data") or {}).get("fingerprint", "-"))
