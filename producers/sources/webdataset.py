"""Tars of samples, as img2dataset and WebDataset write them: pictures with `.txt` or `.json` captions beside them.

Members that share their name up to its first dot are a sample, and stand next to each other (that is the format). Each
picture of a sample is a row; rows are in the order of the tars' names, then of their members. Nothing is unpacked, and
only names, sizes and captions are read: no path leads anywhere, links and devices are passed over, nothing is executed.
A tar that breaks off gives its samples before the fault, but for the last one, which may lack a member, and is named in
`Found.problems`; once it is whole, the same command adds the others. Deliberately left out: compressed tars, `pipe:`
and URLs but s3://, pickles, captions over 1 MB.
"""

from __future__ import annotations

import glob
import json
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, BinaryIO, Final

from producers.sources import remote
from producers.sources.base import (
    BAD_CAPTION,
    NO_CAPTION,
    OUTSIDE_ROOT,
    Found,
    SourceRow,
    captions_of_kinds,
    is_young,
    with_labels,
)
from producers.sources.folder import EXTENSIONS
from producers.sources.metadata import Captions
from producers.sources.tars import Member, TornTarError, member_uri, walk
from qwenimg_dist.config import WebdatasetSource
from qwenimg_dist.schema import RAW
from qwenimg_dist.storage import Object, StorageError, check_url, is_remote

_CAPTION_BYTES: Final = 1024**2
_BRACES: Final = re.compile(r"\{(\d+)\.\.(\d+)\}")
_NOT_A_FILE: Final = "links and devices"


@dataclass(frozen=True, kw_only=True)
class _State:
    """A tar as it was found."""

    modified_s: float
    mark: tuple[int | str, ...]
    """Changes when the tar does."""


