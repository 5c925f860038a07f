"""JSON Lines as sources read them: one object per line, errors that name file and line, lines found again by offset."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not blank. Raises ValueError naming file and line.

    Bytes that are not UTF-8 stay as surrogates: in file names they are what the operating system has too.
    """
    for number, _, entry in read_jsonl_at(file):
        yield number, entry


def read_jsonl_at(file: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(line number, byte offset of the line, object) of each line that is not blank. Raises ValueError likewise."""
    try:
        with open(file, "rb") as lines:
            offset = 0
            for number, raw in enumerate(lines, start=1):
                try:
                    entry = parse_line(raw)
                except ValueError as error:
                    raise ValueError(f"{file}, line {number}: {error}; correct the line") from error
                if entry is not None:
                    yield number, offset, entry
                offset += len(raw)
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror})") from error


def parse_line(raw: bytes) -> dict[str, Any] | None:
    """The object of a line, None for a blank line. Raises ValueError saying what it is not."""
    text = raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape").strip()
    if not text:
        return None
    try:
        entry = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from error
    if not isinstance(entry, dict):
        raise ValueError("is not a JSON object")
    return entry
