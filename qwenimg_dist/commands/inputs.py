"""What several commands need of their input: required paths, a device that is there, errors of the disk in words."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from consumers.checkpoint_reader import CheckpointReader
    from qwenimg_dist.config import Config


def required(value: str | None, key: str) -> str:
    """`value`, or a ValueError that says which key to set."""
    if not value:
        raise ValueError(f"{key} is not set: add {key}=... to the command")
    return value


def usable_device(name: Literal["cpu", "cuda"]) -> torch.device:
    """The device, or a ValueError that says what to set."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("cluster.device=cuda, but torch finds no GPU here: set cluster.device=cpu")
    return torch.device(name)


def wanted_weights(config: Config, reader: CheckpointReader) -> Literal["master", "ema"]:
    """What `export.weights` means in a checkpoint, or a ValueError that says what to set where it has no average."""
    if config.export.weights == "raw":
        return "master"
    if not reader.has_ema:
        raise ValueError(f"{reader.path} has no EMA (optim.ema_decay was 0): set export.weights=raw")
    return "ema"


def describe_os_error(error: OSError) -> str:
    """For a person; a full disk with the way out."""
    if error.errno == errno.ENOSPC:
        where = f" while writing {error.filename}" if error.filename else ""
        return f"the disk is full{where}; what is committed is kept: make room and run the same command again"
    return f"{type(error).__name__}: {error}"
