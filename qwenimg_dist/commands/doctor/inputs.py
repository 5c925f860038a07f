"""What a run reads besides its data set: is it there on every node, and the same thing?

Place in the flow: `storage.py` asks for it. Of each local path that the config names and only reads (the source, what
the run starts from, further data), every node tells what it finds; nothing is written. A folder that is empty on one
node and not on another is a mount point without its mount. Of the model `hub.py` tells.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

from qwenimg_dist.commands.doctor.findings import Context, Finding, failure, ok, warning
from qwenimg_dist.config import Config, SyntheticTextSource
from qwenimg_dist.storage import is_remote

What = Literal["file", "folder", "empty folder"]
_MOUNT: Final = "correct the path, or mount the same file system at the same path on every node"


def check_inputs(context: Context) -> list[Finding]:
    """One line per key where all is well, else one per node that lacks it."""
    found: list[Finding] = []
    for key, path in local_inputs(context.config).items():
        answers = context.nodes.ask(look, path, timeout_s=context.timeout_s)
        name = f"{key}={path}"
        found += [failure(f"{name} on {node}", told, _MOUNT) for node, told in answers.faults.items()]
        found += judge(name, answers.values)
    return found


def local_inputs(config: Config) -> dict[str, str]:
    """Config key -> absolute path of what producers or ranks read."""
    source = config.source
    given = {
        **_numbered("source.path", [_folder_of(path) for path in source_paths(config)]),
        "source.root": getattr(source, "root", None),
        "evaluate.data_path": config.evaluate.data_path,
        "train.replay_generations": config.train.replay_generations,
        "data.takedown": config.data.takedown,
    }
    if isinstance(source, SyntheticTextSource):
        given["source.backgrounds"] = source.backgrounds
        given |= _numbered("source.fonts", source.fonts)
        given |= _numbered("source.chinese_fonts", [font.partition("#")[0] for font in source.chinese_fonts])
    if not _is_begun(config):  # a run that has a checkpoint of its own needs what it came from no more
        given["start_from"] = config.start_from.path
    local = {key: path.removeprefix("file://") for key, path in given.items() if path and not is_remote(path)}
    return {key: str(Path(path).expanduser().absolute()) for key, path in local.items()}


def source_paths(config: Config) -> tuple[str, ...]:
    """Some sources take several."""
    path = config.source.path
    return (path,) if isinstance(path, str) else tuple(path or ())


def _folder_of(path: str) -> str:
    """Where a pattern of tars begins; any other path as it is."""
    while not is_remote(path) and not os.path.exists(path) and (glob.has_magic(path) or "{" in path):
        path = os.path.dirname(path)
    return path


def _numbered(key: str, paths: Sequence[str]) -> dict[str, str | None]:
    return {key if len(paths) == 1 else f"{key}[{index}]": path for index, path in enumerate(paths)}


def _is_begun(config: Config) -> bool:
    from consumers.checkpoint_files import list_checkpoints  # imports torch

    found = list_checkpoints(Path(config.run.path)) if config.run.path and not config.train.fresh else []
    return any(info.fault is None for info in found)


def look(path: str) -> What:
    """On a node: what is there and can be read. Raises OSError."""
    try:
        with os.scandir(path) as entries:
            return "folder" if next(entries, None) is not None else "empty folder"
    except NotADirectoryError:
        with open(path, "rb") as file:
            file.read(1)
        return "file"


def judge(name: str, there: Mapping[str, What]) -> list[Finding]:
    """By node what it found; nodes without an answer are told already."""
    empty = [node for node, what in there.items() if what == "empty folder"]
    if not empty:
        return [ok(name, f"can be read on {len(there)} nodes")] if there else []
    if len(empty) < len(there):
        told = "is an empty folder there, and not on other nodes: nothing is mounted on it"
        return [failure(f"{name} on {node}", told, _MOUNT) for node in empty]
    return [warning(name, "is an empty folder on every node", "fill it, or correct the path")]
