"""Samples <-> tar members: a plain WebDataset tar of `<key>.json` + `<key>.safetensors`, written once, in order.

`ShardWriter` gives the place of each tensor's raw bytes, so that a consumer preads just these. Members have fixed
owner, mode and time, so a tar depends on its samples alone. Refuses keys that stock `webdataset` would split, and
never writes a pickle.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qwenimg_dist.data.facets import Dataset, Part, Tar
from qwenimg_dist.debug import fault_point
from qwenimg_dist.files import fsync_dir, temporary_name
from qwenimg_dist.schema import KEY_PATTERN

_BLOCK: Final = 512
# numpy has no bf16: such tensors travel as uint16 with their name beside them.
_SAFETENSORS: Final = {"bfloat16": "BF16", "float32": "F32", "float16": "F16", "uint8": "U8"}
_NUMPY: Final = {"bfloat16": np.uint16, "float32": np.float32, "float16": np.float16, "uint8": np.uint8}


@dataclass(frozen=True, kw_only=True)
class RawTensor:
    """A C-contiguous array and the name of its torch dtype (`bfloat16` is carried as uint16)."""

    data: npt.NDArray[Any]
    dtype: str

    def __post_init__(self) -> None:
        if self.data.dtype != _NUMPY[self.dtype]:
            raise ValueError(f"{self.dtype} is carried as {_NUMPY[self.dtype]}, not {self.data.dtype}")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the first tensor of a sample lies: byte offset and length in the tar, dtype, shape."""

    tar: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    further: tuple[tuple[str, Place], ...] = ()
    """Name and place of the sample's other tensors."""

    def columns(self) -> dict[str, Any]:
        """The place columns of an index row."""
        return {
            "tar": self.tar,
            "offset": self.offset,
            "nbytes": self.nbytes,
            "dtype": self.dtype,
            "shape": list(self.shape),
        }

    def further_columns(self) -> dict[str, Any]:
        """The `further` column, for indices that have one."""
        return {"further": [{"name": name, **place.columns()} for name, place in self.further] or None}


class _HashingFile(io.RawIOBase):
    """Counts and hashes what is written, so that a tar is not read again for its sha256."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 (closed in close)
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> int:
        self._file.write(data)
        self.sha256.update(data)
        self.size += len(data)
        return len(data)

    def tell(self) -> int:
        return self.size

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        if not self._file.closed:
            try:
                self._file.flush()
                os.fsync(self._file.fileno())
            finally:
                self._file.close()
        super().close()


class ShardWriter:
    """Writes the tars of one part. Tars become visible in `close`; the part exists only after `Dataset.commit`."""

    def __init__(self, dataset: Dataset, part: Part, *, max_shard_bytes: int) -> None:
        self._dataset = dataset
        self._part = part
        self._max_bytes = max_shard_bytes
        self._folder = dataset.root / part.facet
        self._folder.mkdir(parents=True, exist_ok=True)
        self._pending: list[tuple[Path, Tar]] = []
        self._file: _HashingFile | None = None
        self._tar: tarfile.TarFile | None = None
        self._temporary: Path | None = None
        self._keys: set[str] = set()
        # A second try of a killed unit must not meet the tar names of the first: the name is bound by the parquet.
        self._attempt = os.urandom(4).hex()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def write(self, key: str, meta: Mapping[str, Any], tensors: Mapping[str, RawTensor]) -> Place:
        """Append one sample; `meta` becomes the json member. Returns the place of the first tensor.

        Raises ValueError for a key that is unusable or was written before in this part.
        """
        if not KEY_PATTERN.fullmatch(key):
            raise ValueError(f"key {key!r} must match {KEY_PATTERN.pattern}")
        if key in self._keys:
            raise ValueError(f"key {key!r} was already written to {self._part.stem} of {self._part.facet}")
        self._keys.add(key)
        text = json.dumps(dict(meta), sort_keys=True, ensure_ascii=True).encode()
        header, body = encode_safetensors(tensors)
        if self._file is not None and self._file.size + len(text) + len(header) + len(body) > self._max_bytes:
            self._finish_tar()
        if self._tar is None:
            self._begin_tar()
        self._add(f"{key}.json", text)
        start = self._add(f"{key}.safetensors", header + body)
        return _places(self._name(len(self._pending)), start + len(header), tensors)

    def close(self) -> list[Tar]:
        """Fsync and rename the tars into place; returns them for `Dataset.commit`."""
        self._finish_tar()
        for temporary, tar in self._pending:
            os.replace(temporary, self._folder / tar.name)
        fsync_dir(self._folder)
        tars = [tar for _, tar in self._pending]
        self._pending = []
        return tars

    def abort(self) -> None:
        """Remove what was not closed. Harmless after `close`."""
        if self._tar is not None and self._file is not None and self._temporary is not None:
            # On a full disk closing fails too; what counts is the first error, and that the temporary goes.
            with contextlib.suppress(OSError):
                self._file.close()
            self._temporary.unlink(missing_ok=True)
            self._tar = self._file = self._temporary = None
        for temporary, _ in self._pending:
            temporary.unlink(missing_ok=True)
        self._pending = []

    def _name(self, index: int) -> str:
        return f"{self._part.stem}-{self._attempt}-{index:03d}.tar"

    def _begin_tar(self) -> None:
        self._temporary = temporary_name(self._folder / self._name(len(self._pending)))
        self._file = _HashingFile(self._temporary)
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)

    def _finish_tar(self) -> None:
        if self._tar is None or self._file is None or self._temporary is None:
            return
        self._tar.close()
        self._file.close()
        tar = Tar(
            name=self._name(len(self._pending)),
            sha256=self._file.sha256.hexdigest(),
            size_bytes=self._file.size,
        )
        self._pending.append((self._temporary, tar))
        self._tar = self._file = self._temporary = None

    def _add(self, name: str, data: bytes) -> int:
        """Append a member; returns the offset of its first data byte."""
        assert self._tar is not None
        member = tarfile.TarInfo(name)
        member.size = len(data)
        member.mode = 0o644
        start = self._tar.offset + _BLOCK
        fault_point("tar_write")
        self._tar.addfile(member, io.BytesIO(data))
        return start


def _places(tar: str, offset: int, tensors: Mapping[str, RawTensor]) -> Place:
    """Place of the first tensor, with those of the others behind it."""
    places = []
    for name, tensor in tensors.items():
        nbytes, shape = tensor.data.nbytes, tuple(tensor.data.shape)
        places.append((name, Place(tar=tar, offset=offset, nbytes=nbytes, dtype=tensor.dtype, shape=shape)))
        offset += nbytes
    return replace(places[0][1], further=tuple(places[1:]))


def encode_safetensors(tensors: Mapping[str, RawTensor]) -> tuple[bytes, bytes]:
    """(length prefix and header, data) of a safetensors file; tensors in the given order.

    The header is padded so that the data starts 8-byte aligned. Format: https://huggingface.co/docs/safetensors.
    """
    entries: dict[str, Any] = {}
    chunks: list[bytes] = []
    offset = 0
    for name, tensor in tensors.items():
        raw = np.ascontiguousarray(tensor.data).tobytes()
        entries[name] = {
            "dtype": _SAFETENSORS[tensor.dtype],
            "shape": list(tensor.data.shape),
            "data_offsets": [offset, offset + len(raw)],
        }
        chunks.append(raw)
        offset += len(raw)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, b"".join(chunks)
