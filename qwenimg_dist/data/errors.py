"""The error that everything about data sets is refused with."""

from __future__ import annotations

from typing import Final


class DataError(ValueError):
    """A data set directory is not what it should be; the message names the file and the way out."""


class LockedError(DataError):
    """Another process holds a lock."""


MENDING: Final = (
    "restore it from a backup, or have it made anew by `qwenimg-dist data repair` and `produce` (a run that has begun "
    "needs it as it was); `qwenimg-dist data verify` lists all damage"
)
"""What to do about a damaged file of a data set, for messages."""
