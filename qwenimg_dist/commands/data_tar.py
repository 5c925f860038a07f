"""Checks one committed tar in a single streaming pass: hash, size, members, and the place of every index row.

Part of `data verify`. Memory is that of one sample's headers plus the part's index rows, whatever the tar's size.
Walks the 512-byte blocks itself, since `tarfile` keeps every member it has seen.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from qwenimg_dist.data.facets import Tar

_BLOCK: Final = 512
_CHUNK: Final = 1 << 20
_MAX_HEADER: Final = 1 << 24  # a safetensors header or json member beyond this is damage, not data
_DTYPES: Final = {"BF16": "bfloat16", "F32": "float32", "F16": "float16", "U8": "uint8"}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor is said, or found, to lie."""

    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Member:
    """One file of a tar; `head` holds a json member whole and of a safetensors member the header."""

    name: str
    start: int
    size: int
    head: bytes


class TarDamage(Exception):
    """The tar cannot be walked further."""


def check_tar(file: Path, tar: Tar, index: Mapping[str, Place]) -> list[str]:
    """What is wrong with `file` against its commit record and its index rows (key -> place); empty if sound."""
    if not file.is_file():
        return ["is missing"]
    size = file.stat().st_size
    if size != tar.size_bytes:
        return [f"has {size} bytes, committed were {tar.size_bytes}"]
    wrong: list[str] = []
    digest = hashlib.sha256()
    with open(file, "rb") as source:
        reader = _HashingReader(source, digest)
        try:
            wrong += _check_members(reader, index)
        except TarDamage as error:
            wrong.append(str(error))
        reader.skip_rest()
    if digest.hexdigest() != tar.sha256:
        # Every other finding follows from this one.
        wrong = ["has another sha256 than was committed", *wrong[:1]]
    return wrong


class _HashingReader:
    """Reads forward only, hashing everything it passes."""

    def __init__(self, source: IO[bytes], digest: Any) -> None:
        self._source = source
        self._digest = digest
        self.position = 0

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes. Raises `TarDamage` at the end of the file."""
        data = self._source.read(size)
        self._digest.update(data)
        self.position += len(data)
        if len(data) != size:
            raise TarDamage(f"ends at byte {self.position} in the middle of a member")
        return data

    def skip(self, size: int) -> None:
        while size > 0:
            size -= len(self.read(min(size, _CHUNK)))

    def skip_rest(self) -> None:
        while data := self._source.read(_CHUNK):
            self._digest.update(data)


def _members(reader: _HashingReader) -> Iterator[Member]:
    while True:
        block = reader.read(_BLOCK)
        if not block.strip(b"\0"):
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.TarError, UnicodeError) as error:
            raise TarDamage(f"has a damaged member header at byte {reader.position - _BLOCK} ({error})") from error
        if not info.isreg():
            raise TarDamage(f"holds {info.name!r}, which is not a plain file")
        start = reader.position
        head = _read_head(reader, info)
        reader.skip(-(-info.size // _BLOCK) * _BLOCK - (reader.position - start))
        yield Member(name=info.name, start=start, size=info.size, head=head)


def _read_head(reader: _HashingReader, info: tarfile.TarInfo) -> bytes:
    if not info.name.endswith(".safetensors"):
        if info.size > _MAX_HEADER:
            raise TarDamage(f"has a member {info.name!r} of {info.size} bytes")
        return reader.read(info.size)
    if info.size < 8:
        raise TarDamage(f"has a member {info.name!r} that is too short for safetensors")
    prefix = reader.read(8)
    length = int.from_bytes(prefix, "little")
    if length > min(info.size - 8, _MAX_HEADER):
        raise TarDamage(f"has a member {info.name!r} with a header of {length} bytes")
    return prefix + reader.read(length)


def _check_members(reader: _HashingReader, index: Mapping[str, Place]) -> list[str]:
    """Members come as `<key>.json`, `<key>.safetensors`; each key once, and each where its index row says."""
    found: set[str] = set()
    twice: list[str] = []
    unknown: list[str] = []
    misplaced: list[str] = []
    waiting: str | None = None
    for member in _members(reader):
        key, _, extension = member.name.partition(".")
        if waiting is None:
            if extension != "json":
                raise TarDamage(f"has {member.name!r} where a json member was due")
            _parse_json(member.head, member.name)
            waiting = key
            continue
        if (key, extension) != (waiting, "safetensors"):
            raise TarDamage(f"has {member.name!r} where {waiting}.safetensors was due")
        waiting = None
        if key in found:
            twice.append(key)
        found.add(key)
        if key not in index:
            unknown.append(key)
        elif (place := first_tensor(member)) != index[key]:
            misplaced.append(f"{key} (index: {_say(index[key])}, tar: {_say(place)})")
    if waiting is not None:
        raise TarDamage(f"ends after {waiting}.json, without its tensors")
    absent = sorted(set(index) - found)
    return [
        f"{what}: {_first(keys)}"
        for what, keys in (
            ("holds keys twice", twice),
            ("holds keys that the index does not name", unknown),
            ("lacks keys that the index names", absent),
            ("has samples that lie elsewhere than the index says", misplaced),
        )
        if keys
    ]


def first_tensor(member: Member) -> Place:
    """The first tensor of a safetensors member. Raises `TarDamage` if its header or size is wrong."""
    entries = _parse_json(member.head[8:], member.name)
    data = member.start + len(member.head)
    try:
        tensors = [entry for name, entry in entries.items() if name != "__metadata__"]
        first = min(tensors, key=lambda entry: int(entry["data_offsets"][0]))
        begin, end = (int(value) for value in first["data_offsets"])
        last = max(int(entry["data_offsets"][1]) for entry in tensors)
        place = Place(
            offset=data + begin,
            nbytes=end - begin,
            dtype=_DTYPES.get(first["dtype"], str(first["dtype"])),
            shape=tuple(int(side) for side in first["shape"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TarDamage(f"has a member {member.name!r} with a damaged header ({error!r})") from error
    if len(member.head) + last != member.size:
        raise TarDamage(f"has a member {member.name!r} of {member.size} bytes whose header says otherwise")
    return place


def _parse_json(text: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise TarDamage(f"has a member {name!r} with unreadable JSON ({error})") from error
    if not isinstance(value, dict):
        raise TarDamage(f"has a member {name!r} that is not a JSON object")
    return value


def _say(place: Place) -> str:
    return f"{place.dtype} {list(place.shape)}, {place.nbytes} bytes at {place.offset}"


def _first(keys: list[str], shown: int = 3) -> str:
    more = f" and {len(keys) - shown} more" if len(keys) > shown else ""
    return ", ".join(keys[:shown]) + more
