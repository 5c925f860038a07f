"""A run's recorded generations against what lies there: files, digests, names of data sets and facets.

Place in the flow: `generations.py` asks here at the start of a run and for every line it reads. Refused, with the name
of the file: pinned files that are gone or have other content, lines of another config, a takedown list that was
forgotten. Catalogs that are gone are compiled again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from qwenimg_dist.data.catalog import Catalog, RunFacets
from qwenimg_dist.data.catalog_build import build_catalog
from qwenimg_dist.data.catalog_output import PARTS
from qwenimg_dist.data.catalogs import CatalogFolder
from qwenimg_dist.data.facets import DataError, Dataset
from qwenimg_dist.data.generation_log import FILE, Generation, read_lines
from qwenimg_dist.data.pins import UnitPins, check_pins, pin_from_json, pin_unit
from qwenimg_dist.data.takedown import FOLDER as TAKEDOWN
from qwenimg_dist.data.takedown import recorded

INDEX: Final = "index"
"""Folder of a run's catalogs."""


def verify_lines(
    run: Path, datasets: Mapping[str, Dataset], facets: RunFacets, *, takedown: str | None, tars: bool
) -> None:
    """Every pinned file is as it was; catalogs that are gone are compiled again. Without `tars`, shards are left to the
    reader, which tells what it cannot read. `takedown` is the list that the config names.

    Raises `DataError` naming the file, or if the run had a takedown list that the config no longer gives.
    """
    for leftover in (run / INDEX).glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    seen = set()
    for line in read_lines(run / FILE)[0]:
        check_line(run, datasets, facets, line)
        if line.takedown and takedown is None:
            raise DataError(
                f"{run / FILE}: generation {line.generation} left rows out by a takedown list, the config "
                f"names none: set data.takedown again (then it was {run / TAKEDOWN}/{line.takedown}.json)"
            )
        if line.index is None or line.index in seen:
            continue
        seen.add(line.index)
        folder = run / INDEX / line.index
        dataset = datasets[line.dataset]
        if not _intact(folder, dataset, line):
            build_catalog(
                dataset, _pins_of(dataset, facets, line), facets.of(line.dataset), folder, recorded(run, line.takedown)
            )
        if Catalog.open(folder, dataset.root).digest != line.digest:
            raise DataError(
                f"{run / FILE} pinned units {line.first_unit}..{line.units - 1} with digest "
                f"{line.digest[:12]}, their files in {dataset.root} give another: files of the data set were "
                "replaced; restore them, or start a new run directory"
            )
        pins = [pin_from_json(entry) for entry in json.loads((folder / PARTS).read_text())]
        listed = json.loads((folder / "catalog.json").read_text())["tars"] if tars else []
        check_pins(dataset, pins, [(facet, name, size) for facet, name, size in listed])


def check_line(run: Path, datasets: Mapping[str, Dataset], facets: RunFacets, line: Generation) -> None:
    """Raise `DataError` if the config does not ask for what the line was made of."""
    if line.dataset not in datasets:
        there = ", ".join(sorted({other.dataset for other in read_lines(run / FILE)[0]} - {""}))
        here = ", ".join(name for name in datasets if name)
        raise DataError(
            f"{run / FILE}: this run trains on {there or 'one data set'}, the config names "
            f"{here or 'one data set'}: give the same data.mix, or a new run.path"
        )
    wanted = facets_json(facets.of(line.dataset))
    if line.facets != wanted:
        raise DataError(
            f"{run / FILE}: this run reads {', '.join(line.facets.values())}, the config asks for "
            f"{', '.join(wanted.values())}: give the same model and encode settings, or a new run.path"
        )


def catalog_folder(run: Path, line: Generation) -> CatalogFolder:
    """The catalog of a generation that has units."""
    assert line.index is not None
    return CatalogFolder(
        folder=run / INDEX / line.index,
        num_rows=line.num_rows,
        num_texts=line.num_texts,
        dataset=line.dataset,
    )


def facets_json(facets: RunFacets) -> dict[str, Any]:
    """As a line records them."""
    return {"text": facets.text, **{str(r): facets.latents[r] for r in sorted(facets.latents)}}


def _intact(folder: Path, dataset: Dataset, line: Generation) -> bool:
    """Whether a catalog folder can be opened and is the one that was recorded."""
    try:
        catalog = Catalog.open(folder, dataset.root)
    except DataError:
        return False
    return (folder / PARTS).is_file() and catalog.digest == line.digest


def _pins_of(dataset: Dataset, facets: RunFacets, line: Generation) -> list[UnitPins]:
    pinned = []
    for unit in range(line.first_unit, line.units):
        pins = pin_unit(dataset, unit, line.rows_parts.get(str(unit), 1), facets.of(line.dataset))
        if pins is None:
            raise DataError(
                f"{dataset.root}: unit {unit} is no longer as generation {line.generation} pinned it: restore "
                "the data set, or start a new run directory"
            )
        pinned.append(pins)
    return pinned
