"""Saving on the ranks: all ranks write, rank 0 commits.

Place in the flow: `saver.py` saves through this, at once or in the background; the files themselves are
`checkpoint_files.py`, what a start loads is `checkpoint.py`.

Commit: every rank writes its file into `.tmp-…` and fsyncs it -> the ranks agree that all succeeded -> rank 0 writes
`state.json` and `manifest.json`, renames the directory to `step-NNNNNNNN` and fsyncs its parent. Who dies before the
rename leaves a temporary that nobody reads. Refuses to begin where the disk has no room for it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from consumers.checkpoint_files import (
    TEMPORARY,
    FileRecord,
    Piece,
    checkpoint_bytes,
    checkpoints_dir,
    free_bytes,
    list_checkpoints,
    rank_file,
    remove,
    space_fault,
    step_name,
    sweep,
    write_certificate,
    write_manifest,
    write_rank_file,
    write_state,
)
from consumers.ema import Ema
from consumers.errors import TrainingError
from consumers.ranks import Ranks
from consumers.zero_engine import KINDS, Engine
from qwenimg_dist.debug import fault_point
from qwenimg_dist.files import fsync_dir
from qwenimg_dist.patience import StorageAwayError, is_away

_SHA_HEX_DIGITS: Final = 64


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A save that every rank has begun: where its files go, and what stands in it besides the tensors."""

    step: int
    temporary: Path
    final: Path
    file: Path
    """This rank's."""
    state: dict[str, Any]
    certificate: Mapping[str, Any] | None
    """Rank 0's."""
    needed_bytes: int


def save_checkpoint(
    engine: Engine,
    ema: Ema | None,
    run_dir: Path,
    *,
    step: int,
    state: Mapping[str, Any],
    keep: int,
    certificate: Callable[[], Mapping[str, Any]] | None = None,
    keep_every: int = 0,
) -> Path:
    """Write and commit `checkpoints/step-NNNNNNNN`; then keep the newest `keep` valid ones and multiples of
    `keep_every`.

    Collective; `certificate` is asked on rank 0 alone. Host memory: the largest share of a tensor on a GPU, nothing on
    a CPU. Raises `TrainingError` on every rank if the disk has no room or one of them could not write, or
    `StorageAwayError` if that was storage that did not answer; nothing is visible then, and what was there stays.
    """
    begun = begin_save(engine, ema, run_dir, step=step, state=state, certificate=certificate)
    record: FileRecord | None = None
    error: Exception | None = None
    try:
        record = write_rank_file(begun.file, list(pieces_of(engine, ema)))
    except OSError as problem:
        error = problem
    commit_save(begun, record, error, engine.ranks)
    if engine.ranks.is_first:
        remove(retire(run_dir, step, keep, keep_every))
    return begun.final


def begin_save(
    engine: Engine,
    ema: Ema | None,
    run_dir: Path,
    *,
    step: int,
    state: Mapping[str, Any],
    certificate: Callable[[], Mapping[str, Any]] | None,
) -> Begun:
    """Make sure of the room and agree on where the files go; all but the tensors is as of now. Collective.

    Raises `TrainingError` on every rank. No other save may be under way: what is left of one is removed.
    """
    ranks = engine.ranks
    folder = checkpoints_dir(run_dir)
    fault = None
    if ranks.is_first:
        sweep(run_dir)  # what a killed gang left torn may be the room that is missing
        fault = space_fault(run_dir, engine.num_parameters, ema=ema is not None, num_frozen=engine.num_frozen)
    if fault := ranks.broadcast_json(fault):
        raise TrainingError(f"checkpoint of step {step} was not begun, the ones before are untouched: {fault}")
    # Drawn anew each time: a rank of a killed gang that still lives cannot write into this directory.
    token = ranks.broadcast_json(uuid.uuid4().hex[:8])
    temporary = folder / f"{TEMPORARY}{step_name(step)}-{token}"
    needed = checkpoint_bytes(engine.num_parameters, ema=ema is not None, num_frozen=engine.num_frozen)
    told: Mapping[str, Any] | None = None
    error: Exception | None = None
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        told = certificate() if certificate is not None and ranks.is_first else None
    except (OSError, ValueError) as problem:
        error = problem
    _agree(error, ranks, temporary, step, needed)
    return Begun(
        step=step,
        temporary=temporary,
        final=folder / step_name(step),
        file=temporary / rank_file(ranks.rank, ranks.world_size),
        state={
            **state,
            "step": step,
            "optimizer_steps": engine.optimizer_steps,
            "ema_decay": ema.decay if ema else None,
            "parameters": {
                share.name: {"shape": list(share.shape), "group": share.group}
                for share in (*engine.shares, *engine.frozen)
            },
        },
        certificate=told,
        needed_bytes=needed,
    )


