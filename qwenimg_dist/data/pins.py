"""Pins: exactly which parts of which units a run reads, whether a unit is ready, and proof that nothing changed.

Place in the flow: generations pin, `catalog_build.py` compiles what is pinned. A unit's newest `rows` part is written
last and records how many parts of each other facet it goes with (`inputs`), so the number of rows parts is all that a
run must remember. Refuses to guess: a data set made for another model is named as such.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from qwenimg_dist.data.catalog import RunFacets
from qwenimg_dist.data.errors import MENDING
from qwenimg_dist.data.facets import DataError, Dataset, Part
from qwenimg_dist.patience import patiently
from qwenimg_dist.schema import LISTING, ROWS, SCAN

_THREADS: Final = 8
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class Pin:
    """One pinned part; the digest is of its parquet, which in turn names size and sha256 of its tars."""

    part: Part
    sha256: str


@dataclass(frozen=True, kw_only=True)
class UnitPins:
    """What a run reads of one unit."""

    unit: int
    rows_parts: int
    inputs: dict[str, int]
    """Facet -> number of its parts, of the facets that are read."""

    def parts(self) -> list[Part]:
        """All pinned parts, by facet and number."""
        counts = {**self.inputs, ROWS: self.rows_parts}
        return [Part(facet=f, unit=self.unit, part=p) for f in sorted(counts) for p in range(counts[f])]


def run_inputs(facets: RunFacets) -> tuple[str, ...]:
    """Facets that a catalog is compiled from, besides `rows`."""
    return (LISTING, SCAN, *facets.names)


def pin_unit(dataset: Dataset, unit: int, rows_parts: int, facets: RunFacets) -> UnitPins | None:
    """Pins of a unit as its `rows_parts`-th rows part recorded it; None if that state lacks a facet of the run."""
    meta = dataset.meta(Part(facet=ROWS, unit=unit, part=rows_parts - 1))
    recorded: dict[str, int] = meta.get("inputs", {})
    # A record without the listing is that of a repaired unit, which waits for `produce`.
    if any(recorded.get(facet, 0) < 1 for facet in (LISTING, *facets.names)):
        return None
    inputs = {facet: recorded[facet] for facet in run_inputs(facets) if recorded.get(facet, 0) > 0}
    return UnitPins(unit=unit, rows_parts=rows_parts, inputs=inputs)


def ready_units(dataset: Dataset, facets: RunFacets, *, first: int = 0) -> list[UnitPins]:
    """Units `first`, `first` + 1, ... up to the first that is not ready, each pinned at its newest rows part.

    A prefix of units is final (deduplication is settled in source order), so a gap ends the list.
    """
    newest = newest_rows_parts(dataset)
    ready: list[UnitPins] = []
    unit = first
    while unit in newest:
        pins = pin_unit(dataset, unit, newest[unit], facets)
        if pins is None:
            break
        ready.append(pins)
        unit += 1
    return ready


def newest_rows_parts(dataset: Dataset) -> dict[int, int]:
    """Unit -> number of its rows parts."""
    counts: dict[int, int] = {}
    for part in dataset.parts(ROWS):
        counts[part.unit] = max(counts.get(part.unit, 0), part.part + 1)
    return counts


def why_not_ready(dataset: Dataset, facets: RunFacets) -> str:
    """Why unit 0 cannot be trained on, and what to do: for a `DataError`."""
    there = dataset.facets()
    missing = [facet for facet in facets.names if facet not in there]
    kinds = {facet: facet.rpartition("-")[0] for facet in facets.names}
    for facet in missing:
        others = [name for name in there if name.rpartition("-")[0] == kinds[facet]]
        if others:
            return (
                f"{dataset.root} has {', '.join(others)}, this run needs {facet}: the data was made by another encoder "
                "or with other encode settings; run `qwenimg-dist produce` with this model and config (it adds a facet "
                "beside the old one), or set model.path to the model that the data was made with"
            )
    if missing:
        return (
            f"{dataset.root} has no {', '.join(missing)}; it has {', '.join(there) or 'no facets'}: run "
            "`qwenimg-dist produce` with this model and curriculum first"
        )
    if ROWS not in there or not dataset.parts(ROWS):
        return f"{dataset.root} has no finished unit yet: run `qwenimg-dist produce`, or train with follow=true"
    return (
        f"{dataset.root}: unit 0 is not ready for {', '.join(facets.names)}: run `qwenimg-dist produce` again with "
        "this config, it adds what is missing"
    )


def parallel(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """`map` over threads, in order: many small files on network storage are waited for together."""
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(function, items))


def read_part_bytes(dataset: Dataset, part: Part) -> bytes:
    """The part's parquet. Raises `DataError` naming it if it cannot be read."""
    file = dataset.parquet(part)
    try:
        return patiently(file.read_bytes, str(file))
    except OSError as error:
        raise DataError(
            f"{file} cannot be read ({error.strerror}), but this run pinned it: restore the file, or start a new run "
            "directory"
        ) from error


def digest_of(pins: Iterable[Pin], takedown: str = "") -> str:
    """One sha256 over all pinned parts, in order of facet, unit and part, and over what is taken down of them."""
    lines = [f"{pin.part.facet}/{pin.part.stem} {pin.sha256}\n" for pin in sorted(pins, key=lambda pin: pin.part)]
    if takedown:
        lines.append(f"takedown {takedown}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_pins(dataset: Dataset, pins: Sequence[Pin], tars: Sequence[tuple[str, str, int]]) -> None:
    """Raise `DataError` naming the first part or tar that is gone or not what it was when the run pinned it."""

    def check(pin: Pin) -> None:
        if hashlib.sha256(read_part_bytes(dataset, pin.part)).hexdigest() != pin.sha256:
            raise DataError(
                f"{dataset.parquet(pin.part)} is not the file that this run pinned (other content): restore it, or "
                "start a new run directory"
            )

    parallel(check, pins)
    parallel(lambda tar: check_tar(dataset, *tar), tars)


def check_tar(dataset: Dataset, facet: str, name: str, size_bytes: int) -> None:
    """Raise `DataError` if a tar is missing or has another size than was committed."""
    path = dataset.tar(facet, name)
    try:
        size = patiently(lambda: dataset.tar_bytes(facet, name), str(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): {MENDING}") from error
    if size != size_bytes:
        raise DataError(f"{path} has {size} bytes, {size_bytes} were committed: {MENDING}")


def pin_to_json(pin: Pin) -> list[Any]:
    """For the catalog's list of parts."""
    return [pin.part.facet, pin.part.unit, pin.part.part, pin.sha256]


def pin_from_json(entry: list[Any]) -> Pin:
    """Inverse of `pin_to_json`."""
    facet, unit, part, sha256 = entry
    return Pin(part=Part(facet=facet, unit=unit, part=part), sha256=sha256)
