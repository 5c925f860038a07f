"""Resuming on the ranks: any number of ranks loads the newest valid checkpoint.

Place in the flow: the session resumes here; what is loaded was written by `checkpoint_save.py`, the files themselves
are `checkpoint_files.py`.

Sizes of all files are checked always; each file's sha256 by exactly one rank, which costs one read of the checkpoint
over all ranks together (41 GB of a 64-rank 20 B run: 5 GB per rank) and buys that a flipped bit is never trained on.
Refuses to start anew when checkpoints exist and none is valid.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from consumers.checkpoint_files import (
    CheckpointError,
    CheckpointInfo,
    checkpoints_dir,
    content_fault,
    list_checkpoints,
    no_valid_checkpoint,
    read_manifest,
    step_name,
)
from consumers.checkpoint_reader import CheckpointReader, open_checkpoint, verify_checkpoint
from consumers.checkpoint_save import save_checkpoint
from consumers.ema import Ema
from consumers.ranks import Ranks
from consumers.zero_engine import KINDS, Engine, Share

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


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a resume found."""

    step: int
    state: dict[str, Any]
    """The trainer's `state.json`."""
    skipped: list[str]
    """Newer checkpoints that are not valid, and why."""


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
