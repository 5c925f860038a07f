"""The saves of one run: at once, or in the background while training goes on (`checkpoint.background`).

Place in the flow: the trainer begins a save here, asks at every step whether all ranks have written, and finishes it,
which commits it (`checkpoint_save.py`). In the background a rank copies its part into a buffer of host memory, held for
the whole run, and a thread writes, hashes and fsyncs that copy; hashing, copying and writing leave Python's lock alone.
The commit is the same: a checkpoint exists only when it is whole, a process that dies before leaves a temporary.

At most one save is under way. Every rank makes the same calls; what the writers found is agreed on together with the
question whether to stop, so it costs no collective of its own. Refuses to start where the copies do not fit into the
memory that is free.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from consumers.checkpoint_files import FileRecord, GivenUp, Piece, remove, write_rank_file
from consumers.checkpoint_save import Begun, begin_save, commit_save, pieces_of, retire
from consumers.ema import Ema
from consumers.watchdog_process import host_memory
from consumers.zero_engine import Engine
from qwenimg_dist.config import CheckpointConfig

_JOIN_S: Final = 60.0


class Saver:
    """Saves of one run. Collective but for `flags` and `close`; made on every rank."""

    def __init__(self, engine: Engine, ema: Ema | None, run_dir: Path, config: CheckpointConfig) -> None:
        """Raises ValueError on every rank if the copies of a background save do not fit into a machine's memory."""
        self._engine = engine
        self._ema = ema
        self._run_dir = run_dir
        self._config = config
        self._begun: Begun | None = None
        self._writer: _Writer | None = None
        self._removal: threading.Thread | None = None
        self._copy: _HostCopy | None = None
        if config.background:
            numel = sum(piece.stop - piece.start for piece in pieces_of(engine, ema))
            engine.ranks.together(lambda: _check_room(4 * numel))  # on all before one of them takes it
            self._copy = engine.ranks.together(lambda: _HostCopy(numel))

    @property
    def copy_bytes(self) -> int:
        """Host memory that this rank holds for saves in the background."""
        return self._copy.num_bytes if self._copy else 0

    @property
    def under_way(self) -> bool:
        """Whether a save was begun and not finished; the same on every rank."""
        return self._begun is not None

    def begin(
        self, *, step: int, state: Mapping[str, Any], certificate: Callable[[], Mapping[str, Any]], wait: bool
    ) -> None:
        """Begin to save what is there now. With `wait`, or without `checkpoint.background`, it is written on return,
        without a copy. No save may be under way. Raises `TrainingError` on every rank."""
        assert not self.under_way
        begun = begin_save(self._engine, self._ema, self._run_dir, step=step, state=state, certificate=certificate)
        pieces = list(pieces_of(self._engine, self._ema))
        if self._copy is None or wait:
            self._writer = _Writer(begun.file, pieces)
            self._writer.run()
        else:
            self._writer = _Writer(begun.file, self._copy.take(pieces))
            self._writer.start()
        self._begun = begun

    def flags(self) -> tuple[float, float]:
        """(failed, still writing) of this rank. Where the maxima over the ranks say (1, _) or (0, 0), `finish`."""
        if self._writer is None:
            return 0.0, 0.0
        return float(self._writer.error is not None), float(self._writer.is_alive())

    def finish(self, *, failed: bool = False) -> int:
        """Wait for the writers, commit, remove old checkpoints; the step. `failed`: some rank's writer has, as `flags`
        told. Raises `TrainingError` on every rank if one could not write; nothing of this save is visible then."""
        assert self._begun is not None
        assert self._writer is not None
        begun, writer, ranks = self._begun, self._writer, self._engine.ranks
        self._begun = self._writer = None
        writer.end(give_up=failed)
        commit_save(begun, writer.record, writer.error, ranks)
        if ranks.is_first:
            self._remove(retire(self._run_dir, begun.step, self._config.keep, self._config.keep_every))
        return begun.step

    def close(self) -> None:
        """Give up what is under way: its temporary is removed by the next save."""
        if self._writer is not None:
            self._writer.end(give_up=True, timeout_s=_JOIN_S)
        if self._removal is not None:
            self._removal.join()
        self._copy = None

    def _remove(self, folders: Sequence[Path]) -> None:
        if self._copy is None:
            remove(folders)
            return
        if self._removal is not None:
            self._removal.join()
        # Some file systems take seconds to give up hundreds of GB.
        self._removal = threading.Thread(target=remove, args=(folders,), name="checkpoint-removal", daemon=True)
        self._removal.start()


class _Writer(threading.Thread):
    """Writes one rank's file; afterwards `record` or `error` is set, or none of both where it was given up."""

    def __init__(self, file: Path, pieces: Sequence[Piece]) -> None:
        super().__init__(name="checkpoint-writer", daemon=True)
        self.record: FileRecord | None = None
        self.error: Exception | None = None
        self._file = file
        self._pieces = pieces
        self._given_up = threading.Event()

    def run(self) -> None:
        try:
            self.record = write_rank_file(self._file, self._pieces, self._given_up.is_set)
        except GivenUp:
            pass
        except Exception as problem:  # whatever it is, all ranks are told when the save is finished
            self.error = problem

    def end(self, *, give_up: bool, timeout_s: float | None = None) -> None:
        """Wait until it has ended."""
        if give_up:
            self._given_up.set()
        if self.ident is not None:  # else it ran in the caller's thread
            self.join(timeout_s)


class _HostCopy:
    """One buffer for this rank's part of a checkpoint, fp32. Not pinned: torch would round it up to a power of two."""

    def __init__(self, numel: int) -> None:
        self.num_bytes = 4 * numel
        try:
            # Written to once, so that memory that is not there is missed now and not at the first save.
            self._buffer = torch.empty(numel, dtype=torch.float32).fill_(0)
        except RuntimeError as error:
            raise ValueError(_no_room(self.num_bytes, str(error).splitlines()[0])) from error

    def take(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The same pieces, copied, as they are now."""
        taken, position = [], 0
        for piece in pieces:
            values = self._buffer[position : position + piece.values.numel()]
            values.copy_(piece.values.detach())
            taken.append(replace(piece, values=values))
            position += values.numel()
        return taken


def _check_room(num_bytes: int) -> None:
    """Raise ValueError if this machine's ranks, each with such a buffer, need more than is free. Where that is not told
    here, the allocation shows it."""
    on_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free, whole = host_memory() or (on_machine * num_bytes, 0)
    if on_machine * num_bytes > free:
        there = f"{free / 1e9:.2f} GB are free of the {whole / 1e9:.2f} GB of this machine or container"
        raise ValueError(_no_room(num_bytes, f"{on_machine} of them, {there}"))


def _no_room(num_bytes: int, why: str) -> str:
    return (
        f"checkpoint.background=true: each rank keeps a copy of its part of a checkpoint in host memory, "
        f"{num_bytes / 1e9:.2f} GB, and there is no room for it ({why}): set checkpoint.background=false"
    )