def commit_save(begun: Begun, record: FileRecord | None, error: Exception | None, ranks: Ranks) -> None:
    """Make what the ranks wrote a checkpoint: `record` is of this rank's file, None where it could not be written.

    Collective. Raises `TrainingError` or `StorageAwayError` on every rank if one of them could not write; nothing is
    visible then.
    """
    temporary, step = begun.temporary, begun.step
    _agree(error, ranks, temporary, step, begun.needed_bytes)
    assert record is not None
    records = _gather(record, ranks)
    if ranks.is_first:
        try:
            records.append(write_state(temporary, begun.state))
            if begun.certificate is not None:
                records.append(write_certificate(temporary, begun.certificate))
            _commit(temporary, begun.final, step=step, num_ranks=ranks.world_size, records=records)
        except (OSError, ValueError) as problem:
            error = problem
    _agree(error, ranks, temporary, step, begun.needed_bytes)


def _agree(error: Exception | None, ranks: Ranks, temporary: Path, step: int, needed: int) -> None:
    """Raise on every rank if one of them failed; a rank that went on alone would wait for ever. Storage that was away
    starts the gang anew, from the checkpoint before; a disk without room ends the run."""
    met: Exception | None = None
    if error is not None:
        met = (StorageAwayError if is_away(error) else ValueError)(f"rank {ranks.rank}: {error}")
    if (told := ranks.first_error(met)) is None:
        return
    if ranks.is_first:
        shutil.rmtree(temporary, ignore_errors=True)
    what = f"checkpoint of step {step} was not committed: {told}"
    if isinstance(told, StorageAwayError):
        raise StorageAwayError(f"{what}; the one before is untouched") from error
    free = free_bytes(temporary.parent)
    raise TrainingError(
        f"{what}. It needs {needed / 1e9:.3f} GB in {temporary.parent}, "
        f"{free / 1e9:.3f} GB are free without it. Make room; the same command goes on from the one before"
    ) from error


def pieces_of(engine: Engine, ema: Ema | None) -> Iterator[Piece]:
    """What this rank's file holds: views of the state, which the next step changes."""
    for share in engine.shares:
        if share.stop == share.start:
            continue
        for kind in KINDS:
            yield Piece(
                which=kind, name=share.name, start=share.start, stop=share.stop, values=engine.state(kind, share)
            )
        if ema is not None:
            yield Piece(which="ema", name=share.name, start=share.start, stop=share.stop, values=ema.state(share))
    for share in engine.frozen:
        if share.stop > share.start:
            values = engine.frozen_values(share)
            yield Piece(which="master", name=share.name, start=share.start, stop=share.stop, values=values)


def _gather(record: FileRecord, ranks: Ranks) -> list[FileRecord]:
    told = ranks.gather_bytes(record.sha256.encode() + record.size_bytes.to_bytes(8, "little"))
    return [
        FileRecord(
            name=rank_file(rank, ranks.world_size),
            sha256=data[:_SHA_HEX_DIGITS].decode(),
            size_bytes=int.from_bytes(data[_SHA_HEX_DIGITS:], "little"),
        )
        for rank, data in enumerate(told)
    ]


def _commit(temporary: Path, final: Path, *, step: int, num_ranks: int, records: list[FileRecord]) -> None:
    write_manifest(temporary, step, num_ranks, records)
    fsync_dir(temporary)
    fault_point("checkpoint_commit")
    if final.exists():  # an invalid checkpoint of this step, reached again
        aside = final.with_name(f"{TEMPORARY}replaced-{final.name}-{uuid.uuid4().hex[:8]}")
        os.rename(final, aside)
        shutil.rmtree(aside, ignore_errors=True)
    os.rename(temporary, final)
    fsync_dir(final.parent)


def retire(run_dir: Path, step: int, keep: int, keep_every: int) -> list[Path]:
    """Put aside what is older than the newest `keep` valid checkpoints up to `step`, but for multiples of `keep_every`;
    returns what is to be removed. Rank 0's.

    Checkpoints above the step just committed were found unusable, else the run would have gone on from them: they are
    of an abandoned future and go too, or a later start would try them first.
    """
    try:
        found = list_checkpoints(run_dir)
    except StorageAwayError:
        return []  # the checkpoint is committed; what is old is looked for by the next save
    valid = [info.step for info in found if info.fault is None and info.step <= step]
    oldest_kept = min(valid[-keep:], default=0)
    put_aside: list[Path] = []
    with contextlib.suppress(OSError):  # the checkpoint is committed; what cannot be removed now is tried next time
        for info in found:
            for_good = keep_every > 0 and info.step % keep_every == 0 and info.step <= step
            if not for_good and not oldest_kept <= info.step <= step:
                # Renamed first: half-removed it must not look like a checkpoint.
                aside = info.path.with_name(f"{TEMPORARY}removed-{info.path.name}-{uuid.uuid4().hex[:8]}")
                os.rename(info.path, aside)
                put_aside.append(aside)
    return put_aside
