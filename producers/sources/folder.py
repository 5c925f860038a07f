"""A folder of pictures with captions in `metadata.jsonl` (Hugging Face imagefolder) or in same-stem `.txt` files.

Rows are sorted by path. What counts as a picture is decided by extension, or by being named in a `metadata.jsonl`
(which may name files that do not exist: they get a row and the fault `missing_file`). Each folder may have its own
`metadata.jsonl`; the one nearest to a picture wins. A line that names no picture becomes a `bad_row`, after the
pictures. Deliberately left out: `metadata.csv`, labels from folder names.

Memory while it is looked through: the characters of each path and some 40 bytes per picture; captions are read when
their row is asked for.
"""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from producers.sources.bad_rows import look_through
from producers.sources.base import (
    BAD_CAPTION,
    NO_CAPTION,
    OUTSIDE_ROOT,
    Found,
    SourceRow,
    clean_captions,
    encode_uri,
    is_young,
    with_labels,
)
from producers.sources.metadata import Captions, Described
from producers.sources.paths import Paths, are_in
from qwenimg_dist.config import FolderSource
from qwenimg_dist.schema import RAW

EXTENSIONS: Final = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
    | {".pnm", ".tga", ".avif", ".heic", ".heif", ".jp2", ".jxl"}
)
METADATA: Final = "metadata.jsonl"


@dataclass
class _Walk:
    """What one pass over the folder saw; paths are relative to the root, `/` between parts."""

    pictures: Paths = field(default_factory=Paths)
    young: Paths = field(default_factory=Paths)
    """Pictures that may still be written: left for later, also where a `metadata.jsonl` names them."""
    texts: Paths = field(default_factory=Paths)
    """Caption files, without their extension."""
    text_extensions: set[str] = field(default_factory=set)
    """How `.txt` is written."""
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
        self._captions, self._kinds = config.captions, config.caption_columns
        self._labels = config.label_columns

    @property
    def root(self) -> str:
        return str(self._root)

    def find(self, *, min_age_s: float = 0.0) -> Found:
        """See `Source.find`."""
        walk = self._walk(min_age_s)
        if self._captions == "metadata" and not walk.metadata:
            raise ValueError(f"{self._root}: source.captions=metadata, but there is no {METADATA}")
        # Nearer files override.
        files = sorted(walk.metadata, key=lambda path: (path.count("/"), os.fsencode(path)))
        described = Described(
            self._root,
            files if self._captions != "txt" or self._labels else [],
            self._kinds,
            labels=self._labels.values(),
            growing=min_age_s > 0,
        )
        broken = look_through(described.broken())
        if len(described):
            for path in _named_only(described, walk):
                if _is_picture(path) or not is_young(_modified(self._root / path), min_age_s):
                    walk.pictures.append(path)
        stems = walk.pictures.hashes(lambda path: posixpath.splitext(path)[0]) if len(walk.texts) else None
        if stems is not None:
            walk.ignored[".txt"] += int(np.count_nonzero(~are_in(np.unique(walk.texts.hashes()), stems)))
        num_pictures, extensions = len(walk.pictures), sorted(walk.text_extensions, reverse=True)
        if not num_pictures:
            broken.problems()
            raise ValueError(f"{self._root} holds no pictures ({describe(walk.ignored)}); is source.path right?")
        if not any(row.captions for row in self._rows(walk.pictures, described, extensions)):
            if broken.num_bad and not len(described):
                broken.problems()
            raise ValueError(
                f"{self._root}: none of its {num_pictures} pictures has a caption; write {METADATA} with one "
                '{"file_name": ..., "text": ...} per line, or a .txt file beside each picture'
            )
        broken.num_rows += num_pictures
        rows = self._rows(walk.pictures, described, extensions)
        return Found(rows=rows, ignored=walk.ignored, problems=broken.problems())

    def _rows(self, paths: Paths, described: Described, text_extensions: Sequence[str]) -> Iterator[SourceRow]:
        for batch in paths.sorted_batches():
            for path, (captions, given) in zip(batch, described.captions(batch)):
                yield with_labels(self._row(path, captions, text_extensions), given, self._labels)
        yield from described.broken()

    def _row(self, path: str, given: Captions, text_extensions: Sequence[str]) -> SourceRow:
        captions, fault, kinds = given if self._captions != "txt" else ((), NO_CAPTION, ())
        if posixpath.isabs(path) or path.split("/")[0] == "..":
            return SourceRow(uri=encode_uri(path), captions=(), fault=OUTSIDE_ROOT)
        if not captions and self._captions != "metadata":
            for extension in text_extensions:
                text = _read_text(self._root / (posixpath.splitext(path)[0] + extension))
                if text is not None:
                    captions, fault = text
                    kinds = (RAW,) * len(captions) if self._kinds else ()
                    break
        return SourceRow(uri=encode_uri(path), captions=captions, caption_kinds=kinds, fault=fault)

    def _walk(self, min_age_s: float) -> _Walk:
        if not self._root.is_dir():
            raise ValueError(f"source.path={self._root} is not a folder that can be read")
        walk = _Walk()
        seen: set[tuple[int, int]] = set()
        todo = [""]
        while todo:
            folder = todo.pop()
            inside: list[str] = []
            try:
                status = os.stat(self._root / folder)
                if (status.st_dev, status.st_ino) in seen:  # a link that leads back
                    continue
                seen.add((status.st_dev, status.st_ino))
                with os.scandir(self._root / folder) as entries:
                    for entry in entries:
                        path = posixpath.join(folder, entry.name)
                        if _is_folder(entry):
                            inside.append(path)
                        else:
                            _sort_file(walk, entry, path, min_age_s)
            except OSError as error:
                raise ValueError(
                    f"{self._root / folder} cannot be read ({error.strerror}): check its rights"
                ) from error
            todo += sorted(inside, key=os.fsencode)  # always the same one of two links to a folder
        return walk


