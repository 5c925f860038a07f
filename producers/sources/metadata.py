"""`metadata.jsonl` files of a folder (Hugging Face imagefolder): which lines describe which picture.

Place in the flow: `folder.py` has all of them read once, which finds every line that is wrong (each becomes a
`bad_row`), and asks for the captions of each picture later. Until then only the place of each line is kept (13 bytes,
more in files of 2 GB and above): a million captions as Python strings would take ten times as much. Refuses to go on
if a file was changed in between.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from producers.sources.bad_rows import bad_row
from producers.sources.base import NO_CAPTION, SourceRow, captions_of_kinds, encode_uri
from producers.sources.jsonl import parse_line, read_jsonl
from producers.sources.paths import Hashes, are_in
from qwenimg_dist.schema import RAW

Captions = tuple[tuple[str, ...], str | None, tuple[str, ...]]
"""(captions, fault, kind of each; no kinds where the source tells none apart)"""

_OPEN_FILES: Final = 8
CAPTION_KEYS: Final = ("text", "caption", "captions")


class Described:
    """Path -> captions, by the place of its lines. Files that come later override; lines of one file add up."""

    def __init__(
        self,
        root: Path,
        files: Sequence[str],
        keys: Mapping[str, str] | None = None,
        *,
        labels: Collection[str] = (),
        growing: bool = False,
    ) -> None:
        """`files` are relative to `root`, `/` between parts; `keys` are those of each kind of caption, None takes the
        first of the usual ones; see `read_jsonl` for `growing`. Raises ValueError naming a file that cannot be read."""
        self._root, self._files, self._keys, self._labels = root, list(files), keys, labels
        hashes, numbers, offsets = array("q"), array(_smallest(len(self._files))), array(self._type_of_offsets())
        self._broken = array("q")
        """File number, line number and offset of each line that describes no picture, one after the other."""
        for number, file in enumerate(self._files):
            for line in read_jsonl(root / file, growing=growing):
                try:
                    hashes.append(hash(_path_of(line.entry, line.broken, posixpath.dirname(file))))
                except ValueError:
                    self._broken.extend((number, line.number, line.offset))
                    continue
                numbers.append(number)
                offsets.append(line.offset)
        self._hashes = np.array(hashes, dtype=np.int64)
        del hashes
        order = np.argsort(self._hashes, kind="stable")  # lines of one path stay in their order
        self._hashes = self._hashes[order]
        self._numbers = np.array(numbers)[order]
        self._offsets = np.array(offsets)[order]
        # Lines are asked for in the order of paths, mostly their own order: few files are open at a time.
        self._handles: dict[str, BinaryIO] = {}

    def __len__(self) -> int:
        return len(self._hashes)

    def _type_of_offsets(self) -> str:
        """Half of the range is left to a file that grows while it is read."""
        sizes = [0]
        for file in self._files:
            with contextlib.suppress(OSError):  # told when it is read
                sizes.append(os.stat(self._root / file).st_size)
        return "I" if max(sizes) < 2**31 else "q"

    @property
    def num_broken(self) -> int:
        """Lines that describe no picture."""
        return len(self._broken) // 3

    def broken(self) -> Iterator[SourceRow]:
        """The rows of these, in order."""
        for at in range(0, len(self._broken), 3):
            number, line, offset = self._broken[at : at + 3]
            file = self._files[number]
            lines = self._open(file)
            lines.seek(offset)
            raw = lines.readline()
            try:
                self._path_at(file, raw)
            except ValueError as error:
                yield bad_row(file, raw, f"{self._root / file}, line {line}: {error}; correct the line")
            else:
                raise self._changed(file)

    def not_in(self, pictures: Hashes) -> Iterator[str]:
        """The paths that the lines name and the (sorted) hashes of pictures lack, each once."""
        if not len(self):
            return
        first = np.concatenate(([True], self._hashes[1:] != self._hashes[:-1]))
        for index in np.flatnonzero(first & ~are_in(self._hashes, pictures)):
            yield self._read(int(index))[0]

    def captions(self, paths: Sequence[str]) -> Iterator[tuple[Captions, Mapping[str, Any]]]:
        """What the lines say of each path, and what they have under the keys in `labels`; no caption where they say
        nothing."""
        wanted = np.fromiter(map(hash, paths), np.int64, len(paths))
        begins, ends = np.searchsorted(self._hashes, wanted), np.searchsorted(self._hashes, wanted, "right")
        for path, begin, end in zip(paths, begins.tolist(), ends.tolist()):
            yield self._merged(path, begin, end) if end > begin else (((), NO_CAPTION, ()), {})

    def _merged(self, path: str, begin: int, end: int) -> tuple[Captions, dict[str, Any]]:
        texts: dict[str, str] = {}
        labels: dict[str, Any] = {}
        fault: str | None = None
        for index in range(begin, end):
            if self._numbers[index] != self._numbers[end - 1]:
                continue  # a nearer file describes the picture too
            named, entry = self._read(index)
            if named != path:
                raise self._changed(self._files[int(self._numbers[index])])
            labels = {key: entry[key] for key in self._labels if entry.get(key) is not None} | labels
            given = entry if self._keys else {RAW: _first_caption(entry)}
            captions, faulty, kinds = captions_of_kinds(given, self._keys or {RAW: RAW})
            for caption, kind in zip(captions, kinds, strict=True):
                texts.setdefault(caption, kind)
            fault = fault or faulty
        return (tuple(texts), None if texts else fault, tuple(texts.values()) if self._keys else ()), labels

    def _read(self, index: int) -> tuple[str, dict[str, Any]]:
        """(path, object) of a line."""
        file = self._files[int(self._numbers[index])]
        lines = self._open(file)
        lines.seek(int(self._offsets[index]))
        try:
            entry, path = self._path_at(file, lines.readline())
        except ValueError as error:
            raise self._changed(file) from error
        return path, entry

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

    def _path_at(self, file: str, raw: bytes) -> tuple[dict[str, Any], str]:
        """A line's object and the picture that it names. Raises ValueError saying what is wrong with it."""
        entry = parse_line(raw) or {}
        return entry, _path_of(entry, None, posixpath.dirname(file))

    def _changed(self, file: str) -> ValueError:
        return ValueError(f"{self._root / file} was changed while it was read: run the same command again")


def _smallest(largest: int) -> str:
    """Type code of the smallest whole numbers that hold `largest`."""
    return next(code for code in "BHI" if largest < 256 ** array(code).itemsize)


def _first_caption(entry: Mapping[str, Any]) -> Any:
    return next((entry[key] for key in CAPTION_KEYS if entry.get(key) is not None), None)


def _path_of(entry: dict[str, Any], broken: str | None, folder: str) -> str:
    """The picture that a line names, relative to the root; may lead out of it. Raises ValueError if it names none."""
    if broken is not None:
        raise ValueError(broken)
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        raise ValueError('has no "file_name"')
    encode_uri(name)  # refuse here what sorting would trip over
    return posixpath.normpath(posixpath.join(folder, name))
