"""This rank's batch of the next step, with all ranks agreed on which samples of it could not be read.

Place in the flow: the trainer asks here instead of the stream. A rank that finds a sample unreadable has zeros at
weight zero in its slot; since the loss is divided by the real samples of the whole global batch, every rank must know.
One all-reduce of two numbers per step tells whether anything is wrong anywhere; only then are names exchanged. What is
left out stands in `bad_samples.jsonl` of the run directory, and the different samples among it are counted, across
resumes, up to `data.max_bad_samples`. Storage that was away is no verdict on a sample: the gang starts anew. Refuses to
go on beyond the limit, or to let one rank fail alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Final

from consumers.batch import RankBatch
from consumers.errors import TrainingError
from consumers.ranks import AgreedError
from qwenimg_dist.metrics import JsonLines
from qwenimg_dist.patience import StorageAwayError, is_away

if TYPE_CHECKING:
    from consumers.session import Session

FILE: Final = "bad_samples.jsonl"


def next_batch(session: Session) -> RankBatch:
    """The batch of step `progress.step`. Collective. Raises `AgreedError` for what one rank refuses, on every rank, and
    `StorageAwayError`, which counts no sample, where storage was away."""
    ranks, batch = session.ranks, None
    met: Exception | None = None
    try:
        batch = session.stream.get(session.progress.step)
    except (ValueError, OSError, StorageAwayError) as error:
        met = error
    failed, num_bad = ranks.sum([float(met is not None), float(len(batch.bad)) if batch else 0.0])
    if failed and (told := ranks.first_error(met)) is not None:
        raise told from met
    assert batch is not None
    return _without_bad(session, batch) if num_bad else batch


def _without_bad(session: Session, batch: RankBatch) -> RankBatch:
    """The batch with `num_real` less what any rank could not read, which is noted and counted."""
    found = [one for part in session.ranks.gather_json([asdict(bad) for bad in batch.bad]) for one in part]
    # Slots beyond the batch only even out the ranks, and slots of weight zero repeat a sample: none is missed.
    missed = [one for one in found if one["slot"] < len(batch.batch.weights) and batch.batch.weights[one["slot"]] > 0]
    _note(session, missed)
    return replace(batch, num_real=batch.num_real - len(missed))


def _note(session: Session, missed: Sequence[dict[str, Any]]) -> None:
    progress, allowed = session.progress, session.config.data.max_bad_samples
    step, new = progress.step + 1, [one for one in missed if one["key"] not in progress.bad_keys]
    progress.bad_keys.update(one["key"] for one in new)
    count = len(progress.bad_keys)
    met: Exception | None = None
    if session.ranks.is_first and missed:
        try:
            log = JsonLines(session.run_dir / FILE)
            log.write(step, {"samples": list(missed)})
            log.close()
        except OSError as error:
            kind = StorageAwayError if is_away(error) else ValueError
            met = kind(f"{session.run_dir / FILE}: {error.strerror or error}")
        if new:
            more = f", and {len(new) - 1} more" if len(new) > 1 else ""
            session.hooks.say(
                f"warning: step {step} goes without unreadable samples, {count} so far "
                f"(data.max_bad_samples={allowed}): {new[0]['problem']}{more}"
            )
    if (told := session.ranks.first_error(met)) is not None:
        what = f"step {step} goes without unreadable samples, which cannot be written down: {told}"
        if isinstance(told, StorageAwayError):
            raise StorageAwayError(what)
        raise TrainingError(f"{what}. Make room; the same command goes on from the last checkpoint")
    if count > allowed:  # also by those of a checkpoint, if fewer are allowed since
        latest = f": {missed[0]['problem']}" if missed else ""
        raise AgreedError(
            f"{count} samples could not be read up to step {step}, data.max_bad_samples={allowed}{latest}. All of them "
            f"stand in {session.run_dir / FILE}; the same command goes on from the last checkpoint"
        )