def _named_only(described: Described, walk: _Walk) -> list[str]:
    """Paths that a `metadata.jsonl` names and the walk did not see."""
    seen = walk.pictures.hashes()
    return list(described.not_in(np.union1d(seen, walk.young.hashes()) if len(walk.young) else seen))


def describe(ignored: Counter[str]) -> str:
    """`3 files that are no pictures: 2 .txt, 1 .zip`."""
    ignored = +ignored
    kinds = ", ".join(f"{count} {kind}" for kind, count in ignored.most_common(6))
    return f"{ignored.total()} files that are no pictures: {kinds}" if ignored else "it is empty"


def _sort_file(walk: _Walk, entry: os.DirEntry[str], path: str, min_age_s: float) -> None:
    stem, extension = posixpath.splitext(path)
    kind = extension.lower()
    if entry.name == METADATA:
        walk.metadata.append(path)
    elif kind in EXTENSIONS:
        (walk.young if min_age_s > 0 and is_young(_modified(entry), min_age_s) else walk.pictures).append(path)
    elif kind == ".txt":
        walk.texts.append(stem)
        walk.text_extensions.add(extension)
    else:
        walk.ignored[os.fsencode(kind).decode("utf-8", "replace") or "without extension"] += 1


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: listed, and later found unreadable
        return False


def _is_picture(path: str) -> bool:
    """By its extension; then the walk has seen it if it is there."""
    return posixpath.splitext(path)[1].lower() in EXTENSIONS


def _modified(entry: os.DirEntry[str] | Path) -> float:
    try:
        return entry.stat().st_mtime
    except (OSError, ValueError):  # a dangling link: listed, and later found missing
        return 0.0


def _read_text(file: Path) -> tuple[tuple[str, ...], str | None] | None:
    """Captions of a text file, None if there is no such file."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        return None
    except OSError:
        return (), NO_CAPTION
    except UnicodeDecodeError:
        return (), BAD_CAPTION
    return clean_captions(text)
