"""What a run is watched by besides its loss: held-out losses, the guard, sample grids, norms.

Place in the flow: the trainer calls these at every step; each knows when it is due, a pure function of the step, so
that all ranks make the same forwards and collectives. Refuses nothing, decides nothing: the guard's verdict is read by
the loop.
"""

from __future__ import annotations

from functools import partial

from consumers.edit_grids import draw_edits
from consumers.evaluate import WORST_COLUMNS, weights_of
from consumers.held_out import Errors
from consumers.norms import block_norms
from consumers.session import Session


def due_norms(session: Session) -> dict[str, float]:
    """Norms per block of the step that is about to be made, if it is due. Collective."""
    every = session.config.train.norms_every
    return block_norms(session.engine) if every and (session.progress.step + 1) % every == 0 else {}


def evaluate(session: Session, phase: int, *, last: bool) -> dict[str, float]:
    """Grids and held-out losses if due; the guard and the table of the worst samples go by the first weights."""
    config, step, held_out = session.config.evaluate, session.progress.step, session.held_out
    if config.grid_every and (step % config.grid_every == 0 or last):
        draw_grids(session)
    if not config.every or not (step % config.every == 0 or last) or not held_out.classes:
        return {}
    start = session.start.errors if session.start else None
    found: dict[str, float] = {}
    for index, (name, ema) in enumerate(weights_of(session.config, session.ema)):
        tell = partial(session.hooks.stage, f"held-out losses, {name} weights")
        measured = held_out.measure(session.engine, ema, tell)
        errors, trained = measured.errors, session.resolutions[phase]
        prefix = "eval/" if index == 0 else f"eval/{name}/"
        found |= held_out.metrics(errors, trained, start, prefix=prefix)
        found |= held_out.pairs(measured, trained, session.start, prefix=prefix)
        if index == 0 and (step % config.every == 0 or step == session.config.train.steps):
            # Not at a stop in between: a run in pieces must not be judged more often than one in a piece.
            _judge(session, phase, errors)
        if index == 0 and session.log:
            session.log.table(step, "worst_held_out", WORST_COLUMNS, held_out.worst(errors, start))
    return {**found, **session.guard.metrics()}


def _judge(session: Session, phase: int, errors: Errors) -> None:
    losses = {resolution: float(one.mean()) for resolution, one in errors.items()}
    warning = session.guard.look(session.progress.step, losses, _trained(session, phase))
    if warning and session.ranks.is_first:
        session.hooks.say(f"warning: {warning}")


def _trained(session: Session, phase: int) -> dict[int, str]:
    """What the guard says of a class."""
    ever = {resolution for classes in session.resolutions.values() for resolution in classes}
    words = dict.fromkeys(session.held_out.classes, "not trained")
    words |= dict.fromkeys(ever, "trained in another phase")
    return words | dict.fromkeys(session.resolutions[phase], "trained in this phase")


def draw_grids(session: Session) -> None:
    """The fixed prompts and edits by the weights that are looked at, each its own file."""
    if session.grids is None:
        return
    phases, step = session.prepared.ledger.phases, session.progress.step
    phase = next(phase for phase in reversed(phases) if phase.first_step <= max(0, step - 1) < phase.last_step)
    resolution = max(phase.weights)
    batch_size = max(1, phase.micro_batch_tokens // (2 * (resolution // 16) ** 2))
    weights = weights_of(session.config, session.ema)
    for index, (name, ema) in enumerate(weights[: 1 if step == 0 else None]):  # at the start they are the same
        session.hooks.stage(f"sample grid, {name} weights")
        label = "samples" if index == 0 else f"samples-{name}"
        drawn = session.grids.draw(
            session.engine, ema, step=step, suffix=label[7:], resolution=resolution, batch_size=batch_size
        )
        if session.log and drawn:
            session.log.picture(step, label, drawn.file)
            session.log.prompts(step, f"{label}_by_prompt", drawn.prompts, drawn.pictures)
        file = draw_edits(session, ema, resolution=resolution, suffix=label[7:])
        if session.log and file:
            session.log.picture(step, f"edits{label[7:]}", file)
