"""The held-out samples at resolution classes that a run does not train, so that forgetting there is seen.

Place in the flow: generations pin and compile only the classes that the curriculum reads; the rest of what the data
set holds is looked up here for the few held-out rows alone, from the parquets of their units, and laid out as a small
catalog in memory which the stream reads like any other. Rank 0 looks up, the others get what it found: a data set that
is being added to must not look different from rank to rank. Refuses nothing: a row without latents at a class is
left out of it.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qwenimg_dist.data.catalog import Catalog, Ints, LatentsIndex, RunFacets, TarFile
from qwenimg_dist.data.facets import DataError, Dataset
from qwenimg_dist.data.pins import parallel
from qwenimg_dist.schema import Bucket, condition_name

_LATENTS: Final = re.compile(r"latents-(\d+)-(\w+)")
_COLUMNS: Final = ("row", "bucket_height", "bucket_width", "tar", "offset", "dtype", "shape")

OtherClass = dict[str, Any]
"""JSON: facet, dtype, channels, tars [[name, size_bytes]], places [[index of the row, height, width, tar, offset,
conditions [[height, width, offset]]]]."""


def other_facets(dataset: Dataset, facets: RunFacets) -> dict[int, str]:
    """Resolution class -> facet, of the latents beside the run's own that were made in the same way."""
    ours = {found[2] for name in facets.latents.values() if (found := _LATENTS.fullmatch(name))}
    there = [found for name in dataset.facets() if (found := _LATENTS.fullmatch(name)) and found[2] in ours]
    return {int(found[1]): found[0] for found in there if int(found[1]) not in facets.latents}


def find_other_class(
    dataset: Dataset,
    facet: str | None,
    catalog: Catalog,
    rows: Ints,
    *,
    keys: Sequence[str],
    only: Container[str] | None,
) -> OtherClass:
    """Where the latents of these rows of a catalog lie in another facet (None: nowhere), an edit's with its conditions.
    For rank 0: reads the rows' units once.

    With `only`, rows whose key (`keys`, beside `rows`) is not in it are left out.
    """
    numbers, units = catalog.rows[rows], catalog.units[rows]
    if facet is None:
        return {"facet": "", "dtype": "bfloat16", "channels": 16, "tars": [], "places": []}
    wanted = sorted({int(unit) for unit in units})
    columns = _COLUMNS if catalog.row_empty_text is None else (*_COLUMNS, "further")
    read = dict(zip(wanted, parallel(lambda unit: _read(dataset, facet, unit, columns), wanted), strict=True))
    tars: dict[str, int] = {}
    places: list[list[Any]] = []
    kinds: set[tuple[str, int]] = set()
    for index, (number, unit) in enumerate(zip(numbers.tolist(), units.tolist(), strict=True)):
        found = read[unit][0].get(number)
        if found is None or (only is not None and keys[index] not in only):
            continue
        kinds.add((found["dtype"], int(found["shape"][0])))
        if found["tar"] not in tars:
            tars[found["tar"]] = len(tars)
        size = [found["bucket_height"], found["bucket_width"]]
        places.append([index, *size, tars[found["tar"]], int(found["offset"]), _conditions(found)])
    if len(kinds) > 1:
        raise DataError(
            f"{facet} holds latents of several types or channels ({sorted(kinds)}): `data verify` lists all"
        )
    dtype, channels = next(iter(kinds), ("bfloat16", 16))
    sizes_of = {name: size for _, sizes in read.values() for name, size in sizes.items()}
    listed = [[name, sizes_of[name]] for name in tars]
    return {"facet": facet, "dtype": dtype, "channels": channels, "tars": listed, "places": places}


def _conditions(found: Mapping[str, Any]) -> list[list[int]]:
    """[height, width, offset] of each condition of a row."""
    places = {one["name"]: one for one in found.get("further") or ()}
    ours = [places[condition_name(k)] for k in range(len(places)) if condition_name(k) in places]
    return [[int(one["shape"][1]) * 8, int(one["shape"][2]) * 8, int(one["offset"])] for one in ours]


def _read(
    dataset: Dataset, facet: str, unit: int, columns: Sequence[str]
) -> tuple[dict[int, dict[str, Any]], dict[str, int]]:
    """Row number -> its place, and the sizes of the tars, of one unit."""
    table = dataset.read_unit(facet, unit, columns)
    if table is None:
        return {}, {}
    sizes = {tar.name: tar.size_bytes for part in dataset.unit_parts(facet, unit) for tar in dataset.tars(part)}
    return {entry["row"]: entry for entry in table.to_pylist()}, sizes


def catalog_of_held_out(catalog: Catalog, dataset: Dataset, rows: Ints, others: Mapping[int, OtherClass]) -> Catalog:
    """A small catalog of these rows, in their order, with the latents of the other classes and the first captions."""
    tars = [*catalog.tars]
    latents: dict[int, LatentsIndex] = {}
    for resolution, other in others.items():
        latents[resolution] = _index(other, len(rows), first_tar=len(tars))
        tars += [TarFile(path=dataset.tar(other["facet"], name), size_bytes=size) for name, size in other["tars"]]
    return replace(
        catalog,
        keys=catalog.keys[rows],
        rows=catalog.rows[rows],
        units=catalog.units[rows],
        key_hash=catalog.key_hash[rows],
        caption_start=np.arange(len(rows) + 1, dtype=np.int64),
        caption_text=catalog.caption_text[catalog.caption_start[rows]],
        caption_kind=catalog.caption_kind[catalog.caption_start[rows]],
        row_empty_text=None if catalog.row_empty_text is None else catalog.row_empty_text[rows],
        latents=latents,
        tars=tars,
    )


def _index(other: OtherClass, num_rows: int, *, first_tar: int) -> LatentsIndex:
    places: Sequence[Sequence[Any]] = other["places"]
    made = [
        Bucket(height=height, width=width, conditions=tuple((h, w) for h, w, _ in conditions))
        for _, height, width, _, _, conditions in places
    ]
    buckets = sorted(set(made))
    bucket: npt.NDArray[np.int16] = np.full(num_rows, -1, dtype=np.int16)
    tar: npt.NDArray[np.int32] = np.full(num_rows, -1, dtype=np.int32)
    offset = np.full(num_rows, -1, dtype=np.int64)
    most = max((len(one.conditions) for one in buckets), default=0)
    further = {condition_name(index): np.full(num_rows, -1, dtype=np.int64) for index in range(most)}
    for (index, _, _, number, begin, conditions), of_row in zip(places, made, strict=True):
        bucket[index] = buckets.index(of_row)
        tar[index], offset[index] = first_tar + number, begin
        for name, (_, _, place) in zip(further, conditions, strict=False):
            further[name][index] = place
    return LatentsIndex(
        facet=other["facet"],
        dtype=other["dtype"],
        channels=other["channels"],
        buckets=tuple(buckets),
        bucket=bucket,
        tar=tar,
        offset=offset,
        further=further,
    )
