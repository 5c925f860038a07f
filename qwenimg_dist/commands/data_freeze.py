"""`data freeze`: one digest over everything committed, to name exactly the data a result came from.

The digest covers `dataset.json` and the sha256 of every part's parquet, in order of name; a parquet records the sha256
of its tars, so tensors are covered as committed. That the tars on disk still are those is what `data verify` checks.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qwenimg_dist.data.facets import DataError, Dataset
from qwenimg_dist.files import write_json
from qwenimg_dist.schema import SCHEMA_VERSION

_DIGITS: Final = 16
_SHOWN: Final = 10


@dataclass(frozen=True, kw_only=True)
class Freeze:
    """What a data set was at one moment."""

    unit_size: int
    parts: dict[str, str]
    """`FACET/unit-NNNNNN.PPP.parquet` -> sha256."""

    @property
    def digest(self) -> str:
        """sha256 over schema version, unit size and all parts, shortened."""
        lines = [f"{SCHEMA_VERSION} {self.unit_size}", *(f"{name} {sha}" for name, sha in sorted(self.parts.items()))]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:_DIGITS]

    def as_dict(self) -> dict[str, Any]:
        """The file's content."""
        return {
            "digest": self.digest,
            "schema_version": SCHEMA_VERSION,
            "unit_size": self.unit_size,
            "parts": dict(sorted(self.parts.items())),
        }


def freeze(dataset: Dataset) -> Freeze:
    """Hash every committed part of a data set."""
    parts: dict[str, str] = {}
    for facet in dataset.facets():
        for part in dataset.parts(facet):
            file = dataset.parquet(part)
            with open(file, "rb") as source:
                parts[f"{facet}/{file.name}"] = hashlib.file_digest(source, "sha256").hexdigest()
    return Freeze(unit_size=dataset.unit_size, parts=parts)


def write_freeze(dataset: Dataset) -> int:
    """Write `freeze-<digest>.json` into the data set and print the digest."""
    frozen = freeze(dataset)
    if not frozen.parts:
        raise DataError(f"{dataset.root} holds no committed part: run `qwenimg-dist produce` first")
    file = dataset.root / f"freeze-{frozen.digest}.json"
    write_json(file, frozen.as_dict())
    print(f"{frozen.digest}  {len(frozen.parts)} parts, written to {file}")
    return 0


def check_freeze(dataset: Dataset, file: Path) -> int:
    """Say how the data set differs from a freeze; 0 if it does not, else 1."""
    then, now = read_freeze(file), freeze(dataset)
    lines = differences(then, now)
    for line in lines:
        print(line)
    if lines:
        print(f"{dataset.root} is {now.digest} now, {file.name} says {then.digest}")
        return 1
    print(f"{now.digest}  as frozen, {len(now.parts)} parts")
    return 0


def differences(then: Freeze, now: Freeze) -> list[str]:
    """One line per part that is missing, changed or new (long lists are cut and counted)."""
    lines: list[str] = []
    if then.unit_size != now.unit_size:
        lines.append(f"unit size: {then.unit_size} then, {now.unit_size} now")
    missing = sorted(set(then.parts) - set(now.parts))
    new = sorted(set(now.parts) - set(then.parts))
    changed = sorted(name for name in set(then.parts) & set(now.parts) if then.parts[name] != now.parts[name])
    for kind, names in (("missing", missing), ("changed", changed), ("new", new)):
        lines += [f"{kind}: {name}" for name in names[:_SHOWN]]
        if len(names) > _SHOWN:
            lines.append(f"{kind}: {len(names) - _SHOWN} more parts")
    return lines


def read_freeze(file: Path) -> Freeze:
    """Read a freeze file. Raises `DataError` if it is none, or was edited."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        frozen = Freeze(
            unit_size=int(content["unit_size"]), parts={str(k): str(v) for k, v in content["parts"].items()}
        )
        digest, version = str(content["digest"]), int(content["schema_version"])
    except FileNotFoundError:
        raise DataError(f"{file} does not exist: `data freeze` prints the name of the file it writes") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} is not a freeze file ({error!r})") from error
    if version != SCHEMA_VERSION:
        raise DataError(f"{file} is of schema version {version}, this program reads {SCHEMA_VERSION}")
    if digest != frozen.digest:
        raise DataError(f"{file} does not match its own digest {digest}: it was edited or cut; restore it")
    return frozen
