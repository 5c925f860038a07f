"""A copy of the run in a bucket (`checkpoint.remote=s3://...`): any machine goes on from it with the same command.

Place in the flow: the run directory stays what it is, on a disk. It has logs that are appended to, locks, and a catalog
that is memory-mapped, none of which a bucket can give; and a checkpoint is committed there before anything is uploaded.
After that every rank uploads its own file, rank 0 the others and the run's small files, and the manifest **last**: a
copy is valid if and only if its manifest is there and all that it lists has the listed size. Retention removes the
manifest first. At a start, where the copy is newer than the run directory (an empty machine, say), the ranks fetch it,
each its share of the files; the resume then hashes them as it does always.

An upload that fails, or is too slow, is a warning and not the end: the checkpoint is on the disk, and the next one is
uploaded again.

Refused: a copy of another run than the run directory's, and a fresh start over one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

from consumers.checkpoint_files import (
    MANIFEST,
    CheckpointError,
    FileRecord,
    checkpoints_dir,
    list_checkpoints,
    rank_file,
    read_manifest,
    step_name,
    sweep,
)
from consumers.ranks import Ranks
from consumers.start_from import START_FROM
from qwenimg_dist.files import fsync_dir, write_json
from qwenimg_dist.patience import StorageAwayError, patiently
from qwenimg_dist.storage import Object, ObjectChangedError, Storage, check_url

RUN_ID: Final = "run_id.json"
"""Which run a directory, and its copy, is of."""
_FOLDER: Final = "checkpoints"
_FILES: Final = (
    RUN_ID,
    "config.yaml",
    "environment.json",
    "generations.jsonl",
    START_FROM,
    "start_loss.json",
    "parameter_groups.json",
    "plan.json",
    "starts.jsonl",
    "metrics.jsonl",
    "tables.jsonl",
    "samples.jsonl",
    "bad_samples.jsonl",
    "rewards.json",
    "validation/generations.jsonl",
)
_GROWING: Final = ("takedown/*.*", "samples/*.*", "reference/*/about.json", "reference/*/errors.npy")
"""Files that never change once they are there."""
_STEP: Final = re.compile(r"^checkpoints/step-(\d{8,})/")
_VISIBLE_S: Final = 60.0


@dataclass(frozen=True)
class RemoteCheckpoints:
    """The copy of one run. Made on every rank."""

    storage: Storage
    run_dir: Path

    @classmethod
    def of(cls, url: str | None, run_dir: Path) -> RemoteCheckpoints | None:
        """None where no copy is kept. Raises ValueError for a URL that is refused."""
        return cls(Storage(check_url(url, "checkpoint.remote")), run_dir) if url else None

    def join(self, *, fresh: bool) -> str | None:
        """Rank 0, before anything of the run directory is read: bring the small files of a copy that is newer.

        Returns what to tell. Raises ValueError if copy and run directory are of different runs, or if there is a copy
        and a fresh start was asked for.
        """
        there = self._remote_id()
        if there is None:
            return None
        where = f"checkpoint.remote={self.storage.url}"
        if fresh:
            raise ValueError(f"{where} holds a run already, and train.fresh=true would replace it: give another URL")
        here = _read_id(self.run_dir)
        if here is None and not list_checkpoints(self.run_dir) and not self._steps(self.storage.list(_FOLDER)):
            # The first upload did not come to its manifest, and its machine is lost: nothing is to be fetched, but the
            # copy's id is this run's, or no later checkpoint could be copied.
            write_json(self.run_dir / RUN_ID, {"run_id": there})
            return None
        if here is None and (list_checkpoints(self.run_dir) or (self.run_dir / "generations.jsonl").exists()):
            raise ValueError(f"{where} holds another run than {self.run_dir}, which was never copied there")
        if here not in (None, there):
            raise ValueError(f"{where} holds another run than {self.run_dir}: give that run's URL, or another run.path")
        steps = self.steps_ahead()
        if not steps:
            return None
        wanted = {
            name: entry.size_bytes
            for name, entry in self.storage.list().items()
            if name in _FILES or any(fnmatch(name, pattern) for pattern in _GROWING)
        }
        # The id first: without it, what a join that was cut short has brought would pass for another run's.
        for name in sorted(wanted, key=lambda name: name != RUN_ID):
            self._fetch(name, self.run_dir / name, wanted[name])
        return f"{where} is at step {steps[0]}, ahead of {self.run_dir}: going on from there"

    def steps_ahead(self) -> list[int]:
        """Steps of valid copies beyond the newest valid checkpoint here, newest first."""
        here = max((info.step for info in list_checkpoints(self.run_dir) if info.fault is None), default=-1)
        there = self._steps(self.storage.list(_FOLDER))
        return [step for step in sorted(there, reverse=True) if step > here]

    def fetch(self, ranks: Ranks, say: Callable[[str], None]) -> None:
        """Bring the newest copy that is ahead of the run directory. Collective.

        A copy that is not whole is passed over, one that cannot be had now is not: raises `StorageAwayError` on every
        rank where the bucket is away from one, and ValueError for what keeps one from writing.
        """
        steps = ranks.on_first(self.steps_ahead)
        if steps:
            ranks.on_first(lambda: sweep(self.run_dir))  # a killed fetch may be the room that is missing
        for step in steps:
            begin = time.perf_counter()
            problem = self._fetch_step(step, ranks)
            if not problem:
                say(f"fetched step {step} from {self.storage.url} in {time.perf_counter() - begin:.0f} s")
                return
            say(f"warning: the copy of step {step} cannot be used: {problem}")
        if steps:
            raise ValueError(f"no copy in {self.storage.url} can be used, see above. {ranks.on_first(self._way_out)}")

    def push(self, step: int, ranks: Ranks, *, keep: int, keep_every: int, stall_s: float) -> str:
        """Copy the checkpoint just committed. Collective. Returns why it could not be done, or nothing.

        Gives up after half of `stall_s`: on a slow link the watchdog, for which this is one stage, would end the run.
        """
        in_time = replace(self, storage=self.storage.within(stall_s / 2, "half of train.stall_timeout_s"))
        folder = checkpoints_dir(self.run_dir) / step_name(step)
        problem = ranks.first_problem(_told(lambda: in_time._begin(folder.name)) if ranks.is_first else "")
        problem = problem or ranks.first_problem(_told(lambda: in_time._push_share(folder, step, ranks)))
        if problem:
            return problem
        return ranks.first_problem(
            _told(lambda: in_time._commit(folder, step, keep, keep_every)) if ranks.is_first else ""
        )

    # ---- Rank 0 and the others, up

    def _push_share(self, folder: Path, step: int, ranks: Ranks) -> None:
        mine = rank_file(ranks.rank, ranks.world_size)
        _await(folder / mine)
        self.storage.upload(folder / mine, f"{_FOLDER}/{step_name(step)}/{mine}")

    def _commit(self, folder: Path, step: int, keep: int, keep_every: int) -> None:
        num_ranks, records = read_manifest(folder)
        of_ranks = {rank_file(rank, num_ranks) for rank in range(num_ranks)}
        for record in records:
            if record.name not in of_ranks:
                self.storage.upload(folder / record.name, f"{_FOLDER}/{step_name(step)}/{record.name}")
        there = self.storage.list()
        for name in _FILES:
            if (self.run_dir / name).is_file():
                self.storage.upload(self.run_dir / name, name)
        for file in sorted(file for pattern in _GROWING for file in self.run_dir.glob(pattern)):
            if (name := file.relative_to(self.run_dir).as_posix()) not in there:
                self.storage.upload(file, name)
        self.storage.upload(folder / MANIFEST, f"{_FOLDER}/{step_name(step)}/{MANIFEST}")
        self._retain(step, keep, keep_every)

    def _begin(self, checkpoint: str) -> None:
        """Before anything is overwritten. The copy's id is the run's; the first save makes it. Raises ValueError if the
        URL is another run's."""
        here = _read_id(self.run_dir)
        if here is None:
            here = uuid.uuid4().hex
            write_json(self.run_dir / RUN_ID, {"run_id": here})
        self.storage.write(RUN_ID, (self.run_dir / RUN_ID).read_bytes(), create=True)
        if self._remote_id() != here:
            raise ValueError(f"{self.storage.url} holds another run: give checkpoint.remote another URL")
        # A copy of this step that was given up, and is written again now, must not count meanwhile.
        self.storage.remove([f"{_FOLDER}/{checkpoint}/{MANIFEST}"])

    def _retain(self, step: int, keep: int, keep_every: int) -> None:
        """As on the disk: the newest `keep` up to `step`, and multiples of `keep_every`."""
        there = self.storage.list(_FOLDER)
        valid = sorted(one for one in self._steps(there) if one <= step)
        kept = {*valid[-keep:], *(one for one in valid if keep_every and one % keep_every == 0)}
        old = [name for name in there if _step_of(name) not in (-1, *kept)]
        # The manifest first: half removed it must not look like a checkpoint.
        self.storage.remove(sorted(old, key=lambda name: not name.endswith(f"/{MANIFEST}")))

    # ---- And down

    def _fetch_step(self, step: int, ranks: Ranks) -> str:
        """Why it could not be fetched; empty where it is in place now."""
        final = checkpoints_dir(self.run_dir) / step_name(step)
        token = ranks.broadcast_json(uuid.uuid4().hex[:8])
        temporary = final.with_name(f".tmp-{final.name}-{token}")

        def fetch_mine() -> None:
            manifest = self.storage.read(f"{_FOLDER}/{final.name}/{MANIFEST}")
            for record in _records(manifest)[ranks.rank :: ranks.world_size]:
                name = f"{_FOLDER}/{final.name}/{record.name}"
                self._fetch(name, temporary / record.name, record.size_bytes)

        def put_in_place() -> None:
            (temporary / MANIFEST).write_bytes(self.storage.read(f"{_FOLDER}/{final.name}/{MANIFEST}"))
            if final.exists():  # an invalid one
                os.rename(final, final.with_name(f".tmp-replaced-{final.name}-{token}"))
            os.rename(temporary, final)
            fsync_dir(final.parent)

        try:
            problem = ranks.first_problem(ranks.together(lambda: _fault_of_copy(fetch_mine)))
            return problem or ranks.first_problem(
                ranks.together(lambda: _fault_of_copy(put_in_place) if ranks.is_first else "")
            )
        finally:
            if ranks.is_first:
                shutil.rmtree(temporary, ignore_errors=True)

    def _way_out(self) -> str:
        if here := [info.step for info in list_checkpoints(self.run_dir) if info.fault is None]:
            return f"Restore one, or leave checkpoint.remote out to go on from step {max(here)}, which is here"
        return "Restore one, or choose another run.path and checkpoint.remote to start anew"

    def _fetch(self, name: str, file: Path, size_bytes: int) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".tmp-{file.name}-{uuid.uuid4().hex[:8]}")
        try:
            self.storage.fetch(name, temporary, size_bytes=size_bytes)
            os.replace(temporary, file)
        except OSError as error:
            if error.filename is None:  # a full disk
                raise OSError(error.errno, error.strerror, str(file)) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)

    def _steps(self, there: dict[str, Object]) -> set[int]:
        """Those with a manifest; what it lists is looked at when it is fetched."""
        return {_step_of(name) for name in there if name.endswith(f"/{MANIFEST}")} - {-1}

    def _remote_id(self) -> str | None:
        try:
            return str(json.loads(self.storage.read(RUN_ID))["run_id"])
        except FileNotFoundError:
            return None


