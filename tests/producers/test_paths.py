"""Paths of a walk: in the order of their bytes, whatever their number and length."""

from __future__ import annotations

import os
from collections.abc import Iterable

import pytest

from producers.sources import paths as paths_module
from producers.sources.paths import Paths

NAMES = ["b/1.jpg", "a/\udcff.png", "ä.jpg", "a.jpg", "a/b.jpg", "図.png", "B.jpg", "a/b.jpg"]


def in_order(names: Iterable[str]) -> list[str]:
    return sorted(names, key=os.fsencode)


def gathered(paths: Paths) -> list[str]:
    return [path for batch in paths.sorted_batches() for path in batch]


@pytest.mark.parametrize("short", [2**31, 20, 1])
def test_paths_come_in_the_order_of_their_bytes_however_many_bytes_they_have(
    short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths_module, "_SHORT", short)
    monkeypatch.setattr(paths_module, "_BATCH", 3)
    paths = Paths()
    for name in NAMES:
        paths.append(name)
    assert len(paths) == len(NAMES)
    assert gathered(paths) == in_order(NAMES)
    assert gathered(paths) == in_order(NAMES)
    assert paths.hashes().tolist() == sorted(map(hash, NAMES))
    assert paths.hashes(str.upper).tolist() == sorted(hash(name.upper()) for name in NAMES)


def test_a_path_that_joins_after_all_were_gone_through_is_in_its_place() -> None:
    paths = Paths()
    for name in NAMES:
        paths.append(name)
    gathered(paths)
    paths.append("a/a.jpg")
    assert gathered(paths) == in_order([*NAMES, "a/a.jpg"])
