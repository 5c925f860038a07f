"""The error that everything about data sets is refused with."""

from __future__ import annotations


class DataError(ValueError):
    """A data set directory is not what it should be; the message names the file and the way out."""


class LockedError(DataError):
    """Another process holds a lock."""
