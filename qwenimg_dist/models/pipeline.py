"""Finds a diffusers pipeline directory (local or from the hub) and fingerprints its components.

Place in the flow: every command that takes `model.path` resolves it here; the fingerprints become the
`<id>` of facets, so that data encoded by one model is refused by another.

Refuses: hub ids without a revision (a moving `main` would change what a run means), and any file on the hub
that is not JSON, text or safetensors: pickles are not even downloaded.
"""

import fnmatch
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from qwenimg_dist.config import ModelConfig
from qwenimg_dist.models.hub import resolve_directory
from qwenimg_dist.models.safetensors_directory import SafetensorsDirectory

COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
OPTIONAL_COMPONENTS = ("processor",)
"""Of edit pipelines: how the text encoder's eye cuts pictures."""
PROVENANCE = "qwenimg_dist.json"
"""In an exported pipeline: run, step and weights that it was."""
CERTIFICATE = "certificate.json"
"""In a checkpoint, and taken along by its export: what it was made by and from, see `consumers/certificate.py`."""
SAFE_SUFFIXES = (".json", ".txt", ".jinja", ".safetensors")
SAMPLED_BLOCKS = 4
SAMPLED_BLOCK_BYTES = 16_384
ID_LENGTH = 12


def resolve_pipeline(path: str, revision: str | None = None, *, components: Sequence[str] | None = None) -> Path:
    """The local directory of the pipeline `path`: a directory, or a hub id at a pinned `revision`.

    `components` restricts a download (and the check of a local directory) to these subfolders. Raises
    ValueError saying what is missing, what to set, or why the download failed.
    """
    wanted = tuple(components) if components is not None else COMPONENTS
    folders = (*wanted, *OPTIONAL_COMPONENTS)
    patterns = ["model_index.json", *(f"{name}/*{suffix}" for name in folders for suffix in SAFE_SUFFIXES)]
    folder = resolve_directory(path, revision, patterns=patterns, keys=("model.path", "model.revision"))
    return _check_local(folder, wanted)


def pipeline_dir(model: ModelConfig, *, components: Sequence[str] | None = None) -> Path:
    """The directory of the configured model: built in the user's cache for `model=tiny` without a path."""
    if model.edit and (model.path is not None or model.name != "tiny"):
        raise ValueError(
            "model.edit is an option of the tiny twin: of another model give an edit pipeline as model.path"
        )
    if model.path is not None:
        return resolve_pipeline(model.path, model.revision, components=components)
    if model.name != "tiny":
        raise ValueError(f"model.path is not set: give a directory or hub id for model={model.name}")
    from qwenimg_dist.models.tiny import tiny_pipeline_dir  # builds real models: only where it is wanted

    return tiny_pipeline_dir(edit=model.edit)


def pipeline_class(folder: Path) -> str:
    """Name of the diffusers class that loads a pipeline directory: `QwenImagePipeline`, `QwenImageEditPlusPipeline`."""
    return str(json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get("_class_name"))


def _check_local(folder: Path, components: Sequence[str]) -> Path:
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder}: not a diffusers pipeline directory: model_index.json is missing")
    missing = [name for name in components if not (folder / name).is_dir()]
    if missing:
        raise ValueError(f"{folder}: the pipeline lacks the component folders {', '.join(missing)}")
    return folder


def fingerprint_component(directory: str | Path, patterns: Sequence[str] = ("*",)) -> str:
    """12 hex digits identifying a component directory by its configuration, vocabulary and weights; by those of its
    files whose names match one of `patterns`.

    Small files are hashed whole; JSON is hashed parsed, without the keys that saving again changes
    (`_name_or_path`, versions), so that a copy or a re-export keeps its id. Weights are hashed per tensor
    in name order, hence independently of sharding: name, dtype, shape, and the data, whole up to 64 KiB,
    beyond that 4 evenly spread blocks of 16 KiB. Trade-off: training or converting a model changes every
    block and is always seen, a full 16-GB component costs about 0.05 GB of reading instead of 16; an edit
    of single values between the blocks is not seen. It is an identity, not a signature.

    Raises ValueError if the directory is missing or empty, WeightsError if its weights are torn.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such component directory")
    digest = hashlib.sha256()
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    files = [file for file in files if any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns)]
    small = [f for f in files if not f.name.endswith((".safetensors", ".safetensors.index.json", ".md"))]
    for file in small:
        data = _canonical_json(file) if file.suffix == ".json" else file.read_bytes()
        digest.update(f"{file.name}\0{len(data)}\0".encode() + data)
    if any(file.name.endswith(".safetensors") for file in files):
        _hash_tensors(SafetensorsDirectory(folder), digest)
    elif not small:
        raise ValueError(f"{folder}: nothing to fingerprint: the directory is empty")
    return digest.hexdigest()[:ID_LENGTH]


def _canonical_json(file: Path) -> bytes:
    content = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(content, dict):
        volatile = {"_name_or_path", "_diffusers_version", "transformers_version", "_commit_hash"}
        content = {key: value for key, value in content.items() if key not in volatile}
    return json.dumps(content, sort_keys=True, ensure_ascii=True).encode()


def _hash_tensors(weights: SafetensorsDirectory, digest: "hashlib._Hash") -> None:
    whole = SAMPLED_BLOCKS * SAMPLED_BLOCK_BYTES
    for name in weights.names:
        entry = weights.entries[name]
        digest.update(f"{name}\0{entry.dtype}\0{entry.shape}\0".encode())
        size = entry.stop - entry.start
        if size <= whole:
            offsets, length = [0], size
        else:
            step = (size - SAMPLED_BLOCK_BYTES) / (SAMPLED_BLOCKS - 1)
            offsets, length = [int(i * step) for i in range(SAMPLED_BLOCKS)], SAMPLED_BLOCK_BYTES
        descriptor = os.open(entry.file, os.O_RDONLY)
        try:
            for offset in offsets:
                digest.update(os.pread(descriptor, length, entry.start + offset))
        finally:
            os.close(descriptor)