class Webdataset:
    """`source=webdataset`."""

    def __init__(self, config: WebdatasetSource) -> None:
        patterns = (config.path,) if isinstance(config.path, str) else config.path or ()
        if not patterns or not all(patterns):
            raise ValueError(
                "source.path is not set: add source.path=FOLDER, 'source.path=FOLDER/*.tar' or a list of tars"
            )
        self._patterns = [pattern.removeprefix("file://") for pattern in patterns]
        self._is_remote = is_remote(self._patterns[0])
        for pattern in self._patterns:
            if is_remote(pattern):
                check_url(pattern, "source.path")
            if pattern.startswith("pipe:") or is_remote(pattern) != self._is_remote:
                raise ValueError(
                    f"source.path={pattern}: source=webdataset reads tars on disks, or all of them on s3://"
                )
        self._captions, self._kinds = config.captions, config.caption_columns
        self._labels = config.label_columns
        self._columns = config.caption_columns or {RAW: config.caption_column}
        self._is_usable = False
        """A look has found a caption."""
        self._walked: dict[str, tuple[_State, str | None]] = {}
        """Tars that were walked to their end, and what is wrong with them."""
        self._brought = remote.Brought()
        if self._is_remote:
            self._root = _common_url([_fixed_part(pattern.rstrip("/")) for pattern in self._patterns])
            return
        folders = [_fixed_part(os.path.abspath(os.path.expanduser(pattern))) for pattern in self._patterns]
        self._root = os.path.commonpath(folders)

    @property
    def root(self) -> str:
        return self._root

    def find(self, *, min_age_s: float = 0.0) -> Found:
        """See `Source.find`. Looks for tars, at the first time into them up to the first caption; the rows walk them.
        A further look gives rows only of tars that are new, or other than when an earlier look walked them to the end:
        what was listed stays listed."""
        tars = {tar: one for tar, one in self._there().items() if not is_young(one.modified_s, min_age_s)}
        if not self._is_usable:
            self._check(tars)
            self._is_usable = True
        found = Found(rows=())
        return replace(found, rows=self._rows(tars, found))

    def _check(self, tars: Mapping[str, _State]) -> None:
        """Raises ValueError if there is no picture, or no caption at all."""
        first = Found(rows=())
        last: SourceRow | None = None
        for last in self._walk(tars, first, {}):
            if last.captions:
                break
        if last is None:
            why = first.problems[0] if first.problems else "no member is a picture"
            raise ValueError(f"{self._show()}: no picture in {len(tars)} tars: {why}")
        if not last.captions:
            raise ValueError(
                f"{self._show()}: no picture has a caption. A sample's members share their name up to the first dot "
                f"and stand next to each other: 0001.jpg with 0001.txt, or 0001.json with "
                f"{', '.join(map(repr, self._columns.values()))} "
                "(source.caption_column)"
            )

    def _there(self) -> dict[str, _State]:
        if self._is_remote:
            objects = self._remote_tars().items()
            return {url: _State(modified_s=one.modified_s, mark=(one.size_bytes, one.etag)) for url, one in objects}
        states = {tar: os.stat(tar) for tar in self._tars()}
        return {
            tar: _State(modified_s=one.st_mtime, mark=(one.st_size, one.st_mtime_ns, one.st_ino))
            for tar, one in states.items()
        }

    def _tars(self) -> list[str]:
        """All tars, once each, sorted within a pattern. Raises ValueError for a pattern without any."""
        found: dict[str, None] = {}
        for pattern in self._patterns:
            path = os.path.abspath(os.path.expanduser(pattern))
            here = sorted(glob.glob(f"{glob.escape(path)}/*.tar")) if os.path.isdir(path) else _expand(path)
            if not here:
                raise ValueError(f"source.path={pattern} names no tar; is it right?")
            for tar in here:
                if not os.path.isfile(tar):
                    raise ValueError(f"source.path: {tar} is not a file that can be read")
                if not os.access(tar, os.R_OK):
                    raise ValueError(f"{tar} cannot be read: check its rights")
                found[tar] = None
        return list(found)

    def _remote_tars(self) -> dict[str, Object]:
        """URL -> object of all tars. Raises ValueError for a pattern without any."""
        found: dict[str, Object] = {}
        for pattern in self._patterns:
            for one in _ranges(pattern.rstrip("/")):
                here = remote.matching(one, _fixed_part(one))
                if not here:
                    raise ValueError(f"source.path={one} names no tar; is it right?")
                found |= here
        return found

    def _rows(self, tars: Mapping[str, _State], found: Found) -> Iterator[SourceRow]:
        walked: dict[str, tuple[_State, str | None]] = {}
        yield from self._walk(tars, found, walked)
        # Only now: where the rows break off, nobody knows which of them were taken.
        self._walked = walked

    def _walk(
        self, tars: Mapping[str, _State], found: Found, walked: dict[str, tuple[_State, str | None]]
    ) -> Iterator[SourceRow]:
        for tar, state in tars.items():
            here, problem = tar, None
            before, told = self._walked.get(tar, (None, None))
            if before == state:
                walked[tar] = state, told
                found.problems.extend([told] if told is not None else [])
                continue
            try:
                here = str(self._brought.get(tar, state)) if self._is_remote else tar
                with open(here, "rb") as file:
                    for _, members in groupby(walk(here), key=lambda member: _sample_of(member.name)):
                        yield from self._sample(self._name(tar), file, list(members), found)
            except StorageError:  # no verdict on any tar
                raise
            except TornTarError as error:
                problem = f"{error}: its samples before the fault are used; replace it and run again".replace(here, tar)
                found.problems.append(problem)
            except OSError as error:
                found.problems.append(f"{tar} cannot be read ({error.strerror}): its samples so far are used")
                continue
            self._brought.let_go()
            walked[tar] = state, problem

    def _name(self, tar: str) -> str:
        return tar.removeprefix(f"{self._root}/") if self._is_remote else os.path.relpath(tar, self._root)

    def _sample(self, tar: str, file: BinaryIO, members: list[Member], found: Found) -> Iterator[SourceRow]:
        pictures, texts = [], {}
        for member in members:
            kind = posixpath.splitext(member.name)[1].lower()
            if member.size is None:
                found.ignored[_NOT_A_FILE] += 1
            elif kind in EXTENSIONS:
                pictures.append(member)
            elif kind in (".txt", ".json"):
                texts[kind] = member
            else:
                found.ignored[kind.encode("utf-8", "replace").decode() or "without extension"] += 1
        if not pictures:
            found.ignored.update(list(texts))
            return
        entry = self._read_json(file, texts)
        captions, fault, kinds = self._read_captions(file, texts, entry)
        for member in pictures:
            outside = member.name.startswith("/") or ".." in member.name.split("/")
            row = SourceRow(
                uri=member_uri(tar, member),
                captions=() if outside else captions,
                caption_kinds=kinds if self._kinds and not outside else (),
                fault=OUTSIDE_ROOT if outside else fault,
            )
            yield with_labels(row, entry or {}, self._labels)

    def _read_json(self, file: BinaryIO, texts: dict[str, Member]) -> dict[str, Any] | None:
        """The `.json` member, if it is wanted; None where it is no object."""
        if ".json" not in texts or (self._captions == "txt" and not self._labels):
            return {}
        raw = _read(file, texts[".json"])
        try:
            entry: Any = json.loads(raw) if raw is not None else None
        except (ValueError, RecursionError):
            entry = None
        return entry if isinstance(entry, dict) else None

    def _read_captions(self, file: BinaryIO, texts: dict[str, Member], entry: dict[str, Any] | None) -> Captions:
        """Of `.json` first, which may have several; then of `.txt`."""
        found: Captions = ((), NO_CAPTION, ())
        if self._captions != "txt" and ".json" in texts:
            found = captions_of_kinds(entry, self._columns) if entry is not None else ((), BAD_CAPTION, ())
        if self._captions != "json" and ".txt" in texts and not found[0]:
            found = _text_captions(_read(file, texts[".txt"]))
        return found

    def _show(self) -> str:
        return ", ".join(self._patterns[:3]) + (", ..." if len(self._patterns) > 3 else "")


