"""A folder of pictures with captions in `metadata.jsonl` (Hugging Face imagefolder) or in same-stem `.txt` files.

Rows are sorted by path. What counts as a picture is decided by extension, or by being named in a `metadata.jsonl`
(which may name files that do not exist: they get a row and the fault `missing_file`). Each folder may have its own
`metadata.jsonl`; the one nearest to a picture wins. Deliberately left out: `metadata.csv`, labels from folder names.
"""

from __future__ import annotations

import json
import os
import posixpath
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from producers.sources.base import (
    BAD_CAPTION,
    NO_CAPTION,
    OUTSIDE_ROOT,
    Found,
    SourceRow,
    clean_captions,
    encode_uri,
)
from qwenimg_dist.config import FolderSource

EXTENSIONS: Final = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
    | {".pnm", ".tga", ".avif", ".heic", ".heif", ".jp2", ".jxl"}
)
METADATA: Final = "metadata.jsonl"
_CAPTION_KEYS: Final = ("text", "caption", "captions")

Captions = tuple[tuple[str, ...], str | None]


@dataclass
class _Walk:
    """What one pass over the folder saw; paths are relative to the root, `/` between parts."""

    pictures: list[str] = field(default_factory=list)
    texts: dict[tuple[str, str], str] = field(default_factory=dict)
    """(folder, stem) -> path of its .txt file."""
    metadata: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)


class Folder:
    """`source=folder`."""

    def __init__(self, config: FolderSource) -> None:
        if not config.path:
            raise ValueError("source.path is not set: add source.path=FOLDER to the command")
        if "://" in config.path and not config.path.startswith("file://"):
            raise ValueError(f"source.path={config.path}: source=folder reads local folders; use source=manifest")
        self._root = Path(config.path.removeprefix("file://")).expanduser()
        self._captions = config.captions

    @property
    def root(self) -> str:
        return str(self._root)

    def find(self, *, min_age_s: float = 0.0) -> Found:
        """See `Source.find`."""
        walk = self._walk(time.time() - min_age_s if min_age_s > 0 else None)
        described = self._metadata(walk) if self._captions != "txt" else {}
        if self._captions == "metadata" and not walk.metadata:
            raise ValueError(f"{self._root}: source.captions=metadata, but there is no {METADATA}")
        paths = sorted({*walk.pictures, *described}, key=os.fsencode)
        stems = {(folder, posixpath.splitext(name)[0]) for folder, name in map(posixpath.split, paths)}
        walk.ignored[".txt"] += sum(text not in stems for text in walk.texts)
        if not paths:
            raise ValueError(f"{self._root} holds no pictures ({describe(walk.ignored)}); is source.path right?")
        rows = [self._row(path, described, walk.texts) for path in paths]
        if not any(row.captions for row in rows):
            raise ValueError(
                f"{self._root}: none of its {len(rows)} pictures has a caption; write {METADATA} with one "
                '{"file_name": ..., "text": ...} per line, or a .txt file beside each picture'
            )
        return Found(rows=rows, ignored=walk.ignored)

    def _row(self, path: str, described: dict[str, Captions], texts: dict[tuple[str, str], str]) -> SourceRow:
        captions, fault = described.get(path, ((), NO_CAPTION))
        if posixpath.isabs(path) or path.split("/")[0] == "..":
            return SourceRow(uri=encode_uri(path), captions=(), fault=OUTSIDE_ROOT)
        if not captions and self._captions != "metadata":
            folder, name = posixpath.split(path)
            text = texts.get((folder, posixpath.splitext(name)[0]))
            if text is not None:
                captions, fault = _read_text(self._root / text)
        return SourceRow(uri=encode_uri(path), captions=captions, fault=fault)

    def _walk(self, newest: float | None) -> _Walk:
        if not self._root.is_dir():
            raise ValueError(f"source.path={self._root} is not a folder that can be read")
        walk = _Walk()
        seen: set[tuple[int, int]] = set()
        todo = [""]
        while todo:
            folder = todo.pop()
            try:
                status = os.stat(self._root / folder)
                entries = sorted(os.scandir(self._root / folder), key=lambda entry: os.fsencode(entry.name))
            except OSError as error:
                raise ValueError(
                    f"{self._root / folder} cannot be read ({error.strerror}): check its rights"
                ) from error
            if (status.st_dev, status.st_ino) in seen:  # a link that leads back
                continue
            seen.add((status.st_dev, status.st_ino))
            for entry in entries:
                path = posixpath.join(folder, entry.name)
                if entry.is_dir():
                    todo.append(path)
                else:
                    _sort_file(walk, folder, entry, path, newest)
        return walk

    def _metadata(self, walk: _Walk) -> dict[str, Captions]:
        """Path -> captions, of every `metadata.jsonl`; nearer files override, repeated lines add up."""
        described: dict[str, Captions] = {}
        for file in sorted(walk.metadata, key=lambda path: (path.count("/"), os.fsencode(path))):
            here: dict[str, Captions] = {}
            for number, entry in read_jsonl(self._root / file):
                name = entry.get("file_name")
                if not isinstance(name, str) or not name:
                    raise ValueError(f'{self._root / file}, line {number}: has no "file_name"; correct the line')
                encode_uri(name)  # refuse here what sorting would trip over
                path = posixpath.normpath(posixpath.join(posixpath.dirname(file), name))
                given = next((entry[key] for key in _CAPTION_KEYS if entry.get(key) is not None), None)
                captions, fault = clean_captions(given)
                before, earlier = here.get(path, ((), None))
                merged = tuple(dict.fromkeys((*before, *captions)))
                here[path] = (merged, None if merged else (earlier or fault))
            described.update(here)
        return described


def describe(ignored: Counter[str]) -> str:
    """`3 files that are no pictures: 2 .txt, 1 .zip`."""
    ignored = +ignored
    kinds = ", ".join(f"{count} {kind}" for kind, count in ignored.most_common(6))
    return f"{ignored.total()} files that are no pictures: {kinds}" if ignored else "it is empty"


def read_jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not blank. Raises ValueError naming file and line.

    Bytes that are not UTF-8 stay as surrogates: in file names they are what the operating system has too.
    """
    try:
        with open(file, "rb") as lines:
            for number, raw in enumerate(lines, start=1):
                text = raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape").strip()
                if not text:
                    continue
                try:
                    entry = json.loads(text)
                except (json.JSONDecodeError, RecursionError) as error:
                    raise ValueError(f"{file}, line {number}: is not JSON ({error}); correct the line") from error
                if not isinstance(entry, dict):
                    raise ValueError(f"{file}, line {number}: is not a JSON object; correct the line")
                yield number, entry
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror})") from error


def _sort_file(walk: _Walk, folder: str, entry: os.DirEntry[str], path: str, newest: float | None) -> None:
    stem, extension = posixpath.splitext(entry.name)
    kind = extension.lower()
    if entry.name == METADATA:
        walk.metadata.append(path)
    elif kind in EXTENSIONS:
        if newest is None or _modified(entry) <= newest:
            walk.pictures.append(path)
    elif kind == ".txt":
        walk.texts[folder, stem] = path
    else:
        walk.ignored[os.fsencode(kind).decode("utf-8", "replace") or "without extension"] += 1


def _modified(entry: os.DirEntry[str]) -> float:
    try:
        return entry.stat().st_mtime
    except OSError:  # a dangling link: listed, and later found missing
        return 0.0


def _read_text(file: Path) -> Captions:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError:
        return (), NO_CAPTION
    except UnicodeDecodeError:
        return (), BAD_CAPTION
    return clean_captions(text)
