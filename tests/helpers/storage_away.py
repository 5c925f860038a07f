"""Storage that does not answer for a moment, or for good."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest

from qwenimg_dist import patience


def stale(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, word: str, *, times: int) -> None:
    """The first calls of a function on a path with this word in it raise ESTALE; waiting takes no time."""
    real: Callable[..., Any] = getattr(owner, name)
    left = [times]

    def call(path: Any, *args: Any, **options: Any) -> Any:
        if word in str(path) and left[0] > 0:
            left[0] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(owner, name, call)
    monkeypatch.setattr(patience, "PAUSES_S", (0.0,) * 3)
