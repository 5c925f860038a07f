"""Reads a checkpoint by parameter name and element range, whatever number of ranks wrote it.

Place in the flow: `checkpoint.py` resumes through `CheckpointReader`; `ckpt verify` and `ckpt export` use it without
ranks, one tensor at a time. Knows the file format only as `checkpoint_files.py` describes it. Refuses to return
anything that is not wholly stored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from consumers.checkpoint_files import (
    STATE,
    CheckpointError,
    Which,
    content_fault,
    list_checkpoints,
    rank_file,
    read_manifest,
    read_state,
)
from consumers.parameter_groups import FROZEN
from qwenimg_dist.models.safetensors_directory import TensorEntry, WeightsError, read_header
from qwenimg_dist.patience import patiently


def verify_checkpoint(path: Path) -> list[str]:
    """What is wrong with a checkpoint after reading every byte; empty if it is sound."""
    try:
        _, records = read_manifest(path)
        faults = [fault for record in records if (fault := content_fault(path, record))]
        if not faults:
            reader = CheckpointReader(path)
            for name in reader.names:
                reader.check_covered(name)
    except CheckpointError as error:
        return [str(error)]
    return faults


def open_checkpoint(run_dir: Path, step: int | None = None, *, verify: bool = False) -> CheckpointReader:
    """The newest valid checkpoint of a run, or that of `step`. Raises `CheckpointError` naming what there is.

    Manifest, sizes and headers are checked; with `verify` every byte of it is hashed besides (327 GB at 20 B).
    """
    found = list_checkpoints(run_dir)
    wanted = [info for info in found if step is None or info.step == step]
    faults = []
    for info in reversed(wanted):
        try:
            fault = info.fault or next(iter(verify_checkpoint(info.path) if verify else ()), None)
            if fault:
                raise CheckpointError(fault)
            reader = CheckpointReader(info.path)
            for name in reader.names:
                reader.check_covered(name)
        except CheckpointError as error:
            faults.append(f"step {info.step}: {error}")
        else:
            return reader
    if faults:
        raise CheckpointError(f"no valid checkpoint in {run_dir}: " + "; ".join(faults))
    steps = ", ".join(str(info.step) for info in found) or "none"
    what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
    raise CheckpointError(f"{what} in {run_dir} (there are: {steps})")


@dataclass(frozen=True, kw_only=True)
class _Stored:
    start: int
    stop: int
    entry: TensorEntry


class CheckpointReader:
    """Reads tensors of a checkpoint, whole or by element range, whatever number of ranks wrote it.

    Opening reads the headers of all rank files. Raises `CheckpointError` if one is missing or torn.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_ranks, _ = read_manifest(path)
        self.state = read_state(path)
        try:
            self.step = int(self.state["step"])
            self._frozen = {str(n) for n, p in self.state["parameters"].items() if p.get("group") == FROZEN}
            self._shapes = {str(n): tuple(map(int, p["shape"])) for n, p in self.state["parameters"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path / STATE} cannot be read ({type(error).__name__}: {error})") from error
        self._pieces: dict[str, list[_Stored]] = {}
        for rank in range(self.num_ranks):
            self._index(path / rank_file(rank, self.num_ranks))

    @property
    def names(self) -> list[str]:
        """Parameter names, sorted."""
        return sorted(self._shapes)

    @property
    def has_ema(self) -> bool:
        return any(key.startswith("ema/") for key in self._pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._shapes:
            raise CheckpointError(f"{self.path} has no parameter {name!r}")
        return self._shapes[name]

    def read(self, name: str, which: Which = "ema") -> torch.Tensor:
        """One whole parameter, fp32, on the CPU."""
        shape = self.shape(name)
        values = torch.empty(torch.Size(shape).numel())
        self.read_range_into(name, which, 0, values)
        return values.view(shape)

    def read_range_into(self, name: str, which: Which, start: int, target: torch.Tensor) -> None:
        """Fill `target` (1-D) with the elements from `start` on. Raises `CheckpointError` if any is not stored."""
        stop = start + target.numel()
        if which == "ema" and not self.has_ema:
            raise CheckpointError(f"{self.path} has no EMA (optim.ema_decay was 0): take the raw weights")
        if which == "ema" and name in self._frozen:
            which = "master"  # the average of what never moved
        position = start
        for stored in self._pieces.get(f"{which}/{name}", ()):
            low, high = max(position, stored.start), min(stop, stored.stop)
            if low == position and low < high:
                part = target[low - start : high - start]
                patiently(lambda: _read_into(part, stored, low, high), str(stored.entry.file))  # noqa: B023
                position = high
        if position < stop:
            raise CheckpointError(f"{self.path} lacks elements [{position}, {stop}) of {which}/{name}")

    def check_covered(self, name: str) -> None:
        """Raise `CheckpointError` unless the masters of a parameter are stored wholly."""
        position, numel = 0, torch.Size(self.shape(name)).numel()
        for stored in self._pieces.get(f"master/{name}", ()):
            position = stored.stop if stored.start == position else position
        if position != numel:
            raise CheckpointError(f"{self.path} lacks elements [{position}, {numel}) of {name}")

    def _index(self, file: Path) -> None:
        try:
            entries = patiently(lambda: read_header(file), str(file))
            head = patiently(lambda: _read_head(file), str(file))
            ranges = json.loads(head["__metadata__"]["ranges"])
        except (WeightsError, OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} cannot be read ({error})") from error
        for key, entry in entries.items():
            start, stop = ranges[key.partition("/")[2]]
            pieces = self._pieces.setdefault(key, [])
            pieces.append(_Stored(start=start, stop=stop, entry=entry))  # ranks ascend, and so do their ranges


def _read_head(file: Path) -> dict[str, Any]:
    """The header of a safetensors file."""
    with open(file, "rb") as stream:
        head: dict[str, Any] = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return head


def _read_into(target: torch.Tensor, stored: _Stored, low: int, high: int) -> None:
    """Fill `target` (fp32, contiguous, on the CPU) with the elements [low, high) of the parameter, without a copy."""
    view = target.detach().view(torch.uint8).numpy().data
    offset = stored.entry.start + (low - stored.start) * 4
    with open(stored.entry.file, "rb", buffering=0) as stream:
        stream.seek(offset)
        done = 0
        while done < len(view):
            count = stream.readinto(view[done:])
            if not count:
                raise CheckpointError(f"{stored.entry.file} ended at byte {offset + done}")
            done += count
