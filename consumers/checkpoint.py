"""Saving and resuming on the ranks: all ranks write, rank 0 commits; any number of ranks loads.

Place in the flow: the trainer saves and resumes here; the files themselves are `checkpoint_files.py`.

Commit: every rank writes its file into `.tmp-…` and fsyncs it -> the ranks agree that all succeeded -> rank 0 writes
`state.json` and `manifest.json`, renames the directory to `step-NNNNNNNN` and fsyncs its parent. Who dies before the
rename leaves a temporary that nobody reads.

Load: the newest valid checkpoint. Sizes of all files are checked always; each file's sha256 by exactly one rank, which
costs one read of the checkpoint over all ranks together (41 GB of a 64-rank 20 B run: 5 GB per rank) and buys that a
flipped bit is never trained on. Refuses to start anew when checkpoints exist and none is valid.
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

import torch

from consumers.checkpoint_files import (
    CheckpointError,
    CheckpointInfo,
    FileRecord,
    Piece,
    checkpoint_bytes,
    checkpoints_dir,
    content_fault,
    free_bytes,
    list_checkpoints,
    no_valid_checkpoint,
    rank_file,
    read_manifest,
    space_fault,
    step_name,
    write_certificate,
    write_manifest,
    write_rank_file,
    write_state,
)
from consumers.checkpoint_reader import CheckpointReader, open_checkpoint, verify_checkpoint
from consumers.ema import Ema
from consumers.engine import KINDS, Engine, Share
from consumers.errors import TrainingError
from consumers.ranks import Ranks
from qwenimg_dist.debug import fault_point
from qwenimg_dist.files import fsync_dir

__all__ = [
    "CheckpointError",
    "CheckpointInfo",
    "CheckpointReader",
    "Loaded",
    "list_checkpoints",
    "load_newest",
    "open_checkpoint",
    "save_checkpoint",
    "share_of_faults",
    "verify_checkpoint",
]

_TEMPORARY: Final = ".tmp-"
_SHA_HEX_DIGITS: Final = 64


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a resume found."""

    step: int
    state: dict[str, Any]
    """The trainer's `state.json`."""
    skipped: list[str]
    """Newer checkpoints that are not valid, and why."""


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
    a CPU. Raises `TrainingError` on every rank if the disk has no room or one of them could not write; nothing is
    visible then, and what was there stays.
    """
    ranks = engine.ranks
    folder = checkpoints_dir(run_dir)
    fault = None
    if ranks.is_first:
        _sweep(folder)  # what a killed gang left torn may be the room that is missing
        fault = space_fault(run_dir, engine.num_parameters, ema=ema is not None, num_frozen=engine.num_frozen)
    if fault := ranks.broadcast_json(fault):
        raise TrainingError(f"checkpoint of step {step} was not begun, the ones before are untouched: {fault}")
    # Drawn anew each time: a rank of a killed gang that still lives cannot write into this directory.
    token = ranks.broadcast_json(uuid.uuid4().hex[:8])
    temporary = folder / f"{_TEMPORARY}{step_name(step)}-{token}"
    error: Exception | None = None
    record = FileRecord(name=rank_file(ranks.rank, ranks.world_size), size_bytes=0, sha256="0" * _SHA_HEX_DIGITS)
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        record = write_rank_file(temporary / record.name, list(_pieces(engine, ema)))
    except OSError as problem:
        error = problem
    _agree(error, engine, ema, temporary, step)
    records = _gather(record, ranks)
    whole = {
        **state,
        "step": step,
        "optimizer_steps": engine.optimizer_steps,
        "ema_decay": ema.decay if ema else None,
        "parameters": {
            share.name: {"shape": list(share.shape), "group": share.group} for share in (*engine.shares, *engine.frozen)
        },
    }
    if ranks.is_first:
        try:
            records.append(write_state(temporary, whole))
            if certificate is not None:
                records.append(write_certificate(temporary, certificate()))
            _commit(temporary, folder / step_name(step), step=step, num_ranks=ranks.world_size, records=records)
        except (OSError, ValueError) as problem:
            error = problem
    _agree(error, engine, ema, temporary, step)
    if ranks.is_first:
        _retain(run_dir, step, keep, keep_every)
    return folder / step_name(step)


def load_newest(engine: Engine, ema: Ema | None, run_dir: Path) -> Loaded | None:
    """Fill engine and EMA from the newest valid checkpoint; None if there is none at all.

    Collective. Raises `CheckpointError` if there are checkpoints and none is valid, or if it is of another model.
    """
    ranks = engine.ranks
    found = ranks.on_first(lambda: [[info.step, info.fault] for info in list_checkpoints(run_dir)])
    if not found:
        return None
    skipped: list[str] = []
    for step, fault in reversed(found):
        path = checkpoints_dir(run_dir) / step_name(step)
        problem = fault or share_of_faults(path, ranks)
        if problem is None:
            reader = _restored(engine, ema, path)
            return Loaded(step=step, state=reader.state, skipped=skipped)
        skipped.append(f"step {step}: {problem}")
    raise no_valid_checkpoint(run_dir, skipped)


def _agree(error: Exception | None, engine: Engine, ema: Ema | None, temporary: Path, step: int) -> None:
    """Raise on every rank if one of them failed; a rank that went on alone would wait for ever."""
    ranks = engine.ranks
    told = ranks.first_problem(f"rank {ranks.rank}: {error}" if error is not None else "")
    if not told:
        return
    if ranks.is_first:
        shutil.rmtree(temporary, ignore_errors=True)
    needed = checkpoint_bytes(engine.num_parameters, ema=ema is not None, num_frozen=engine.num_frozen)
    free = free_bytes(temporary.parent)
    raise TrainingError(
        f"checkpoint of step {step} was not committed: {told}. It needs {needed / 1e9:.3f} GB in {temporary.parent}, "
        f"{free / 1e9:.3f} GB are free without it. Make room; the same command goes on from the one before"
    ) from error


def share_of_faults(path: Path, ranks: Ranks) -> str | None:
    """Hash the checkpoint's files, each on one rank; the first problem, or None, on every rank. Collective.

    Storage that is away is none: raises `StorageAwayError` on every rank.
    """

    def look() -> str:
        try:
            _, records = read_manifest(path)
            mine = records[ranks.rank :: ranks.world_size]
            return next((fault for record in mine if (fault := content_fault(path, record))), "")
        except (CheckpointError, OSError) as error:
            return str(error)

    return ranks.first_problem(ranks.together(look)) or None


def _restored(engine: Engine, ema: Ema | None, path: Path) -> CheckpointReader:
    """Fill engine and EMA. What one rank cannot read is raised on all: alone, it would leave them waiting."""

    def read() -> CheckpointReader:
        reader = CheckpointReader(path)
        _read_shares(engine, ema, reader)
        return reader

    try:
        reader = engine.ranks.together(read)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    engine.optimizer_steps = int(reader.state["optimizer_steps"])
    engine.publish()
    if ema is not None and not reader.has_ema:
        ema.restart()
    return reader


def _read_shares(engine: Engine, ema: Ema | None, reader: CheckpointReader) -> None:
    for share in (*engine.shares, *engine.frozen):
        if reader.shape(share.name) != share.shape:
            raise CheckpointError(
                f"{reader.path}: {share.name} has shape {reader.shape(share.name)}, the model has {share.shape}"
            )
    for share in engine.frozen:
        if share.stop > share.start:
            _load_into(engine.frozen_values(share), reader, share, "master")
    for share in engine.shares:
        if share.stop == share.start:
            continue
        for kind in KINDS:
            _load_into(engine.state(kind, share), reader, share, kind)
        if ema is not None and reader.has_ema:
            _load_into(ema.state(share), reader, share, "ema")


def _load_into(target: Any, reader: CheckpointReader, share: Share, which: Any) -> None:
    if target.device.type == "cpu" and target.dtype == torch.float32:
        reader.read_range_into(share.name, which, share.start, target)
        return
    staged = torch.empty(target.shape, dtype=torch.float32)
    reader.read_range_into(share.name, which, share.start, staged)
    target.copy_(staged)


def _pieces(engine: Engine, ema: Ema | None) -> Iterator[Piece]:
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
        aside = final.with_name(f"{_TEMPORARY}replaced-{final.name}-{uuid.uuid4().hex[:8]}")
        os.rename(final, aside)
        shutil.rmtree(aside, ignore_errors=True)
    os.rename(temporary, final)
    fsync_dir(final.parent)


def _retain(run_dir: Path, step: int, keep: int, keep_every: int) -> None:
    """Remove what is older than the newest `keep` valid checkpoints up to `step`, but for multiples of `keep_every`.

    Checkpoints above the step just committed were found unusable, else the run would have gone on from them: they are
    of an abandoned future and go too, or a later start would try them first.
    """
    found = list_checkpoints(run_dir)
    valid = [info.step for info in found if info.fault is None and info.step <= step]
    oldest_kept = min(valid[-keep:], default=0)
    folder = checkpoints_dir(run_dir)
    with contextlib.suppress(OSError):  # the checkpoint is committed; what cannot be removed now is tried next time
        for info in found:
            for_good = keep_every > 0 and info.step % keep_every == 0 and info.step <= step
            if not for_good and not oldest_kept <= info.step <= step:
                # Renamed first: half-removed it must not look like a checkpoint.
                aside = folder / f"{_TEMPORARY}removed-{info.path.name}-{uuid.uuid4().hex[:8]}"
                os.rename(info.path, aside)
    _sweep(folder)


def _sweep(folder: Path) -> None:
    """Remove temporaries of the dead, and what retention has renamed."""
    for file in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(file, ignore_errors=True)
