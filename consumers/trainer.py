"""THE training loop: one for every stage and objective, under torchrun or Ray Train.

Place in the flow: ledger and stream give this rank's cut of the step's global batch, the objective a loss, the engine
an update. An objective that trains on the model's own pictures has them drawn first (`rollout.py`), and may make
several updates on them: that is one step all the same, and checkpoints fall between steps. Randomness is derived from
(seed, step, slot in the global batch), so that a repeated step is the same step, on any number of ranks. A step's
number is the count of steps done: line 100 of the logs, checkpoint 100 and grid 100 belong together. Deliberately left
out: a copy of this loop per stage, callbacks, a scheduler with state.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Final, Literal

import torch

from consumers.bad_samples import next_batch
from consumers.batch import RankBatch
from consumers.curriculum import lr_at
from consumers.engine import start_distributed, stop_distributed
from consumers.errors import DegradedError, TrainingError
from consumers.fault_dump import dump_keys
from consumers.hooks import Hooks, Stopped
from consumers.rank_log import rank_logged
from consumers.rollout import Round
from consumers.run_data import await_batch
from consumers.run_saves import check_log, save, settled, take_in
from consumers.session import Session, open_session
from consumers.updates import Updates, make_updates
from consumers.watch import draw_grids, evaluate
from consumers.watchdog import watched
from qwenimg_dist.config import Config
from qwenimg_dist.data.phases import phase_at
from qwenimg_dist.debug import fault_point

Outcome = Literal["complete", "stopped"]
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


def train(config: Config, hooks: Hooks | None = None) -> Outcome:
    """Train, or go on training, until `train.steps`, `train.stop_after` or a stop request; saved in each case.

    Every rank calls it, in the environment of torchrun. Raises ValueError for unusable input and `TrainingError` when
    `engine.max_skipped_steps` steps in a row were not finite, or (`DegradedError`, saved) when the guard stops the run.
    """
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_rank)))
    with (
        stop_signals(hooks or Hooks()) as hooks,
        watched(config, hooks) as hooks,
        rank_logged(config, hooks) as hooks,
        contextlib.ExitStack() as afterwards,
    ):
        try:
            hooks.stage("joining the other ranks")
            ranks = start_distributed(config.cluster.device, timeout_s=config.train.collective_timeout_s)
            with open_session(config, ranks, hooks) as session:
                if session.report:
                    afterwards.push(session.report.left)  # when no rank waits for this one any more
                with settled(session):
                    return _loop(session)
        except Stopped:
            return "stopped"
        finally:
            stop_distributed()


def _loop(session: Session) -> Outcome:
    config, ranks, engine, progress = session.config, session.ranks, session.engine, session.progress
    phases = session.prepared.ledger.phases
    last_step = min(config.train.steps, config.train.stop_after or config.train.steps)
    saved_step = progress.step
    if session.guard.verdict:
        raise DegradedError(session.guard.verdict)
    if progress.step == 0:
        draw_grids(session)

    while progress.step < last_step:
        # ---- Commit a save that all ranks have written; stop if any rank was asked to, saved below the loop.
        stop, *written = ranks.max([float(session.hooks.stop_requested()), *session.saver.flags()])
        take_in(session, *written)
        if stop:
            break

        # ---- Step -> phase -> this rank's cut of the global batch.
        try:
            await_batch(session.generations, ranks, session.hooks, progress.step, lambda: _take_in(session))
        except Stopped:
            break
        session.hooks.stage("reading the batch")
        begin = time.perf_counter()
        session.throughput.begin()
        engine.checkpoint_activations(phase_at(phases, progress.step).activation_checkpointing)
        batch = next_batch(session)

        # ---- Pictures of the model's own, where the objective trains on these.
        played = _play(session, batch)
        micro_batches = played.micro_batches if played else batch.micro_batches

        # ---- Objective: losses and gradients, or None if a loss was not finite on some rank (or nothing was readable);
        # clip, step, EMA.
        lr, before = lr_at(phases, config.optim, progress.step), time.perf_counter()
        updates = make_updates(session, batch, micro_batches, lr, idle=bool(played and played.idle))
        update_s = time.perf_counter() - before
        fault_point("train_step")
        progress.step += 1
        progress.images += batch.num_real
        _count_skip(session, batch, updates)
        session.throughput.count(batch, time.perf_counter() - begin)

        # ---- Log; evaluate: held-out losses and grids.
        session.hooks.stage("logging and evaluating")
        extra = {**updates.norms, **({**played.metrics, "train/update_s": update_s} if played else {})}
        _log(session, batch, updates, lr, extra, last=progress.step == last_step)

        # ---- Checkpoint if due, at once or in the background.
        if progress.step % config.checkpoint.every == 0:
            save(session)
            saved_step = progress.step
        session.hooks.heartbeat(progress.step)

        # ---- Degradation guard: saved, then the end.
        if session.guard.verdict:
            if saved_step < progress.step:
                save(session, wait=True)
            raise DegradedError(session.guard.verdict)

    if saved_step < progress.step:
        save(session, wait=True)
    return "complete" if progress.step >= last_step else "stopped"


def _take_in(session: Session) -> None:
    take_in(session, *session.ranks.max(session.saver.flags()))


def _play(session: Session, batch: RankBatch) -> Round | None:
    """The rollouts of a step, with what a person should know of them; None where the objective needs none."""
    if session.rollouts is None or not batch.num_real:
        return None
    step = session.progress.step
    played = session.rollouts.play(batch, step=step, tell=session.hooks.stage)
    if session.ranks.is_first:
        for note in played.notes:
            _warn(session, f"step {step + 1}: rewards: {note}")
        if played.idle:
            _warn(session, f"step {step + 1}: no update, since {played.idle}")
    if session.log and played.grid:
        session.log.picture(step + 1, "groups", played.grid)
    return played


def _count_skip(session: Session, batch: RankBatch, updates: Updates) -> None:
    """A step none of whose updates was made is a skipped one; steps in a row count with a single one that was not."""
    progress, allowed, failed = session.progress, session.config.engine.max_skipped_steps, updates.failed
    progress.skipped_steps += updates.result.skipped
    progress.consecutive_skips = progress.consecutive_skips + 1 if failed else 0
    if failed and session.ranks.is_first:
        why = "not finite" if batch.num_real else "nothing of it is readable"
        keys = f"samples {', '.join(batch.keys[:8])}, ..."
        number = updates.made + 1 if updates.planned > 1 else None
        if math.isinf(failed.grad_norm):  # the losses were finite
            dumped = dump_keys(session.run_dir, step=progress.step, batch=batch, update=number)
            keys += f"; all keys are in {dumped}"
        what = f"{why}, skipped on all ranks"
        if updates.made:
            what = (
                f"update {number} of {updates.planned} is {why} and was left out on all ranks, as what would follow; "
                f"the {updates.made} before it stay"
            )
        _warn(session, f"step {progress.step}: {what} ({keys})")
    if progress.consecutive_skips > allowed:
        raise TrainingError(
            f"{progress.consecutive_skips} steps in a row up to step {progress.step} were not finite, "
            f"engine.max_skipped_steps={allowed}: look for broken samples or lower optim.lr; the last checkpoint is "
            "from before or among them"
        )


def _log(
    session: Session,
    batch: RankBatch,
    updates: Updates,
    lr: float,
    extra: dict[str, float],
    *,
    last: bool,
) -> None:
    config, step, losses = session.config, session.progress.step, updates.losses
    if session.log:
        session.log.samples(step, str(batch.batch.bucket), batch.keys)
    evaluated = evaluate(session, batch.batch.phase, last=last)
    due = step % config.train.log_every == 0 or step == 1 or last or bool(updates.failed or extra or evaluated)
    extra = {**extra, **updates.metrics, **evaluated}
    if not due:
        return
    check_log(session)
    names = sorted(losses or ["loss"])
    totals = session.ranks.sum([float(losses[name]) if losses else float("nan") for name in names])
    rates = session.throughput.metrics()
    if session.log is None:
        return
    values = {
        **{f"train/{name}": total / max(1, batch.num_real) for name, total in zip(names, totals, strict=True)},
        "train/grad_norm": updates.result.grad_norm,
        "train/lr": lr,
        "train/phase": batch.batch.phase,
        "train/activation_checkpointing": int(session.engine.checkpoints_activations),
        "train/resolution": batch.batch.resolution,
        "train/bucket_height": batch.batch.bucket.height,
        "train/bucket_width": batch.batch.bucket.width,
        "train/epoch": batch.batch.epoch,
        **{f"train/dataset_epoch/{name}": epoch for name, epoch in batch.batch.epochs_by_dataset.items()},
        **{
            f"train/share/{name}": batch.batch.num_by_dataset.get(name, 0) / max(1, batch.num_real)
            for name in batch.batch.epochs_by_dataset
        },
        "train/images": session.progress.images,
        "train/skipped_steps": session.progress.skipped_steps,
        "train/bad_samples": len(session.progress.bad_keys),
        **rates,
        **extra,
    }
    session.log.metrics(step, values)
    session.hooks.observe({"train/step": step, **values})
    if notice := session.objective.notice(values):
        _warn(session, f"step {step}: {notice}")
    told = f"loss {values['train/loss']:.4f}" if losses or updates.failed else "no update"
    session.hooks.say(
        f"step {step}/{config.train.steps}  {told}  lr {lr:.2e}  {batch.batch.bucket}  "
        f"{rates['train/step_s']:.2f} s/step"
        + (f"  reward {extra['reward/total']:.4f}" if "reward/total" in extra else "")
        + (f"  held-out {evaluated['eval/loss']:.4f}" if "eval/loss" in evaluated else "")
    )


@contextlib.contextmanager
def stop_signals(hooks: Hooks) -> Iterator[Hooks]:
    """SIGTERM and SIGINT ask for a stop at the next step. Left alone outside the main thread (Ray's workers)."""
    if threading.current_thread() is not threading.main_thread():
        yield hooks
        return
    asked = threading.Event()
    before = {number: signal.signal(number, lambda *_: asked.set()) for number in _SIGNALS}
    try:
        yield replace(hooks, stop_requested=lambda: asked.is_set() or hooks.stop_requested())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _warn(session: Session, line: str) -> None:
    session.hooks.say(f"warning: {line}")
