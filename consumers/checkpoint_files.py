"""A checkpoint on disk: `step-NNNNNNNN/` with a safetensors file per rank, `state.json`, `certificate.json` and
`manifest.json`.

Place in the flow: `checkpoint_save.py` writes through this on the ranks, `checkpoint_reader.py` reads it, with or
without ranks. A rank's file holds, for each parameter NAME, the fp32 tensors `master/NAME`, `exp_avg/NAME`,
`exp_avg_sq/NAME` and `ema/NAME` of that rank's elements (of a frozen parameter `master/NAME` alone), and in its
metadata the range [start, stop) of them in the flattened parameter. So any number of ranks can read what it needs by
byte ranges.

**A checkpoint is valid if and only if its manifest is there and every file has the size (and, when read, the sha256)
that stands in it.** Refuses pickles, and to return anything of a checkpoint that is not whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch

from qwenimg_dist.debug import fault_point
from qwenimg_dist.files import write_json
from qwenimg_dist.models.pipeline import CERTIFICATE
from qwenimg_dist.patience import patiently

FORMAT: Final = 1
MANIFEST: Final = "manifest.json"
STATE: Final = "state.json"
TEMPORARY: Final = ".tmp-"
"""What a file or folder is called here that is not in place yet, or no more."""
Which = Literal["master", "ema", "exp_avg", "exp_avg_sq"]
_STEP_DIR: Final = re.compile(r"^step-(\d{8,})$")
_CHUNK_BYTES: Final = 1 << 22


class CheckpointError(ValueError):
    """No checkpoint can be used, or one cannot be written; the message names each and the way out."""


def no_valid_checkpoint(run_dir: Path, faults: Sequence[str]) -> CheckpointError:
    """The refusal to start over where checkpoints are, each of them named with its fault."""
    return CheckpointError(
        f"{run_dir} has {len(faults)} checkpoint(s), none of them valid: {'; '.join(faults)}. Restore one from a "
        "backup, or start anew with train.fresh=true (they are moved aside)"
    )


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One tensor to write: elements [start, stop) of a flattened parameter."""

    which: Which
    name: str
    start: int
    stop: int
    values: torch.Tensor
    """fp32, or bf16 (of a frozen parameter), which is written as fp32."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What the manifest says of one file."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """One checkpoint directory, as `list_checkpoints` sees it (sizes checked, bytes not hashed)."""

    path: Path
    step: int
    num_ranks: int
    size_bytes: int
    fault: str | None
    """None, or why it is not valid."""


def checkpoints_dir(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def rank_file(rank: int, num_ranks: int) -> str:
    return f"rank-{rank:05d}-of-{num_ranks:05d}.safetensors"


def space_fault(
    run_dir: Path, num_parameters: int, *, ema: bool, num_frozen: int = 0, swept: bool = True
) -> str | None:
    """None, or that the disk has no room for one checkpoint. Without `swept`, what a `sweep` would remove is room."""
    needed, free = checkpoint_bytes(num_parameters, ema=ema, num_frozen=num_frozen), free_bytes(run_dir)
    if free < needed and not swept:
        free += sum(map(_taken_bytes, _left_over(run_dir)))
    if free >= needed:
        return None
    return (
        f"the disk is too full: one checkpoint in {run_dir} needs {needed / 1e9:.3f} GB, {free / 1e9:.3f} GB are free; "
        "make room, lower checkpoint.keep, or choose another run.path"
    )


def checkpoint_bytes(num_parameters: int, *, ema: bool, num_frozen: int = 0) -> int:
    """What one checkpoint takes: fp32 weights, two moments and EMA of trained ones, and some for the headers."""
    return int(4 * (num_parameters + (num_parameters - num_frozen) * (2 + ema)) * 1.02)


def free_bytes(folder: Path) -> int:
    """Free where `folder` is or would be made."""
    existing = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    return shutil.disk_usage(existing).free


def sweep(run_dir: Path) -> None:
    """Remove temporaries of the dead. Rank 0's, while no save and no fetch is under way."""
    remove(_left_over(run_dir))


def remove(folders: Sequence[Path]) -> None:
    """What cannot be removed is tried again by the next `sweep`."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _left_over(run_dir: Path) -> list[Path]:
    return list(checkpoints_dir(run_dir).glob(f"{TEMPORARY}*"))


def _taken_bytes(folder: Path) -> int:
    """On the disk, of the files right in a folder; the size of one that was being fetched is not yet taken."""
    taken = 0
    with contextlib.suppress(OSError):  # gone meanwhile
        taken = sum(file.stat().st_blocks * 512 for file in folder.iterdir())
    return taken


class GivenUp(Exception):
    """A file was left half written, as asked."""


def write_rank_file(file: Path, pieces: Sequence[Piece], given_up: Callable[[], bool] = lambda: False) -> FileRecord:
    """Write one rank's tensors as safetensors, one at a time, fsynced. Host memory: the largest piece.

    Raises `GivenUp` between two tensors when `given_up` says so.
    """
    header: dict[str, Any] = {
        "__metadata__": {"ranges": json.dumps({piece.name: [piece.start, piece.stop] for piece in pieces})}
    }
    position = 0
    for piece in pieces:
        end = position + piece.values.numel() * 4
        header[f"{piece.which}/{piece.name}"] = {
            "dtype": "F32",
            "shape": [piece.values.numel()],
            "data_offsets": [position, end],
        }
        position = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with open(file, "wb") as sink:
        for data in (len(head).to_bytes(8, "little"), head):
            digest.update(data)
            sink.write(data)
        for index, piece in enumerate(pieces):
            if given_up():
                raise GivenUp
            if index == len(pieces) // 2:
                sink.flush()
                fault_point("checkpoint_write")
            if piece.values.dtype not in (torch.float32, torch.bfloat16):
                raise TypeError(f"{piece.which}/{piece.name} is {piece.values.dtype}, checkpoints hold fp32")
            view = piece.values.detach().cpu().float().contiguous().view(torch.uint8).numpy().data
            digest.update(view)
            sink.write(view)
        sink.flush()
        os.fsync(sink.fileno())
    return FileRecord(name=file.name, size_bytes=8 + len(head) + position, sha256=digest.hexdigest())


def write_state(folder: Path, state: Mapping[str, Any]) -> FileRecord:
    """Write `state.json` and describe it for the manifest."""
    write_json(folder / STATE, state)
    return describe(folder / STATE)


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's `state.json`. Raises `CheckpointError` if it is damaged, which its size need not tell."""
    file = path / STATE
    try:
        state = json.loads(patiently(file.read_text, str(file)))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} cannot be read: it holds no object")
    return state