def _sample_of(name: str) -> str:
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.split(".", 1)[0])


def _read(file: BinaryIO, member: Member) -> bytes | None:
    """None if it is too long for a caption."""
    assert member.size is not None  # links were passed over
    return os.pread(file.fileno(), member.size, member.offset) if member.size <= _CAPTION_BYTES else None


def _text_captions(raw: bytes | None) -> Captions:
    try:
        text = raw.decode("utf-8-sig") if raw is not None else None
    except UnicodeDecodeError:
        text = None
    return captions_of_kinds({RAW: text}, {RAW: RAW}) if text is not None else ((), BAD_CAPTION, ())


def _expand(path: str) -> list[str]:
    """Tars that a path, a glob, or a range such as `{00000..00123}.tar` names; a range must be there wholly."""
    match = _BRACES.search(path)
    if match is None:
        return [path] if os.path.exists(path) else sorted(glob.glob(path))
    return [tar for name in _named(path, match) for tar in (_expand(name) or [name])]


def _named(path: str, match: re.Match[str]) -> list[str]:
    """The paths that the first range of a pattern stands for."""
    width = len(match[1])
    numbers = range(int(match[1]), int(match[2]) + 1)
    return [f"{path[: match.start()]}{number:0{width}d}{path[match.end() :]}" for number in numbers]


def _ranges(path: str) -> list[str]:
    """The pattern without ranges: one for each number."""
    match = _BRACES.search(path)
    return [path] if match is None else [one for name in _named(path, match) for one in _ranges(name)]


def _fixed_part(path: str) -> str:
    """The folder that a pattern starts in: what uris are relative to."""
    if os.path.isdir(path) or (is_remote(path) and not path.endswith(".tar") and not glob.has_magic(path)):
        return path
    folder = posixpath.dirname(path)
    while glob.has_magic(folder) or _BRACES.search(folder):
        folder = posixpath.dirname(folder)
    return folder


def _common_url(folders: list[str]) -> str:
    """Raises ValueError if they have not even a bucket in common."""
    common = os.path.commonpath([folder.removeprefix("s3://") for folder in folders])
    if not common:
        raise ValueError("source.path: tars of different buckets are different sources, each for a data set of its own")
    return f"s3://{common}"
