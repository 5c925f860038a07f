"""A run's data at its start and while producers follow: data sets waited for, generations checked, the stream opened.

Place in the flow: the session opens the data here, and the trainer waits here for the batch of a step that producers
have not made yet. Whatever rank 0 refuses is raised on every rank.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import torch

from consumers.hooks import Hooks, Stopped, say_once
from consumers.objectives import is_guided, rows_per_sample
from consumers.ranks import Ranks
from consumers.run_directory import Prepared
from consumers.run_plan import make_plan, write_plan
from consumers.stream import Stream, pictures_of
from qwenimg_dist.config import Config
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.data.generation_log import FILE as GENERATIONS_FILE
from qwenimg_dist.data.generation_log import read_lines
from qwenimg_dist.data.generations import Generations
from qwenimg_dist.data.replay import take_over

_POLL_S: Final = 1.0


def _nothing() -> None:
    return None


def await_batch(
    generations: Generations, ranks: Ranks, hooks: Hooks, step: int, meanwhile: Callable[[], None] = _nothing
) -> None:
    """Return when the ledger has the batch of `step` on every rank. Collective. Raises `Stopped` if asked to.

    `meanwhile` is called on every rank, again and again while producers are waited for, which may take hours; it may be
    collective.
    """
    waiting = False
    while not generations.settled:
        answer = ranks.on_first(lambda: [generations.advance(step), generations.count])
        if answer[0] == "ready":
            ranks.together(partial(generations.refresh, answer[1]))
            return
        if ranks.any(hooks.stop_requested()):
            raise Stopped
        meanwhile()
        hooks.stage("waiting for producers")
        if not waiting:
            say_once(ranks, hooks, f"step {step}: waiting for producers")
        waiting = True
        time.sleep(_POLL_S)


def open_data(
    config: Config,
    prepared: Prepared,
    ranks: Ranks,
    hooks: Hooks,
    step: int,
    known: int,
    stack: contextlib.ExitStack,
) -> tuple[Generations, Stream]:
    """The data sets' generations and this rank's stream, waited for where there are none yet. Collective."""
    waiting = False
    dirs = prepared.data_dirs
    while not ranks.on_first(lambda: all(Dataset.is_there(folder) for folder in dirs.values())):
        hooks.stage("waiting for a data set")
        if not waiting:
            say_once(ranks, hooks, f"waiting for a data set in {', '.join(map(str, dirs.values()))}")
        waiting = True
        if ranks.any(hooks.stop_requested()):
            raise Stopped
        time.sleep(_POLL_S)
    datasets = ranks.together(lambda: {name: Dataset.open(folder) for name, folder in dirs.items()})
    generations = Generations(
        prepared.run_dir,
        datasets,
        prepared.facets,
        prepared.ledger,
        follow=config.follow,
        max_ahead_bytes=config.cluster.max_ahead_bytes,
    )
    stack.callback(generations.close)
    ranks.on_first(lambda: _check_generations(config, generations, known, prepared.run_dir, hooks))
    await_batch(generations, ranks, hooks, min(step, config.train.steps - 1))
    if note := ranks.on_first(lambda: generations.not_yet_taken_down):
        say_once(ranks, hooks, f"warning: {note}")
    if note := ranks.on_first(lambda: generations.takedown_matches_nothing):
        say_once(ranks, hooks, f"warning: {note}")
    stream = Stream(
        generations.ledger,
        rank=ranks.rank,
        world=ranks.world_size,
        compute_dtype=torch.bfloat16 if config.engine.precision == "bf16" else torch.float32,
        pin_memory=ranks.device.type == "cuda",
        further=prepared.facets.further,
        tolerant=config.data.max_bad_samples > 0,
        repeat=rows_per_sample(config),
        guided=is_guided(config),
    )
    stack.callback(stream.close)
    return generations, stream


def tell_plan(config: Config, generations: Generations, ranks: Ranks, hooks: Hooks, step: int) -> None:
    """Print the plan at the start of a run, warnings at every start, and keep it as `plan.json`."""
    plan = make_plan(
        generations.ledger,
        config.optim,
        world_size=ranks.world_size,
        complete=generations.settled,
        pictures=pictures_of(generations.facets.further, guided=is_guided(config)),
        repeat=rows_per_sample(config),
    )
    write_plan(plan, generations.run)
    for line in plan.text().splitlines() if step == 0 else [f"warning: {warning}" for warning in plan.warnings()]:
        hooks.say(line)


def _check_generations(config: Config, generations: Generations, known: int, run_dir: Path, hooks: Hooks) -> None:
    if config.train.replay_generations:
        file = Path(config.train.replay_generations)
        hooks.say(f"replaying {take_over(run_dir, file)} generations of {file}")
    generations.verify(tars=config.data.max_bad_samples == 0)
    recorded = len(read_lines(run_dir / GENERATIONS_FILE)[0])
    if recorded < known:
        raise ValueError(
            f"{run_dir / GENERATIONS_FILE} records {recorded} generations, the checkpoint was written "
            f"after {known}: without them the order of samples would change. Restore the file, or take another run.path"
        )
