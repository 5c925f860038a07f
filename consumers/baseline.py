"""What a run is compared with: the held-out set and the starting model's errors on it.

Place in the flow: the session calls it between loading and the first step. At step 0 the engine holds the starting
model, which is measured and written down; a run that goes on reads it back. A run that begins again before its first
checkpoint, from another model, measures that one on the samples that it has. Deliberately left out: measuring the
starting model later, which would need a second copy of the weights.
"""

from __future__ import annotations

from collections.abc import Callable

from consumers.evaluate import HeldOut
from consumers.held_out import (
    START_LOSS,
    Start,
    differences,
    find_other_classes,
    make_held_out,
    not_validated,
    read_start,
    start_from_json,
)
from consumers.run_directory import Prepared
from consumers.stream import Stream
from consumers.validation_data import validation_generations
from consumers.zero_engine import Engine
from qwenimg_dist.config import Config
from qwenimg_dist.data.generations import Generations
from qwenimg_dist.files import write_json


def baseline(
    config: Config,
    prepared: Prepared,
    generations: Generations,
    stream: Stream,
    engine: Engine,
    step: int,
    *,
    say: Callable[[str], None],
    stage: Callable[[str], None],
) -> tuple[HeldOut, Start | None]:
    """The held-out set and what the starting model gave on it, measured at step 0 and read back later. Collective."""
    stage("the held-out set")
    ranks = engine.ranks
    if not config.evaluate.every:
        return HeldOut(config, {}, None), None
    measured = validation_generations(config, prepared, generations, ranks)
    if measured is None:
        say(
            "warning: prompts have no pictures to validate on, so nothing guards against degradation: give a data set "
            "of images as evaluate.data_path, or set evaluate.every=0"
        )
        return HeldOut(config, {}, None), None
    start = start_from_json(ranks.on_first(lambda: read_start(prepared.run_dir)))
    if start is not None and (kept := differences(config, start)):
        say(f"warning: the held-out set of a run is fixed, so it goes on with {kept}")
    budgets = {r: phase.micro_batch_tokens for phase in prepared.ledger.phases for r in phase.weights}
    others = ranks.on_first(lambda: find_other_classes(config, measured, start, set(budgets)))
    classes = ranks.together(lambda: make_held_out(config, measured, stream, start, budgets, others))
    if note := not_validated(list(measured.datasets), classes):
        say(f"warning: {note}")
    held_out = HeldOut(config, classes, start)
    model = prepared.model_fingerprint
    if step == 0 and (start is None or start.model != model):
        if start is not None and start.model:
            say("warning: the held-out losses at the start were of another model, this one's are measured instead")
        found = held_out.measure(engine, None, lambda: stage("the starting model's held-out losses"))
        start = held_out.start_of(found, model)
        ranks.on_first(lambda: write_json(prepared.run_dir / START_LOSS, start.to_json()))
    elif start is None:
        say("warning: nothing was measured at step 0, so nothing guards against degradation")
    return held_out, start
