"""Finds a directory of weights: on this machine, or on the hub at a pinned revision.

Place in the flow: pipelines (`pipeline.py`) and the models of filters and rewards are found through it. Refuses hub ids
without a revision (a moving `main` would change what a run means), and downloads no file but JSON, text, vocabularies
and safetensors: pickles do not even arrive. Nothing that comes from outside is run as code.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

MODEL_PATTERNS: Final = ("*.json", "*.txt", "*.model", "*.safetensors")
"""Of a transformers model, in the repository's root."""


def resolve_directory(path: str, revision: str | None, *, patterns: Sequence[str], keys: tuple[str, str]) -> Path:
    """The directory `path`, or that of the hub id `path` at `revision`, with the files that match `patterns`.

    `keys` name the config keys of both for messages. Raises ValueError saying what is missing, what to set, or why the
    download failed.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.startswith(("/", ".", "~")) or path.count("/") != 1:
        raise ValueError(f"{folder}: no such directory, and not a hub id of the form owner/name; set {keys[0]}")
    if revision is None:
        raise ValueError(f"{path}: no such directory; if it is meant as a hub id, pin it with {keys[1]}=<commit hash>")
    return _download(path, revision, patterns, keys[0])


def find_model(path: str, revision: str | None) -> Path:
    """The directory of a transformers model with safetensors weights; see `resolve_directory`."""
    folder = resolve_directory(path, revision, patterns=MODEL_PATTERNS, keys=("path", "revision"))
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: not a transformers model: config.json is missing")
    if not any(folder.glob("*.safetensors")):
        others = ", ".join(sorted(file.name for file in folder.glob("*.bin"))) or "no weights at all"
        raise ValueError(
            f"{folder}: no *.safetensors there ({others}): pickled weights are not read, convert them first"
        )
    return folder


def _download(repo: str, revision: str, patterns: Sequence[str], path_key: str) -> Path:
    from huggingface_hub import snapshot_download  # its import costs most of a second: only when needed
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ValueError(
            f"cannot get {repo} at revision {revision} from the hub ({type(error).__name__}: {error}); "
            f"check the network, the revision and access rights, or set {path_key} to a local directory"
        ) from error
