"""Tars of samples, as img2dataset writes them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

Members = list[tuple[str, bytes]]


def write_tar(file: Path, members: Members, *, form: int = tarfile.PAX_FORMAT) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=form) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file


def samples(start: int, stop: int) -> Members:
    """As img2dataset writes them."""
    return [
        (f"{number:09d}.{kind}", data)
        for number in range(start, stop)
        for kind, data in (
            ("jpg", b"picture %d" % number * 40),
            ("json", json.dumps({"caption": f"words {number}", "status": "success"}).encode()),
            ("txt", f"words {number}".encode()),
        )
    ]
