"""Many cases of one kind, of which `make test` runs some and `make test-all` all."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def rest_slow(values: Iterable[Any], quick: Container[Any]) -> list[Any]:
    """For `parametrize`: all values, those that are not in `quick` with the marker `slow`."""
    return [pytest.param(value, marks=() if value in quick else pytest.mark.slow) for value in values]
