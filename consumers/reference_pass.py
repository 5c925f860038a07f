"""The pass that computes the reference's errors before the first step, and the reference of a run in either way.

Place in the flow: the session asks `open_reference` between loading and the first step. With
`objective.reference=precomputed` the engine itself is the reference then, since it holds the starting weights: no
second model is ever needed. All ranks compute each block of pairs together, rank 0 commits it, and a stop or a kill
loses at most one block. Block and draw of a pair depend neither on ranks nor on batches. After the first step the
tables must be whole, as the starting weights are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from consumers.batch import MicroBatch
from consumers.engine import build_frozen
from consumers.errors import TrainingError
from consumers.objectives.base import Predict
from consumers.objectives.dpo import pair_draws, pair_errors
from consumers.reference_errors import Entries, ErrorTable, ReferenceErrors, entries_of
from consumers.run_directory import Prepared
from consumers.stream import Stream
from consumers.zero_engine import Engine
from qwenimg_dist.config import Config, DpoConfig, GrpoConfig
from qwenimg_dist.data.catalog import Catalog
from qwenimg_dist.data.generations import Generations
from qwenimg_dist.data.held_out import HeldOutBucket
from qwenimg_dist.data.where import compile_where
from qwenimg_dist.debug import fault_point
from qwenimg_dist.models.safetensors_directory import SafetensorsDirectory

FOLDER: Final = "reference"
VERSION: Final = 1
_TOLD_EVERY: Final = 20


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What the pass needs of the surroundings."""

    stage: Callable[[str], None]
    say: Callable[[str], None]
    """Rank 0's."""
    stop: Callable[[], None]
    """Raises if a stop was asked for; collective."""


def open_reference(
    config: Config,
    prepared: Prepared,
    model: Mapping[str, Any],
    engine: Engine,
    generations: Generations,
    stream: Stream,
    *,
    step: int,
    stack: ExitStack,
    watch: Watch,
) -> Predict | None:
    """What the objective needs: a frozen model's call, or None with the errors given to the stream. Collective."""
    objective = config.objective
    if isinstance(objective, DpoConfig) and objective.reference == "precomputed":
        _precomputed(config, objective, prepared, engine, generations, stream, step=step, watch=watch)
        return None
    if isinstance(objective, DpoConfig) or (isinstance(objective, GrpoConfig) and objective.kl_weight):
        start = prepared.start
        if start is not None and start.source is None:
            raise ValueError(
                f"the reference is the weights that the run started from, and {start.told} is gone ({start.fault}): "
                "restore it, or give where every rank finds it now as start_from"
            )
        source = start.source if start is not None else None
        frozen = build_frozen(
            model, config, engine.ranks, source or SafetensorsDirectory(prepared.pipeline / "transformer")
        )
        stack.callback(frozen.close)
        return frozen.predict
    return None


def _precomputed(
    config: Config,
    objective: DpoConfig,
    prepared: Prepared,
    engine: Engine,
    generations: Generations,
    stream: Stream,
    *,
    step: int,
    watch: Watch,
) -> None:
    """Compute what is missing of the errors, and give all of them to the stream. Collective."""
    tables = list(_tables(config, objective, prepared, generations))
    incomplete = engine.ranks.on_first(lambda: [len(table.missing()) for table in tables])
    if step > 0 and not engine.ranks.on_first(lambda: all(table.complete for table in tables)):
        raise ValueError(
            f"the reference's errors are gone from {tables[0].folder.parent}: they are of the starting weights, which "
            f"step {step} has left. Restore the folder, give it as objective.reference_path, or start anew with "
            "train.fresh=true"
        )
    if any(incomplete):
        num = sum(len(table.entries) for table in tables)
        watch.say(f"computing the reference's errors on {num:,} pairs, at {objective.draws} draws each")
    for table, missing in zip(tables, incomplete, strict=True):
        if missing:
            _compute(config, objective, table, engine, generations, stream, watch)
        engine.ranks.on_first(table.join)
    catalogs = generations.catalogs
    stream.reference = engine.ranks.together(lambda: ReferenceErrors(catalogs, tables))


def _tables(config: Config, objective: DpoConfig, prepared: Prepared, generations: Generations) -> Sequence[ErrorTable]:
    root = Path(objective.reference_path) if objective.reference_path else prepared.run_dir / FOLDER
    assert objective.draws is not None
    found = []
    for line, index in generations.firsts():
        catalog = generations.catalogs[index]
        selection = generations.config.selection(line.dataset, line.held_out_below)
        for resolution in sorted({r for phase in prepared.ledger.phases for r in phase.weights}):
            mask = catalog.key_hash >= np.uint64(selection.held_out_below)
            if selection.where is not None:
                mask &= selection.where.mask(catalog.columns, catalog.num_rows)
            mask &= _of_phases(prepared, resolution, catalog)
            entries = entries_of(catalog, index, resolution, mask)
            about = _about(config, objective, prepared, line.digest, entries, catalog)
            found.append(ErrorTable(root, about, entries, objective.draws))
    return found


def _of_phases(prepared: Prepared, resolution: int, catalog: Catalog) -> npt.NDArray[np.bool_]:
    """Rows that some phase of this class may take."""
    mask = np.zeros(catalog.num_rows, dtype=np.bool_)
    for phase in prepared.ledger.phases:
        if resolution in phase.weights:
            where = compile_where(phase.where) if phase.where else None
            mask |= where.mask(catalog.columns, catalog.num_rows) if where else True
    return mask


