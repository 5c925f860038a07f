"""What several commands need of their input: required paths, the config that a run directory was made with, errors of
the file system in words."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from omegaconf import OmegaConf

from qwenimg_dist.compose import compose_tree, validate
from qwenimg_dist.config import Config

if TYPE_CHECKING:
    import torch


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


def run_config(run_dir: Path, args: list[str]) -> Config:
    """The config a run was made with; `model.*` overrides on this command line win (a moved model directory)."""
    file = run_dir / "config.yaml"
    if not file.is_file():
        raise ValueError(f"{run_dir} is not a run directory (no config.yaml)")
    tree = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    if not isinstance(tree, dict):
        raise ValueError(f"{file} is not a mapping")
    plain = {str(key): value for key, value in tree.items()}
    if any(word.startswith("model.") for word in args):
        given = compose_tree(args)["model"]
        named = {word.partition("=")[0].removeprefix("model.") for word in args if word.startswith("model.")}
        plain["model"] = {**plain["model"], **{key: given[key] for key in named}}
    return validate(plain)


def describe_os_error(error: OSError) -> str:
    """For a person; a full disk with the way out."""
    if error.errno == errno.ENOSPC:
        where = f" while writing {error.filename}" if error.filename else ""
        return f"the disk is full{where}; what is committed is kept: make room and run the same command again"
    return f"{type(error).__name__}: {error}"
