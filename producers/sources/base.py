"""What every source gives: rows in a stable order, and the bytes behind a uri.

Place in the flow: `listing.py` commits what `Source.find` returns; workers read bytes with `read_bytes`. A uri is text
that survives parquet: file names that are not valid UTF-8 are written as `bytes:` and percent-encoded bytes. Refuses to
guess: a source that gives nothing usable raises ValueError before anything is written.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import quote_from_bytes, unquote_to_bytes

from producers.sources import parquet_cells, tars
from producers.synthetic_text import recipe
from qwenimg_dist.schema import IMAGE, Kind, row_identity
from qwenimg_dist.storage import StorageError

NO_CAPTION: Final = "no_caption"
BAD_CAPTION: Final = "bad_caption"
OUTSIDE_ROOT: Final = "outside_root"
BAD_ROW: Final = "bad_row"
BAD_LABEL: Final = "bad_label"

LARGEST_BYTES: Final = 2 * 1024**3
"""A larger file is no picture, and would fill the memory of whoever reads it."""

_RAW: Final = "bytes:"
BROKEN_LINE: Final = "line:"
"""Begins the uri of a `bad_row`, which no file has."""
_INSIDE: Final = (BROKEN_LINE, tars.SCHEME, parquet_cells.SCHEME, recipe.SCHEME)
_CLOCKS_APART_S: Final = 60.0
"""A file server's may be ahead by as much; a file with a date further in the future just has a wrong one."""
_SCHEMES: Final = (_RAW, BROKEN_LINE, tars.SCHEME, parquet_cells.SCHEME, recipe.SCHEME)


class SourceGoneError(OSError):
    """The source as a whole cannot be reached (an unmounted disk): no verdict on any of its rows."""


class TooLargeError(OSError):
    """A file of more than `LARGEST_BYTES`, not read."""


class SourceError(ValueError):
    """What a source says against itself: not (any more, or not yet) as it can be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRow:
    """One row as the source names it: a picture, or several that belong together."""

    uri: str
    """The row's own picture: chosen, target; empty for a prompt."""
    captions: tuple[str, ...]
    caption_kinds: tuple[str, ...] = ()
    """Beside `captions`; none: all are `raw`."""
    fault: str | None = None
    """Why the row cannot be used, known before the file is looked at: `no_caption`, `bad_caption`, `outside_root`,
    `bad_row`, `bad_label`."""
    fault_detail: str | None = None
    """Of a `bad_row`: file, line and reason; of a `bad_label`: the column."""
    labels: str | None = None
    """JSON: label -> text or number that the source gives."""
    kind: Kind = IMAGE
    others: tuple[str, ...] = ()
    """Uris of the further pictures: rejected, or the conditions in order."""
    meta: str | None = None
    """JSON that goes with the row, as it is."""

    @property
    def identity(self) -> str:
        """What the sample key is made of."""
        return row_identity(self.kind, [tars.identity(uri) for uri in (self.uri, *self.others)], self.captions)


@dataclass(frozen=True, kw_only=True)
class Found:
    """One look at a source."""

    rows: Iterable[SourceRow]
    """In a stable order, made as they are asked for; to be gone through once. Raises ValueError in the middle only if
    the source was changed after it was looked through."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Files that are no pictures, by extension; they get no row. Complete once the rows were gone through."""
    problems: list[str] = field(default_factory=list)
    """What is wrong with parts of the source, whose other rows are used; complete once the rows were gone through."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows of the source that give no sample, by what they are (`ties`)."""


class Source(Protocol):
    """A source of rows; made from its config section, cheap until `find`."""

    @property
    def root(self) -> str:
        """What relative uris are relative to."""
        ...

    def find(self, *, min_age_s: float = 0.0) -> Found:
        """List everything there is, in a stable order; pictures modified within `min_age_s` are left for later.

        Looks through the source before it returns: raises ValueError if the source cannot be read, holds no picture, no
        row that can be used, or no caption at all. So all of this is found before anything is written. Single rows that
        cannot be used are given as `bad_row`.
        """
        ...


def encode_uri(path: str) -> str:
    """Path as the operating system gives it -> uri. Injective; plain names stay as they are.

    Raises ValueError for text that no file name can be (lone surrogates that stand for no byte).
    """
    try:
        raw = os.fsencode(path)
    except UnicodeEncodeError as error:
        raise ValueError(f"{path!a} cannot be a file name: it holds half a character") from error
    plain = not path.startswith(_SCHEMES) and all(not "\ud800" <= char <= "\udfff" for char in path)
    return path if plain else _RAW + quote_from_bytes(raw, safe="/")


def locate(root: str, uri: str) -> str:
    """A uri's path or URL; of a picture inside a file, the file's. URLs and absolute paths stay as they are."""
    if uri.startswith(tars.SCHEME):
        return os.path.join(root, tars.tar_of(uri))
    if uri.startswith(parquet_cells.SCHEME):
        return locate(root, parquet_cells.file_of(uri))
    if uri.startswith(_RAW):
        uri = os.fsdecode(unquote_to_bytes(uri.removeprefix(_RAW)))
    if "://" in uri or uri.startswith("/"):
        return uri
    return f"{root.rstrip('/')}/{uri}" if "://" in root else os.path.join(root, uri)


