"""`metadata.jsonl` files of a folder (Hugging Face imagefolder): which lines describe which picture.

Place in the flow: `folder.py` has all of them read once, which finds every line that is wrong, and asks for the
captions of each picture later. Until then only the place of each line is kept (20 bytes): a million captions as Python
strings would take ten times as much. Refuses to go on if a file was changed in between.
"""

from __future__ import annotations

import posixpath
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from producers.sources.base import NO_CAPTION, captions_of_kinds, encode_uri
from producers.sources.jsonl import parse_line, read_jsonl_at
from producers.sources.paths import Hashes, are_in
from qwenimg_dist.schema import RAW

Captions = tuple[tuple[str, ...], str | None, tuple[str, ...]]
"""(captions, fault, kind of each; no kinds where the source tells none apart)"""

_OPEN_FILES: Final = 8
CAPTION_KEYS: Final = ("text", "caption", "captions")


class Described:
    """Path -> captions, by the place of its lines. Files that come later override; lines of one file add up."""

    def __init__(self, root: Path, files: Sequence[str], keys: Mapping[str, str] | None = None) -> None:
        """`files` are relative to `root`, `/` between parts; `keys` are those of each kind of caption, None takes the
        first of the usual ones. Raises ValueError naming file and line."""
        self._root, self._files, self._keys = root, list(files), keys
        hashes, numbers, offsets = array("q"), array("i"), array("q")
        for number, file in enumerate(self._files):
            for line, offset, entry in read_jsonl_at(root / file):
                hashes.append(hash(_path_of(entry, root / file, line, posixpath.dirname(file))))
                numbers.append(number)
                offsets.append(offset)
        self._hashes = np.array(hashes, dtype=np.int64)
        del hashes
        order = np.argsort(self._hashes, kind="stable")  # lines of one path stay in their order
        self._hashes = self._hashes[order]
        self._numbers = np.frombuffer(numbers, dtype=np.intc)[order] if order.size else np.empty(0, np.intc)
        self._offsets = np.frombuffer(offsets, dtype=np.int64)[order] if order.size else np.empty(0, np.int64)
        # Lines are asked for in the order of paths, mostly their own order: few files are open at a time.
        self._handles: dict[str, BinaryIO] = {}

    def __len__(self) -> int:
        return len(self._hashes)

    def not_in(self, pictures: Hashes) -> Iterator[str]:
        """The paths that the lines name and the (sorted) hashes of pictures lack, each once."""
        if not len(self):
            return
        first = np.concatenate(([True], self._hashes[1:] != self._hashes[:-1]))
        for index in np.flatnonzero(first & ~are_in(self._hashes, pictures)):
            yield self._read(int(index))[0]

    def captions(self, paths: Sequence[str]) -> Iterator[Captions]:
        """What the lines say of each path; no caption where they say nothing."""
        wanted = np.fromiter(map(hash, paths), np.int64, len(paths))
        begins, ends = np.searchsorted(self._hashes, wanted), np.searchsorted(self._hashes, wanted, "right")
        for path, begin, end in zip(paths, begins.tolist(), ends.tolist()):
            yield self._merged(path, begin, end) if end > begin else ((), NO_CAPTION, ())

    def _merged(self, path: str, begin: int, end: int) -> Captions:
        texts: dict[str, str] = {}
        fault: str | None = None
        for index in range(begin, end):
            if self._numbers[index] != self._numbers[end - 1]:
                continue  # a nearer file describes the picture too
            named, given = self._read(index)
            if named != path:
                raise self._changed(index)
            captions, faulty, kinds = captions_of_kinds(given, self._keys or {RAW: RAW})
            for caption, kind in zip(captions, kinds, strict=True):
                texts.setdefault(caption, kind)
            fault = fault or faulty
        return tuple(texts), None if texts else fault, tuple(texts.values()) if self._keys else ()

    def _read(self, index: int) -> tuple[str, dict[str, Any]]:
        """(path, caption or captions as given by key) of a line."""
        file = self._files[int(self._numbers[index])]
        lines = self._open(file)
        lines.seek(int(self._offsets[index]))
        try:
            entry = parse_line(lines.readline()) or {}
            path = _path_of(entry, self._root / file, 0, posixpath.dirname(file))
        except ValueError as error:
            raise self._changed(index) from error
        if self._keys:
            return path, entry
        return path, {RAW: next((entry[key] for key in CAPTION_KEYS if entry.get(key) is not None), None)}

    def _open(self, file: str) -> BinaryIO:
        # No lru_cache around a method: the cycle would keep the arrays of every look that was ever taken.
        if file not in self._handles:
            if len(self._handles) >= _OPEN_FILES:
                self._handles.pop(next(iter(self._handles))).close()
            try:
                self._handles[file] = open(self._root / file, "rb")  # noqa: SIM115 - stays open
            except OSError as error:
                raise ValueError(f"{self._root / file} cannot be read ({error.strerror})") from error
        return self._handles[file]

    def _changed(self, index: int) -> ValueError:
        file = self._root / self._files[int(self._numbers[index])]
        return ValueError(f"{file} was changed while it was read: run the same command again")


def _path_of(entry: dict[str, Any], file: Path, line: int, folder: str) -> str:
    """The picture that a line names, relative to the root; may lead out of it."""
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        raise ValueError(f'{file}, line {line}: has no "file_name"; correct the line')
    try:
        encode_uri(name)  # refuse here what sorting would trip over
    except ValueError as error:
        raise ValueError(f"{file}, line {line}: {error}; correct the line") from error
    return posixpath.normpath(posixpath.join(folder, name))
