"""The bytes that tars take in a mirror at one moment, while others fetch and remove them."""

from __future__ import annotations

import fcntl
from pathlib import Path


def tar_bytes(mirror: Path) -> int:
    """With the lock under which room is made; a tar that is renamed meanwhile counts once."""
    lock = mirror / ".fetch" / "room.lock"
    if not lock.exists():
        return 0
    found: dict[int, int] = {}
    with open(lock) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for file in mirror.rglob("*.tar"):
            try:
                status = file.stat()
            except FileNotFoundError:  # renamed
                continue
            found[status.st_ino] = status.st_size
    return sum(found.values())
