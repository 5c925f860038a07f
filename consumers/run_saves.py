"""When the loop saves, and what belongs to a save: logs made durable before, copy and report after.

Place in the flow: the trainer calls `save` when one is due, `take_in` at every step, and while it waits for producers,
for one that is written beside training, and runs inside `settled`, so that the run never ends amid one that can still
be whole. What is written is `saver.py`'s matter.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from consumers.errors import TrainingError
from consumers.ranks import AgreedError
from consumers.remote_checkpoints import RemoteCheckpoints
from consumers.session import Session
from consumers.throughput import RANK_COLUMNS
from qwenimg_dist.patience import StorageAwayError


def check_log(session: Session) -> None:
    """Raise on all ranks what kept rank 0 from writing: going on, the run would have a gap in its logs."""
    log = session.log
    met = (StorageAwayError if log.is_away else ValueError)(log.problem) if log and log.problem else None
    if (told := session.ranks.first_error(met)) is not None:
        what = f"the run cannot write its logs any more, noticed at step {session.progress.step}: {told}"
        if isinstance(told, StorageAwayError):
            raise StorageAwayError(what)
        raise TrainingError(f"{what}. Make room; the same command goes on from the last checkpoint")


@contextlib.contextmanager
def settled(session: Session) -> Iterator[None]:
    """Whatever all ranks end with together, the save under way is finished first. A ValueError that is no `AgreedError`
    may be one rank's alone: to finish a save is to wait for the others."""
    try:
        yield
    except (TrainingError, AgreedError):
        with contextlib.suppress(TrainingError, StorageAwayError):  # the first one is the one to tell
            _finish_save(session)
        raise
    _finish_save(session)


def take_in(session: Session, failed: float, writing: float) -> None:
    """Finish a save that is written beside training, where all ranks have (or one cannot): the maxima of their
    `Saver.flags`. Collective."""
    if session.saver.under_way and (failed or not writing):
        _finish_save(session, failed=bool(failed))


def save(session: Session, *, wait: bool = False) -> None:
    """Save the present step: written and committed on return with `wait`, or without `checkpoint.background`."""
    _finish_save(session)
    session.hooks.stage("saving")
    if session.log:
        if session.throughput.by_rank:
            session.log.table(session.progress.step, "ranks", RANK_COLUMNS, session.throughput.by_rank, group="train")
        session.log.sync()
    check_log(session)
    if session.config.checkpoint.certify == "save":
        note = session.certifier.measure(session.progress.step)
        if note and session.ranks.is_first:
            session.hooks.say(f"warning: {note}")
    certifier, progress = session.certifier, session.progress
    session.saver.begin(
        step=progress.step,
        state=session.state(),
        certificate=lambda: certifier.record(progress.step, progress.images),
        wait=wait,
    )
    if wait or not session.config.checkpoint.background:
        _finish_save(session)


def _finish_save(session: Session, *, failed: bool = False) -> None:
    """Commit the save under way, if there is one, and what follows from it."""
    if not session.saver.under_way:
        return
    session.hooks.stage("finishing a save")
    step = session.saver.finish(failed=failed)
    if session.ranks.is_first:
        session.hooks.say(f"saved step {step}")
        session.hooks.observe({"checkpoint/step": step})
    if session.remote:
        _copy(session, session.remote, step)
    if session.report and session.config.train.report == "checkpoints":
        session.report.begin()


def _copy(session: Session, remote: RemoteCheckpoints, step: int) -> None:
    session.hooks.stage("copying the checkpoint")
    keep, begin = session.config.checkpoint, time.perf_counter()
    stall_s = session.config.train.stall_timeout_s
    problem = remote.push(step, session.ranks, keep=keep.keep, keep_every=keep.keep_every, stall_s=stall_s)
    if problem and session.ranks.is_first:
        session.hooks.say(f"warning: step {step} is saved, but not copied to {remote.storage.url}: {problem}")
    elif session.ranks.is_first:
        session.hooks.say(f"copied step {step} to {remote.storage.url} in {time.perf_counter() - begin:.1f} s")