def _about(
    config: Config, objective: DpoConfig, prepared: Prepared, digest: str, entries: Entries, catalog: Catalog
) -> dict[str, Any]:
    """All that the errors depend on, but for rounding."""
    sigma = ("sigma_density", "sigma_mean", "sigma_std", "sigma_mode_scale", "shift", "shift_constant")
    return {
        "version": VERSION,
        "reference": prepared.model_fingerprint,
        "precision": config.engine.precision,
        "data": digest,
        "resolution": entries.resolution,
        "facet": catalog.latents[entries.resolution].facet,
        "entries": _digest(entries),
        "draws": objective.draws,
        "seed": config.train.seed,
        "sigma": {name: getattr(objective, name) for name in sigma},
    }


def _digest(entries: Entries) -> list[int]:
    """Tells selections of one catalog apart."""
    captions = entries.captions.astype(np.uint64)
    mixed = (captions + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    return [len(entries), int(captions.sum()), int(np.bitwise_xor.reduce(mixed, initial=np.uint64(0)))]


def _compute(
    config: Config,
    objective: DpoConfig,
    table: ErrorTable,
    engine: Engine,
    generations: Generations,
    stream: Stream,
    watch: Watch,
) -> None:
    """Every block that is missing, the next one read while one is computed."""
    ranks, entries = engine.ranks, table.entries
    todo: list[int] = ranks.on_first(table.missing)
    blocks = entries.blocks()
    budget = min(budgets_of(config, entries.resolution))

    def begin(position: int) -> Any:
        group = _group(generations, entries, blocks[todo[position]])
        return stream.begin_pairs(group, micro_batch_tokens=budget)

    engine.train(False)
    pending = begin(0)
    for position, number in enumerate(todo):
        watch.stage("reading pairs for the reference")
        batches: list[MicroBatch] = ranks.together(pending.result)
        if position + 1 < len(todo):
            pending = begin(position + 1)
        watch.stage("the reference's errors")
        size = blocks[number].stop - blocks[number].start
        errors, found = _errors(engine, objective, config.train.seed, batches, size)
        if not np.isfinite(errors[found]).all():
            group = _group(generations, entries, blocks[number])
            wrong = np.flatnonzero(found & ~np.isfinite(errors).all(axis=(1, 2)))
            key = generations.catalogs.keys(group.rows[np.isin(group.slots, wrong[:1])])[0]
            raise TrainingError(
                f"the reference's error of pair {key} at {entries.resolution} px is not finite: look at this pair, "
                "which data.takedown can leave out, and at the starting weights"
            )
        errors[~found] = np.nan
        fault_point("reference_block")
        ranks.on_first(lambda: table.write(number, errors.astype(np.float32)))  # noqa: B023 - called at once
        if (position + 1) % _TOLD_EVERY == 0 or position + 1 == len(todo):
            watch.say(f"reference at {entries.resolution} px: block {position + 1} of {len(todo)}")
        if position + 1 < len(todo):
            watch.stop()
    engine.train()


def budgets_of(config: Config, resolution: int) -> list[int]:
    """Token budgets of the phases that train at a class."""
    return [phase.micro_batch_tokens for phase in config.curriculum.phases if resolution in phase.resolutions]


def _group(generations: Generations, entries: Entries, where: slice) -> HeldOutBucket:
    """A block as the stream takes sets of samples: by text length, numbered as in the block."""
    catalogs, catalog = generations.catalogs, generations.catalogs[entries.catalog]
    texts = np.asarray(catalog.caption_text)[entries.captions[where]].astype(np.int64)
    order = np.argsort(catalog.text_tokens[texts], kind="stable")
    return HeldOutBucket(
        resolution=entries.resolution,
        bucket=entries.buckets[int(entries.bucket[where.start])],
        rows=entries.rows[where][order] + catalogs.row_base(entries.catalog),
        texts=texts[order] + catalogs.text_base(entries.catalog),
        slots=order.astype(np.int64),
    )


@torch.no_grad()
def _errors(
    engine: Engine, objective: DpoConfig, seed: int, batches: Sequence[MicroBatch], size: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """(size, K, 2) errors of a block, on every rank, and (size,) which pairs were readable. Collective."""
    draws = objective.draws
    assert draws is not None
    errors = np.zeros((size, draws, 2))
    found = np.zeros(size)
    for micro in (one.to(engine.ranks.device) for one in batches):
        assert micro.numbers is not None
        real = np.flatnonzero(micro.weights.cpu().numpy() > 0)
        at = micro.slots.cpu().numpy()[real]
        found[at] = 1
        numbers, shape, tokens = micro.numbers.tolist(), micro.latents.shape[1:], micro.bucket.image_tokens
        for draw in range(draws):
            sigma, noise = pair_draws(objective, seed, numbers, [draw] * len(numbers), shape, tokens)
            made = pair_errors(engine.predict, micro, sigma.to(engine.ranks.device), noise.to(engine.ranks.device))
            errors[at, draw] = made.double().cpu().numpy()[:, real].T
    # One rank has each pair, the others add nought: the sum is exact.
    summed = np.array(engine.ranks.sum([*errors.ravel().tolist(), *found.tolist()]))
    return summed[: errors.size].reshape(errors.shape), summed[errors.size :] > 0
