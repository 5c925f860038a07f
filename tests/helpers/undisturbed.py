"""A small source, an undisturbed run over it, and the comparison of a disturbed one with that."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import webdataset
from photo_folder import photo
from producer_world import SCORERS, rows_of, tensor_at

from producers.driver import Driver
from producers.encode import PipelineEncoders
from producers.plan import make_plan
from producers.sources import open_source
from producers.workers import InlineWorkers
from qwenimg_dist.compose import load_config
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.models.identity import latents_facet_names, text_facet_name
from qwenimg_dist.models.tiny import tiny_pipeline_dir
from qwenimg_dist.schema import CAPTIONS_PREFIX, LISTING, ROWS, SCAN, is_dedup

TABLES = (LISTING, SCAN, ROWS)


def write_source(root: Path, num_pictures: int, num_different: int) -> Path:
    """Pictures that repeat after `num_different`, one of them cut short, each with a caption beside it."""
    root.mkdir(parents=True)
    for number in range(num_pictures):
        file = root / f"{number:03d}.png"
        photo(number % num_different, 70 + 5 * (number % 5), 80).save(file)
        file.with_suffix(".txt").write_text(f"picture {number % 9}, seen from {'far ' * (number % 4)}away")
    (root / "010.png").write_bytes((root / "010.png").read_bytes()[:-500])
    return root


def words(source: Path, data: Path) -> list[str]:
    """Overrides of `produce`: six units of five rows, two producers."""
    return [
        f"source.path={source}",
        f"data.path={data}",
        "data.unit_size=5",
        "encode.resolutions=[64]",
        "encode.dtype=float32",
        "cluster.producers=2",
    ]


def produce_quietly(source: Path, data: Path) -> Dataset:
    """By the same driver and encoders, in this process and without Ray."""
    config = load_config(words(source, data))
    pipeline = tiny_pipeline_dir()
    plan = make_plan(
        config,
        text_facet=text_facet_name(pipeline, config),
        latents_facets=latents_facet_names(pipeline, config),
    )
    dataset = Dataset.create(data, 5)
    opened, encoders = open_source(config.source), PipelineEncoders.load(pipeline, config)
    workers = InlineWorkers(dataset, plan, opened.root, encoders, SCORERS)
    driver = Driver(dataset=dataset, plan=plan, root=opened.root, make_workers=lambda: workers)
    change = driver.list_source(opened.find())
    assert driver.produce(driver.pending(), change.num_rows)
    return dataset


def assert_same(dataset: Dataset, calm: Dataset, *, but: Collection[int] = ()) -> None:
    """The same rows, decisions, keys and tensors, except for the rows in `but`; nothing is left lying about."""
    tables = [*TABLES, *(facet for facet in calm.facets() if is_dedup(facet) or facet.startswith(CAPTIONS_PREFIX))]
    for facet in tables:
        here, there = rows_of(dataset, facet), rows_of(calm, facet)
        assert here.keys() == there.keys()
        assert all(here[row] == there[row] for row in here if row not in but)
    assert not dataset.strays()
    assert not (dataset.root / ".suspects").exists()
    for facet in calm.facets():
        if facet in tables:
            continue
        here, there = rows_of(dataset, facet), rows_of(calm, facet)
        if facet.startswith("latents-"):
            assert here.keys() - set(but) == there.keys() - set(but)
        else:  # the caption of a row that was lost may have been the only one of its kind
            assert here.keys() <= there.keys()
            assert len(there.keys() - here.keys()) <= len(but)
        for key in here.keys() & there.keys():
            # Batches may differ on another machine; here they do not, but the promise is a tolerance.
            mine, theirs = tensor_at(dataset, facet, here[key]), tensor_at(calm, facet, there[key])
            assert np.allclose(mine, theirs, atol=1e-4)
            assert {k: v for k, v in here[key].items() if k not in ("tar", "offset")} == {
                k: v for k, v in there[key].items() if k not in ("tar", "offset")
            }
    indexed = {
        entry["key"] for facet in dataset.facets() for entry in rows_of(dataset, facet).values() if "tar" in entry
    }
    read = {
        sample["__key__"]
        for tar in dataset.root.glob("[a-z]*/*.tar")
        for sample in webdataset.WebDataset(str(tar), shardshuffle=False)
    }
    assert read == indexed