def read_bytes(root: str, uri: str) -> bytes:
    """The picture's bytes. Raises FileNotFoundError or another OSError for this one alone, `SourceGoneError` if the
    root itself is gone."""
    if uri.startswith(tars.SCHEME):
        _check_size(tars.size_of(uri), uri)
    if uri.startswith(recipe.SCHEME):
        from producers.synthetic_text.draw import draw_bytes  # only this source pays for it

        try:
            return draw_bytes(uri)
        except ValueError as error:  # of another version of the program
            raise FileNotFoundError(str(error)) from error
    place = locate(root, uri)
    if uri.startswith(parquet_cells.SCHEME):
        with _blaming(root):
            return parquet_cells.read(place, uri)
    if place.startswith("s3://"):
        from producers.sources import remote  # only remote sources pay for it

        try:
            return remote.read_member(place, uri) if uri.startswith(tars.SCHEME) else remote.read(place)
        except StorageError as error:
            raise SourceGoneError(str(error)) from error
        except ValueError as error:
            raise FileNotFoundError(str(error)) from error
    if "://" in place:
        from producers.sources import urls

        return urls.read(place)
    with _blaming(root):
        if uri.startswith(tars.SCHEME):
            return tars.read_member(place, uri)
        status = os.stat(place)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device would never end
            raise OSError(errno.EINVAL, "not a regular file", place)
        _check_size(status.st_size, place)
        with open(place, "rb") as file:
            return file.read()


def _check_size(num_bytes: int, place: str) -> None:
    if num_bytes > LARGEST_BYTES:
        told = f"has {num_bytes / 1024**3:.1f} GiB, over {LARGEST_BYTES / 1024**3:g}: it was not read"
        raise TooLargeError(errno.EFBIG, told, place)


@contextmanager
def _blaming(root: str) -> Iterator[None]:
    """Whether the file is missing, or all of the source."""
    try:
        yield
    except FileNotFoundError:
        if "://" not in root and not Path(root).is_dir():
            raise SourceGoneError(f"{root} is gone: mount it again, then run the same command") from None
        raise
    except ValueError as error:  # a name with a NUL byte, which no file can have
        raise FileNotFoundError(str(error)) from error


def can_be_read(root: str, uri: str) -> bool | None:
    """Whether a local picture is there; None for remote ones, which only reading them can tell of."""
    if uri.startswith(recipe.SCHEME):
        return True  # what it needs is looked for when it is drawn
    place = locate(root, uri)
    if "://" in place:
        return None
    if "\0" in place or not os.path.isfile(place) or not os.access(place, os.R_OK):
        return False
    return not uri.startswith(tars.SCHEME) or tars.has_member(place, uri)


def is_being_written(root: str, uri: str, min_age_s: float) -> bool:
    """Whether a local picture with a file of its own was touched within `min_age_s`; 0 asks nothing."""
    place = locate(root, uri) if min_age_s > 0 and not uri.startswith(_INSIDE) else "://"
    if "://" in place:
        return False
    with suppress(OSError, ValueError):  # not there, or no name that a file can have
        return is_young(os.stat(place).st_mtime, min_age_s)
    return False


def is_young(modified_s: float, min_age_s: float) -> bool:
    """Whether a file with this date may still be written, when files count as written once they were not touched for
    `min_age_s`; 0 asks nothing."""
    return min_age_s > 0 and -_CLOCKS_APART_S < time.time() - modified_s < min_age_s


def clean_captions(value: Any) -> tuple[tuple[str, ...], str | None]:
    """A caption or a list of captions from outside -> (distinct captions in order, fault)."""
    if value is None:
        return (), NO_CAPTION
    items: Iterable[Any] = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str | None) for item in items):
        return (), BAD_CAPTION
    texts = dict.fromkeys(item.strip() for item in items if item is not None and item.strip())
    if not all(_is_unicode(text) for text in texts):
        return (), BAD_CAPTION
    return tuple(texts), None if texts else NO_CAPTION


def captions_of_kinds(
    given: Mapping[str, Any], columns: Mapping[str, str]
) -> tuple[tuple[str, ...], str | None, tuple[str, ...]]:
    """Captions of several columns (kind -> column) -> (distinct captions in order, fault, the kind of each).

    A caption that two kinds share counts for the first; a column that cannot be used spoils only itself.
    """
    kinds: dict[str, str] = {}
    faults = []
    for kind, column in columns.items():
        captions, fault = clean_captions(given.get(column))
        faults.append(fault)
        for caption in captions:
            kinds.setdefault(caption, kind)
    fault = None if kinds else BAD_CAPTION if BAD_CAPTION in faults else NO_CAPTION
    return tuple(kinds), fault, tuple(kinds.values())


def with_labels(row: SourceRow, given: Mapping[str, Any], columns: Mapping[str, str]) -> SourceRow:
    """The row with the labels that `given` has in these columns (label -> column); empty text, null and NaN are none.

    A value that is neither text nor a number spoils the row: `bad_label`.
    """
    labels: dict[str, str | float] = {}
    for name, column in columns.items():
        value = given.get(column)
        if value is None or value == "" or value != value:
            continue
        if isinstance(value, str) and _is_unicode(value):
            labels[name] = value
        elif isinstance(value, int | float) and math.isfinite(value):
            labels[name] = float(value)
        elif row.fault is None:
            detail = f"{column!r} is {str(value)[:60]!a}: a label is text or a finite number"
            row = replace(row, fault=BAD_LABEL, fault_detail=detail)
    return replace(row, labels=json.dumps(labels, sort_keys=True)) if labels else row


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
