"""Writes weights as sharded safetensors, one tensor in memory at a time.

Place in the flow: every weight that leaves (`ckpt export`) goes through `write_sharded`; stock diffusers and
`SafetensorsDirectory` read the result.

Refuses: to overwrite a complete set of weights, tensors whose shape or dtype is not what was announced, and
NaN.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from qwenimg_dist.files import fsync_dir, write_json
from qwenimg_dist.models.safetensors_directory import DTYPE_NAMES, SafetensorsDirectory, WeightsError

STEM = "diffusion_pytorch_model"

TensorSource = tuple[str, Sequence[int], torch.dtype, Callable[[], torch.Tensor]]


def write_sharded(
    path: str | Path,
    tensors: Iterable[TensorSource],
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> list[Path]:
    """Streams `tensors` into HF-named shards in `path` and returns the weight files, verified.

    `tensors` gives (name, shape, dtype, get). Headers are made from the first three alone; every `get` is
    called exactly once, in the given order, when its bytes are due, so that collective consolidation on
    other ranks can run in step and one tensor is in memory at a time. `max_shard_bytes` counts data bytes;
    a larger tensor gets a shard of its own. Files appear under temporary names, are fsynced, then renamed,
    the index last: a killed export leaves no loadable directory, and the same call again replaces its
    leftovers.

    Raises ValueError if a complete set is already there, if a name occurs twice, if a tensor's
    shape or dtype differs from what was announced, or if it holds NaN or inf.
    """
    folder = Path(path)
    sources = list(tensors)
    names = [name for name, *_ in sources]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"{folder}: nothing to export, or a tensor name occurs twice")
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    shards = _plan_shards(sources, max_shard_bytes)
    finals = [folder / _shard_name(i, len(shards)) for i in range(len(shards))]
    temporaries = [file.with_name(f".{file.name}.tmp") for file in finals]
    try:
        for temporary, shard in zip(temporaries, shards, strict=True):
            _write_shard(temporary, shard)
    except BaseException:  # a full disk should not stay full of what nobody can load
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
        raise
    for temporary, final in zip(temporaries, finals, strict=True):
        os.replace(temporary, final)
    if len(shards) > 1:
        weight_map = {name: final.name for final, shard in zip(finals, shards, strict=True) for name, *_ in shard}
        total = sum(_num_bytes(source) for source in sources)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / f"{STEM}.safetensors.index.json", index)
    fsync_dir(folder)
    verify(folder, [(name, shape, dtype) for name, shape, dtype, _ in sources])
    return finals


def verify(path: str | Path, expected: Iterable[tuple[str, Sequence[int], torch.dtype]]) -> None:
    """Reopens a component directory and compares every name, shape, dtype and file size with `expected`.

    Raises WeightsError naming the first difference.
    """
    directory = SafetensorsDirectory(path)
    wanted = {name: (tuple(shape), dtype) for name, shape, dtype in expected}
    missing, extra = wanted.keys() - directory.entries.keys(), directory.entries.keys() - wanted.keys()
    if missing or extra:
        raise WeightsError(f"{path}: missing tensors {sorted(missing)[:5]}, unexpected tensors {sorted(extra)[:5]}")
    for name, (shape, dtype) in wanted.items():
        found = (directory.shape(name), directory.dtype(name))
        if found != (shape, dtype):
            raise WeightsError(f"{directory.entries[name].file}: tensor {name!r} is {found}, not {(shape, dtype)}")


def _num_bytes(source: TensorSource) -> int:
    return math.prod(source[1]) * source[2].itemsize


def _plan_shards(sources: Sequence[TensorSource], max_shard_bytes: int) -> list[list[TensorSource]]:
    shards: list[list[TensorSource]] = [[]]
    filled = 0
    for source in sources:
        if shards[-1] and filled + _num_bytes(source) > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(source)
        filled += _num_bytes(source)
    return shards


def _shard_name(index: int, count: int) -> str:
    return f"{STEM}.safetensors" if count == 1 else f"{STEM}-{index + 1:05d}-of-{count:05d}.safetensors"


def _remove_leftovers(folder: Path) -> None:
    for complete in (f"{STEM}.safetensors", f"{STEM}.safetensors.index.json"):
        if (folder / complete).exists():
            raise ValueError(f"{folder / complete} exists; export into a new directory")
    pattern = re.compile(rf"\.?{re.escape(STEM)}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?(\.tmp)?")
    for file in folder.iterdir():
        if pattern.fullmatch(file.name):
            file.unlink()


def _write_shard(file: Path, shard: Sequence[TensorSource]) -> None:
    # Wider dtypes lie first, so that every tensor is aligned to its item size for readers that map the file.
    # Only the layout is reordered: the sources are still asked in the given order.
    offsets: dict[str, int] = {}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape, dtype, get in sorted(shard, key=lambda source: -source[2].itemsize):
        offsets[name] = position
        end = position + _num_bytes((name, shape, dtype, get))
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with file.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for name, shape, dtype, get in shard:
            tensor = get()
            if (tuple(tensor.shape), tensor.dtype) != (tuple(shape), dtype):
                raise ValueError(
                    f"{file}: tensor {name!r} was announced as {(tuple(shape), dtype)} "
                    f"but came as {(tuple(tensor.shape), tensor.dtype)}"
                )
            if not _is_finite(tensor):
                raise ValueError(f"{file}: tensor {name!r} holds NaN or inf; nothing was exported")
            stream.seek(8 + len(raw) + offsets[name])
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            stream.write(data.numpy().data)
            del tensor, data
        stream.flush()
        os.fsync(stream.fileno())


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    if tensor.dtype.itemsize == 1:  # float8 has no isfinite kernel
        tensor = tensor.float()
    return bool(torch.isfinite(tensor).all())
