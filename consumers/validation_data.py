"""The data set that a run validates on where that is another than it trains on (`evaluate.data_path`).

Place in the flow: `baseline.py` asks here before it makes the held-out set. Its rows are pinned once, as a generation
of their own in `RUN/validation`, so that a resumed run measures on the same samples or is refused. Which rows are held
out follows from `data.held_out` and `data.max_held_out` as for a run that trains on that data set, so that what was
held out there is held out here. Refuses a data set that holds no images for this model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from consumers.ranks import Ranks
from consumers.run_directory import Prepared
from qwenimg_dist.config import Config
from qwenimg_dist.data.catalog import RunFacets
from qwenimg_dist.data.facets import DataError, Dataset
from qwenimg_dist.data.generations import Generations
from qwenimg_dist.data.ledger_config import LedgerConfig
from qwenimg_dist.data.mirror import data_root
from qwenimg_dist.data.phases import PlannedPhase
from qwenimg_dist.data.pins import ready_units, why_not_ready
from qwenimg_dist.models.identity import latents_facet_names, text_facet_name
from qwenimg_dist.schema import PROMPT

FOLDER: Final = "validation"


def validation_generations(
    config: Config, prepared: Prepared, generations: Generations, ranks: Ranks
) -> Generations | None:
    """Where held-out samples come from; None where there are none. Collective."""
    if config.evaluate.data_path is None:
        return None if prepared.facets.kind == PROMPT else generations
    made: Generations = ranks.together(
        lambda: _open(config, prepared, data_root(str(config.evaluate.data_path), config.data))
    )
    count = ranks.on_first(lambda: _advanced(made, tars=config.data.max_bad_samples == 0))
    ranks.together(lambda: made.refresh(count))
    return made


def for_measuring(phases: Sequence[PlannedPhase]) -> tuple[PlannedPhase, ...]:
    """Without what narrows them, which is of the rows that the run trained on: other data may lack the columns."""
    return tuple(replace(phase, where=None, row_weights={}, mix=None) for phase in phases)


def _open(config: Config, prepared: Prepared, folder: Path) -> Generations:
    latents = latents_facet_names(prepared.pipeline, config)
    classes = sorted({resolution for phase in prepared.ledger.phases for resolution in phase.weights})
    if missing := sorted(set(classes) - set(latents)):
        raise ValueError(f"evaluate.data_path is measured at {missing} px, which encode.resolutions lacks: add it")
    facets = RunFacets(text=text_facet_name(prepared.pipeline, config), latents={r: latents[r] for r in classes})
    try:
        dataset = Dataset.open(folder)
        dataset.refresh()
        if not ready_units(dataset, facets):
            raise DataError(why_not_ready(dataset, facets))
    except DataError as error:
        raise DataError(f"evaluate.data_path: {error}") from error
    ledger = LedgerConfig(
        phases=for_measuring(prepared.ledger.phases),
        seed=config.train.seed,
        caption_dropout=0.0,
        where=None,
        held_out=config.data.held_out,
        max_held_out=config.data.max_held_out,
    )
    return Generations(prepared.run_dir / FOLDER, dataset, facets, ledger, follow=False)


def _advanced(generations: Generations, *, tars: bool) -> int:
    generations.run.mkdir(exist_ok=True)
    generations.verify(tars=tars)
    generations.advance(0)
    return generations.count
