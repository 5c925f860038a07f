"""JSON Lines as sources read them: an object per line, each with its place, so that it can be named and found again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A line that is not blank."""

    number: int
    """From 1."""
    offset: int
    """Of its first byte."""
    raw: bytes
    entry: dict[str, Any]
    """Empty where the line is broken."""
    broken: str | None = None
    """Why it is no JSON object."""


def read_jsonl(file: Path, *, growing: bool = False) -> Iterator[Line]:
    """Each line that is not blank, broken ones too. With `growing`, a broken last line without its end is half written,
    and not there yet.

    Bytes that are not UTF-8 stay as surrogates: in file names they are what the operating system has too. Raises
    ValueError naming the file if it cannot be read.
    """
    try:
        with open(file, "rb") as lines:
            offset = 0
            for number, raw in enumerate(lines, start=1):
                entry, broken = _parsed(raw)
                if growing and broken is not None and not raw.endswith(b"\n"):
                    return
                if entry is not None:
                    yield Line(number=number, offset=offset, raw=raw, entry=entry, broken=broken)
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


def _parsed(raw: bytes) -> tuple[dict[str, Any] | None, str | None]:
    try:
        return parse_line(raw), None
    except ValueError as error:
        return {}, str(error)
