"""What the order of samples depends on besides the data: phases, seed, selections, weights, the mix.

Place in the flow: the consumers make a `LedgerConfig` of the config, and a run's generations make their ledger by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qwenimg_dist.data.mix import Mix
from qwenimg_dist.data.phases import PlannedPhase
from qwenimg_dist.data.samples import Selection
from qwenimg_dist.data.where import compile_where


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """What holds for one of several data sets alone."""

    where: str | None = None
    """Narrows the run's."""
    caption_weights: Mapping[str, float] | None = None
    """In the place of the run's; None: those."""


@dataclass(frozen=True, kw_only=True)
class LedgerConfig:
    """What the order depends on besides the data."""

    phases: tuple[PlannedPhase, ...]
    seed: int
    caption_dropout: float
    where: str | None
    held_out: float
    max_held_out: int
    weights: Mapping[str, float] = field(default_factory=dict)
    """`where` expression -> how often its rows come per epoch; none: every row once."""
    caption_weights: Mapping[str, float] | None = None
    takedown: str | None = None
    """The list's file; read anew for each generation, see `takedown.py`."""
    mix: Mix | None = None
    """How several data sets mix; None: there is one."""
    of_dataset: Mapping[str, DatasetConfig] = field(default_factory=dict)
    """Data set -> what holds for it alone."""

    def selection(self, dataset: str, held_out_below: int) -> Selection:
        """What a run may train on of a data set."""
        own = self.of_dataset.get(dataset, DatasetConfig())
        wheres = [where for where in (self.where, own.where) if where]
        joined = wheres[0] if len(wheres) == 1 else " and ".join(f"({where})" for where in wheres)
        return Selection(
            where=compile_where(joined) if joined else None,
            held_out_below=held_out_below,
            weights=tuple((compile_where(text), weight) for text, weight in sorted(self.weights.items())),
            caption_weights=self.caption_weights if own.caption_weights is None else own.caption_weights,
        )