def _step_of(name: str) -> int:
    """Of a file of a checkpoint; -1 for anything else."""
    match = _STEP.match(name)
    return int(match[1]) if match else -1


def _records(manifest: bytes) -> list[FileRecord]:
    try:
        files: dict[str, Any] = json.loads(manifest)["files"]
        return [FileRecord(name=n, size_bytes=int(e["size_bytes"]), sha256=str(e["sha256"])) for n, e in files.items()]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"its manifest is damaged ({error})") from error


def _read_id(run_dir: Path) -> str | None:
    file = run_dir / RUN_ID
    try:
        return str(json.loads(patiently(file.read_text, str(file)))["run_id"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} cannot be read ({error}): restore it from checkpoint.remote") from error


def _fault_of_copy(action: Callable[[], None]) -> str:
    """What is wrong with a copy, if that is what an action meets."""
    try:
        action()
    except (FileNotFoundError, ObjectChangedError, CheckpointError) as error:
        return str(error)
    return ""


def _told(action: Callable[[], None]) -> str:
    try:
        action()
    except (OSError, ValueError, StorageAwayError) as error:
        return str(error) or type(error).__name__
    return ""


def _await(file: Path) -> None:
    """A directory that another node has just renamed may appear here a moment later."""
    deadline = time.monotonic() + _VISIBLE_S
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
