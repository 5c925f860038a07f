"""Where a data set's pictures came from: remembered by `produce`, so that `data inspect` finds them by itself, and that
the next `produce` can tell another source from one that moved.

`source.json` holds the kind of the source and the root that uris are relative to. It belongs to no identity, digest or
freeze: a source that moved changes nothing of the data, and the file may be edited or removed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Final

from qwenimg_dist.data.facets import DataError, Dataset

FILE: Final = "source.json"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The source of the last `produce`."""

    kind: str
    root: str
    """Absolute path or URL."""


def remember_origin(dataset: Dataset, origin: Origin) -> None:
    """Write it down, if it is not what is written there already."""
    if known_origin(dataset) != origin:
        dataset.put_json(FILE, asdict(origin))


def known_origin(dataset: Dataset) -> Origin | None:
    """What is remembered; None also for a damaged file."""
    try:
        return read_origin(dataset)
    except DataError:
        return None


def read_origin(dataset: Dataset) -> Origin | None:
    """What the last `produce` remembered; None for a data set of before. Raises `DataError` for a damaged file."""
    file = dataset.root / FILE
    if dataset.mirror is not None:
        dataset.mirror.pull_file(FILE)
    try:
        entry = json.loads(file.read_text(encoding="utf-8"))
        return Origin(kind=str(entry["kind"]), root=str(entry["root"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} cannot be read ({error}): remove it, `produce` writes it anew") from error