def write_certificate(folder: Path, certificate: Mapping[str, Any]) -> FileRecord:
    """Write `certificate.json` and describe it for the manifest."""
    write_json(folder / CERTIFICATE, certificate)
    return describe(folder / CERTIFICATE)


def read_certificate(path: Path) -> dict[str, Any] | None:
    """A checkpoint's certificate; None if it was written without one. Raises `CheckpointError` if it is damaged."""
    try:
        file = path / CERTIFICATE
        tree = json.loads(patiently(lambda: file.read_text(encoding="utf-8"), str(file)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / CERTIFICATE} cannot be read ({error})") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path / CERTIFICATE} is no certificate")
    return tree


def write_manifest(folder: Path, step: int, num_ranks: int, files: Iterable[FileRecord]) -> None:
    listed = {record.name: {"size_bytes": record.size_bytes, "sha256": record.sha256} for record in files}
    write_json(folder / MANIFEST, {"format": FORMAT, "step": step, "num_ranks": num_ranks, "files": listed})


def describe(file: Path) -> FileRecord:
    """Size and sha256 of a file as it is."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return FileRecord(name=file.name, size_bytes=file.stat().st_size, sha256=digest.hexdigest())


def list_checkpoints(run_dir: Path) -> list[CheckpointInfo]:
    """All checkpoints of a run by step, valid or not; what was never renamed into place is not one.

    Raises `StorageAwayError` where that cannot be seen now: an earlier checkpoint must not be taken for the newest.
    """
    folder = checkpoints_dir(run_dir)
    try:
        names = patiently(lambda: os.listdir(folder), str(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [(int(match[1]), folder / name) for name in names if (match := _STEP_DIR.match(name))]
    return [_inspect(path, step) for step, path in sorted(found)]


def _inspect(path: Path, step: int) -> CheckpointInfo:
    try:
        num_ranks, records = read_manifest(path)
        fault = next((problem for record in records if (problem := size_fault(path, record))), None)
    except CheckpointError as error:
        return CheckpointInfo(path=path, step=step, num_ranks=0, size_bytes=0, fault=str(error))
    size = sum(record.size_bytes for record in records)
    return CheckpointInfo(path=path, step=step, num_ranks=num_ranks, size_bytes=size, fault=fault)


def read_manifest(path: Path) -> tuple[int, list[FileRecord]]:
    """(number of ranks, files) of a checkpoint. Raises `CheckpointError` if the manifest is missing or damaged."""
    file = path / MANIFEST
    try:
        tree = json.loads(patiently(file.read_text, str(file)))
        if tree["format"] != FORMAT:
            raise CheckpointError(f"{file}: format {tree['format']}, this program reads {FORMAT}")
        if step_name(int(tree["step"])) != path.name:
            raise CheckpointError(f"{file} is of step {tree['step']}, not of {path.name}: it was moved or damaged")
        records = [
            FileRecord(name=str(name), size_bytes=int(entry["size_bytes"]), sha256=str(entry["sha256"]))
            for name, entry in sorted(tree["files"].items())
        ]
        num_ranks = int(tree["num_ranks"])
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing: the checkpoint was never committed") from error
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged ({type(error).__name__}: {error})") from error
    expected = {STATE, *(rank_file(rank, num_ranks) for rank in range(num_ranks))}
    if {record.name for record in records} - {CERTIFICATE} != expected:  # a certificate is no state: it may lack
        raise CheckpointError(f"{file} does not list the files of {num_ranks} ranks")
    return num_ranks, records


def size_fault(path: Path, record: FileRecord) -> str | None:
    """None, or what is wrong with a file's presence or size."""
    file = path / record.name
    try:
        size = patiently(file.stat, str(file)).st_size
    except FileNotFoundError:
        return f"{file} is missing"
    except OSError as error:
        return f"{file} cannot be looked at ({error.strerror})"
    if size != record.size_bytes:
        return f"{file} has {size} bytes, the manifest says {record.size_bytes}"
    return None


def content_fault(path: Path, record: FileRecord) -> str | None:
    """As `size_fault`, and the bytes are hashed."""
    if fault := size_fault(path, record):
        return fault
    if patiently(lambda: describe(path / record.name), str(path / record.name)).sha256 != record.sha256:
        return f"{path / record.name} is not what {MANIFEST} says (sha256 differs): one of them has changed since"
    return None
