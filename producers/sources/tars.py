"""Pictures inside tars: their uris, walking a tar's headers, and reading one member's bytes.

Place in the flow: `webdataset.py` walks each tar once for the listing; workers read members by the byte range in their
uri, with one pread, and unpack nothing. A uri is `tar:PATH#MEMBER@OFFSET+SIZE`; the range is only a hint: the header
before it is checked, and a member that was moved (the tar written anew) is looked for in the headers. The sample key is
made of PATH#MEMBER alone. Refuses compressed tars, and members that are no regular files.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final
from urllib.parse import quote_from_bytes, unquote_to_bytes

SCHEME: Final = "tar:"

_URI: Final = re.compile(r"tar:([^#@]+)#([^#@]+)@(\d+)\+(\d+)")
_BLOCK: Final = tarfile.BLOCKSIZE
_NAME_BYTES: Final = 100
"""A plain header holds ASCII names of up to this length; others have a header of their own before it."""


class TornTarError(ValueError):
    """A tar that cannot be read to its end. What was given before is sound."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A member of a tar. `size` is None for what is no regular file."""

    name: str
    offset: int
    """Of its first byte."""
    size: int | None


def member_uri(tar: str, member: Member) -> str:
    """Uri of a member; `tar` is relative to the source's root."""
    return f"{_identity(tar, member.name)}@{member.offset}+{member.size}"


def tar_of(uri: str) -> str:
    """Path of the tar of a member's uri, as the operating system gives it."""
    return _parse(uri)[0]


def identity(uri: str) -> str:
    """What the sample key is made of: the uri without the byte range."""
    return uri.rpartition("@")[0] if uri.startswith(SCHEME) else uri


def byte_range(uri: str) -> str:
    """Where in its tar the member lies; empty for what is no member of a tar."""
    return uri.rpartition("@")[2] if uri.startswith(SCHEME) else ""


def walk(path: str) -> Iterator[Member]:
    """Members in their order. Raises `TornTarError` where the tar is damaged, OSError if it cannot be opened."""
    with open(path, "rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        try:
            with tarfile.open(fileobj=file, mode="r:", errorlevel=2) as tar:
                while (entry := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # else they all stay in memory
                    if entry.isdir():
                        continue
                    plain = entry.isreg() and not entry.issparse()
                    if plain and entry.offset_data + entry.size > num_bytes:
                        raise tarfile.ReadError(f"{entry.name} is cut off")
                    yield Member(name=entry.name, offset=entry.offset_data, size=entry.size if plain else None)
                # tarfile takes a damaged header for the end; the end is a block of zeros.
                if os.pread(file.fileno(), _BLOCK, tar.offset) != bytes(_BLOCK):
                    raise tarfile.ReadError(f"no header and no end mark at byte {tar.offset}")
        except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
            raise TornTarError(f"{path} is damaged or no plain tar ({error})") from error


def size_of(uri: str) -> int:
    """Bytes of a member, as its uri tells. Raises FileNotFoundError for what is no such uri."""
    return _parse(uri)[3]


def read_member(path: str, uri: str) -> bytes:
    """Bytes of a member of the tar at `path`. Raises FileNotFoundError if the tar is gone or has no such member."""
    name, offset, size = _parse(uri)[1:]
    with _opened(path) as handle:
        data = os.pread(handle, _BLOCK + size, offset - _BLOCK) if offset >= _BLOCK else b""
        if _is_header_of(data[:_BLOCK], name, size) and len(data) == _BLOCK + size:
            return data[_BLOCK:]
        status = os.fstat(handle)
        found = _ranges(path, status.st_mtime_ns, status.st_size).get(name)
        if found is None:
            raise FileNotFoundError(f"{path} has no member {name!a} now")
        data = os.pread(handle, found[1], found[0])
        if len(data) != found[1]:
            raise OSError(f"{path} is cut off within {name!a}")
        return data


def member_of_range(uri: str, read: Callable[[int, int], bytes], place: str) -> bytes:
    """As `read_member`, where looking for a member that was moved would mean to read the whole tar: `read` gives the
    bytes [start, stop) of it."""
    name, offset, size = _parse(uri)[1:]
    data = read(offset - _BLOCK, offset + size) if offset >= _BLOCK else b""
    if not _is_header_of(data[:_BLOCK], name, size):
        raise FileNotFoundError(f"{place} has {name!a} no longer at byte {offset}: it was written anew")
    if len(data) != _BLOCK + size:
        raise OSError(f"{place} is cut off within {name!a}")
    return data[_BLOCK:]


def has_member(path: str, uri: str) -> bool:
    """Whether `read_member` would find it."""
    try:
        status = os.stat(path)
        return _parse(uri)[1] in _ranges(path, status.st_mtime_ns, status.st_size)
    except OSError:
        return False


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would make it wait
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(f"{path} is not a regular file")
        yield handle
    finally:
        os.close(handle)


@lru_cache(maxsize=2)
def _ranges(path: str, mtime_ns: int, size: int) -> dict[str, tuple[int, int]]:
    """Member -> (offset, size), of a tar in this state; as far as it can be read."""
    found: dict[str, tuple[int, int]] = {}
    with contextlib.suppress(TornTarError):
        for member in walk(path):
            if member.size is not None:
                found.setdefault(member.name, (member.offset, member.size))
    return found


def _is_header_of(block: bytes, name: str, size: int) -> bool:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    named = header.name == name or len(name) > _NAME_BYTES or not name.isascii()
    return named and header.isreg() and header.size == size


def _identity(tar: str, member: str) -> str:
    return SCHEME + "#".join(quote_from_bytes(os.fsencode(part), safe="/ ") for part in (tar, member))


def _parse(uri: str) -> tuple[str, str, int, int]:
    """(tar, member, offset, size). Raises FileNotFoundError for what is no such uri."""
    match = _URI.fullmatch(uri)
    if match is None:
        raise FileNotFoundError(f"{uri!a} does not name a member of a tar")
    tar, member = (os.fsdecode(unquote_to_bytes(part)) for part in match.groups()[:2])
    return tar, member, int(match[3]), int(match[4])
