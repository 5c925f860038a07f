"""The scan: cheap facts of every listed file, from one read: bytes, sha256, header, perceptual hash. Runs ahead.

Place in the flow: listing -> **scan** -> dedup -> filters. A file that cannot be used still gets its row, with a fault
code. Refuses to blame files for a source that is gone as a whole (`SourceGoneError` passes through).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Final

import pyarrow as pa

from producers.commit import commit_part
from producers.load import ImageFault, open_file
from producers.perceptual_hash import hash_file
from producers.poison import POISON, Watch
from producers.sources.base import (
    BAD_ROW,
    OUTSIDE_ROOT,
    SourceGoneError,
    TooLargeError,
    is_being_written,
    locate,
    read_bytes,
)
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.debug import picture_point
from qwenimg_dist.in_turn import in_turn
from qwenimg_dist.schema import IMAGE, LISTING, PROMPT, SCAN, SCAN_COLUMNS, role_of

MISSING_FILE = "missing_file"
UNREADABLE = "unreadable"
PASSING = frozenset({MISSING_FILE, UNREADABLE})
"""Faults of the moment: the file may be there the next time, so a later `produce` looks again. Of remote ones that is
UNREADABLE alone (`Driver._may_be_read`)."""
_REMOTE_THREADS: Final = 16
"""A picture's way takes tens of milliseconds, whatever the CPUs; as many pictures are held in memory."""
_NOTHING: Final[Mapping[str, Any]] = {"bytes": 0, "width": 0, "height": 0, "orientation": 1}


def read_or_fault(root: str, uri: str) -> bytes:
    """The file's bytes. Raises `ImageFault`, with a passing reason but for files too large to be read, or
    `SourceGoneError`."""
    try:
        return read_bytes(root, uri)
    except SourceGoneError:
        raise
    except FileNotFoundError as error:
        asked_again = "; source.retry_missing=true asks again" if "://" in locate(root, uri) else ""
        raise ImageFault(MISSING_FILE, f"the source names it, but it is not there{asked_again}") from error
    except TooLargeError as error:
        raise ImageFault("file_too_large", str(error.strerror)) from error
    except OSError as error:
        raise ImageFault(UNREADABLE, error.strerror or type(error).__name__) from error


@contextmanager
def naming(row: int, uri: str) -> Iterator[None]:
    """What nobody foresaw ends `produce`, at the same row every time: its message must say at which."""
    try:
        yield
    except Exception as error:
        error.add_note(f"at row {row} ({uri})")
        raise


def scan_row(root: str, listed: Mapping[str, Any], *, min_age_s: float = 0.0) -> dict[str, Any]:
    """One row of `SCAN_COLUMNS`, of a row of the listing. The first fault among its pictures is the row's; its detail
    names the picture."""
    row, kind, others = listed["row"], listed.get("kind") or IMAGE, listed.get("others") or ()
    if listed["caption_fault"] == OUTSIDE_ROOT:
        return {"row": row, **_NOTHING, "fault": OUTSIDE_ROOT, "detail": "the path leads out of source.path"}
    if listed["caption_fault"] == BAD_ROW:
        return {"row": row, **_NOTHING, "fault": BAD_ROW, "detail": listed["fault_detail"]}
    if kind == PROMPT:
        return {"row": row, **_NOTHING}
    scanned = [_scan_file(root, one, hashed=kind == IMAGE, min_age_s=min_age_s) for one in (listed["uri"], *others)]
    entry = {"row": row, **scanned[0][0], "others": [facts for facts, _ in scanned[1:]]}
    faulty = [(index, fault) for index, (_, fault) in enumerate(scanned) if fault is not None]
    if not faulty:
        return entry
    index, fault = faulty[0]
    detail = fault.detail if not others else f"{role_of(kind, index)}: {fault.detail}"
    return {**entry, "fault": fault.reason, "detail": detail}


def _scan_file(root: str, uri: str, *, hashed: bool, min_age_s: float) -> tuple[dict[str, Any], ImageFault | None]:
    """Facts of one file, and why it cannot be used. `hashed`: with what near duplicates are told by."""
    facts = dict(_NOTHING)
    try:
        data = read_or_fault(root, uri)
        if is_being_written(root, uri, min_age_s):  # asked after it was read: what came since is not in the bytes
            raise ImageFault(UNREADABLE, "it was touched a moment ago, and may still be written")
        facts |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        picture_point("scan", facts["sha256"])
        file = open_file(data)
    except ImageFault as fault:
        return facts, fault
    header = file.header
    facts |= {
        "format": header.format,
        "mode": header.mode,
        "width": header.width,
        "height": header.height,
        "orientation": header.orientation,
    }
    if hashed:
        facts["phash"] = hash_file(file)
    return facts, None


def scan_unit(
    dataset: Dataset,
    unit: int,
    *,
    root: str,
    again: Sequence[int] = (),
    config_hash: str,
    watch: Watch | None = None,
    num_threads: int = 1,
    min_age_s: float = 0.0,
) -> int:
    """Scan what is listed and not yet scanned, and the rows in `again`; commit one part. Returns the rows scanned.

    Remote files are waited for together, whatever `num_threads`. Local ones touched within `min_age_s` may still be
    written, and get a fault that passes: half a file would be a lasting one. With `watch`, one row is open at a time,
    and rows that killed earlier tries get the fault `poison` unopened.
    """
    listing = dataset.read_unit(LISTING, unit, ["row", "uri", "caption_fault", "kind", "others", "fault_detail"])
    assert listing is not None  # units come from the listing
    scanned = dataset.read_unit(SCAN, unit, ["row"])
    known = set(scanned["row"].to_pylist()) - set(again) if scanned is not None else set()
    todo = [entry for entry in listing.to_pylist() if entry["row"] not in known]
    if watch is not None:
        num_threads = 1
    elif any("://" in locate(root, entry["uri"]) for entry in todo):
        num_threads = max(num_threads, _REMOTE_THREADS)
    with watch or nullcontext():
        rows = list(in_turn(partial(_scan_watched, root, watch, min_age_s), todo, threads=num_threads))
    if rows:
        table = pa.Table.from_pylist(rows, schema=SCAN_COLUMNS)
        commit_part(dataset, dataset.next_part(SCAN, unit), table, config_hash=config_hash)
    if watch is not None:
        watch.forget()
    return len(rows)


def _scan_watched(root: str, watch: Watch | None, min_age_s: float, listed: Mapping[str, Any]) -> dict[str, Any]:
    row = listed["row"]
    if watch is not None and row in watch.poison:
        facts = {"row": row, "bytes": 0, "width": 0, "height": 0, "orientation": 1}
        return {**facts, "fault": POISON, "detail": watch.poison[row]}
    if watch is not None:
        watch.opening(row)
    with naming(row, listed["uri"]):
        return scan_row(root, listed, min_age_s=min_age_s)
