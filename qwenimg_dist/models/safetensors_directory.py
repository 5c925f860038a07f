"""Reads weights from raw safetensors files: tensor by tensor, or just a byte range of one.

Place in the flow: every weight that enters (hub or local pipeline directory) is read through
`SafetensorsDirectory`, so that a ZeRO-3 rank fills its partition from a few ranges and never holds a whole
model.

The format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON header
`{name: {dtype, shape, data_offsets}}`, then the data without gaps.

Refuses: pickles of any kind, headers whose tensors overlap or leave gaps, and files shorter or longer than
their header says.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own limit


class WeightsError(ValueError):
    """Weights on disk are missing, torn or not what they claim; the message names file and tensor."""


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Where one tensor lies: `start` and `stop` are absolute byte offsets in `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, after checking that they tile the file exactly.

    Raises WeightsError when the file is missing, torn, too long or its header contradicts itself.
    """
    if not file.is_file():
        raise WeightsError(f"{file}: no such weights file")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise WeightsError(f"{file}: torn or no safetensors file ({size} bytes, header of {length} bytes)")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WeightsError(f"{file}: the header is not JSON ({error}); download or export it again") from error
    if not isinstance(header, dict):
        raise WeightsError(f"{file}: the header is not a JSON object")
    header.pop("__metadata__", None)
    data_start = 8 + length
    entries = {name: _entry(file, name, item, data_start) for name, item in header.items()}
    _check_tiling(file, entries, data_start, size)
    return entries


def _entry(file: Path, name: str, item: object, data_start: int) -> TensorEntry:
    try:
        dtype_name, shape = item["dtype"], tuple(item["shape"])  # type: ignore[index]
        begin, end = item["data_offsets"]  # type: ignore[index]
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{file}: tensor {name!r} has a malformed header entry {item!r}") from error
    if dtype_name not in DTYPES:
        raise WeightsError(f"{file}: tensor {name!r} has dtype {dtype_name!r}; known are {', '.join(DTYPES)}")
    if any(type(n) is not int or n < 0 for n in (*shape, begin, end)):
        raise WeightsError(f"{file}: tensor {name!r} has a malformed header entry {item!r}")
    dtype = DTYPES[dtype_name]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise WeightsError(
            f"{file}: tensor {name!r} of shape {shape} and dtype {dtype_name} cannot lie in {end - begin} bytes"
        )
    return TensorEntry(file=file, dtype=dtype, shape=shape, start=data_start + begin, stop=data_start + end)


def _check_tiling(file: Path, entries: Mapping[str, TensorEntry], data_start: int, size: int) -> None:
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda pair: (pair[1].start, pair[1].stop)):
        if entry.start != position:
            problem = "overlaps its predecessor" if entry.start < position else "leaves a gap before it"
            raise WeightsError(f"{file}: tensor {name!r} {problem} (byte {entry.start}, expected {position})")
        position = entry.stop
    if position > size:
        torn = min((e for e in entries.items() if e[1].stop > size), key=lambda pair: pair[1].start)[0]
        raise WeightsError(f"{file}: truncated: {size} bytes, the header needs {position}; first torn tensor {torn!r}")
    if position < size:
        raise WeightsError(f"{file}: {size - position} bytes after the last tensor; not a clean safetensors file")


def _pread_into(file: Path, name: str, buffer: torch.Tensor, offset: int) -> None:
    view = memoryview(buffer.numpy().data)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        done = 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if count == 0:
                raise WeightsError(f"{file}: ended while reading tensor {name!r} (was it replaced meanwhile?)")
            done += count
    finally:
        os.close(descriptor)


class SafetensorsDirectory:
    """The tensors of one pipeline component (such as PIPELINE/transformer), in one file or many.

    Only headers are read on opening. Reads open the file each time, so that an instance may be shared by
    forked or threaded readers. Raises WeightsError on anything missing or torn.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise WeightsError(f"{self.path}: no such component directory")
        indexes = sorted(self.path.glob("*.safetensors.index.json"))
        files = sorted(self.path.glob("*.safetensors"))
        if len(indexes) > 1 or (not indexes and len(files) != 1):
            found = ", ".join(f.name for f in (*indexes, *files)) or "nothing"
            raise WeightsError(
                f"{self.path}: expected one *.safetensors file or one *.safetensors.index.json, found {found}"
            )
        self.entries = _read_indexed(indexes[0]) if indexes else read_header(files[0])

    @property
    def names(self) -> list[str]:
        """Tensor names, sorted."""
        return sorted(self.entries)

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.entries:
            raise WeightsError(f"{self.path}: has no tensor {name!r} (it has {len(self.entries)} others)")
        return self.entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, on the CPU, in its stored dtype."""
        entry = self._entry(name)
        return self.read_flat_range(name, 0, entry.numel).view(entry.shape)

    def load_into(self, model: torch.nn.Module, prefix: str, *, dtype: torch.dtype, device: torch.device) -> None:
        """Give every parameter (of a model on meta, say) the tensor `prefix` + its name; one tensor is read at a time.

        Raises WeightsError if a tensor is missing or has another shape.
        """
        state = {}
        for name, parameter in model.named_parameters():
            stored = self.read(prefix + name)
            if stored.shape != parameter.shape:
                raise WeightsError(
                    f"{self.path}: tensor {prefix + name!r} has shape {tuple(stored.shape)}, the config makes it "
                    f"{tuple(parameter.shape)}"
                )
            state[name] = stored.to(device=device, dtype=dtype)
        model.load_state_dict(state, strict=True, assign=True)

    def read_flat_range(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the row-major flattened tensor, (stop - start,), by reading just their
        bytes.
        """
        entry = self._entry(name)
        if not 0 <= start <= stop <= entry.numel:
            raise ValueError(f"{entry.file}: range [{start}, {stop}) outside tensor {name!r} of {entry.numel} elements")
        buffer = torch.empty((stop - start) * entry.dtype.itemsize, dtype=torch.uint8)
        if buffer.numel():
            _pread_into(entry.file, name, buffer, entry.start + start * entry.dtype.itemsize)
        return buffer.view(entry.dtype)


def _read_indexed(index: Path) -> dict[str, TensorEntry]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise WeightsError(f"{index}: not a safetensors index ({error!r})") from error
    shards: dict[str, dict[str, TensorEntry]] = {}
    for file_name in sorted(set(weight_map.values())):
        if Path(file_name).name != file_name:
            raise WeightsError(f"{index}: shard name {file_name!r} points outside the directory")
        shards[file_name] = read_header(index.parent / file_name)
    entries = {}
    for name, file_name in weight_map.items():
        if name not in shards[file_name]:
            raise WeightsError(f"{index.parent / file_name}: lacks tensor {name!r}, which {index.name} puts there")
        entries[name] = shards[file_name][name]
    return entries
