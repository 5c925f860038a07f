"""What producer tests share: small picture folders, encoders without torch, and a fuse that ends a run anywhere."""

from __future__ import annotations

import atexit
import functools
import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from producers.driver import Driver, Observer
from producers.filters.base import Resources, Scorers
from producers.pictures import Pixels
from producers.plan import Plan, make_plan
from producers.sources import open_source
from producers.unit import UnitReport
from producers.workers import InlineWorkers
from producers.write import EditPrompt, Encoders
from qwenimg_dist import models
from qwenimg_dist.compose import load_config
from qwenimg_dist.data.facets import Dataset, Part, Tar
from qwenimg_dist.data.shards import RawTensor
from qwenimg_dist.schema import ROWS, latents_facet, text_facet

FINGERPRINT = "0123456789ab"


def tokenizer_alone() -> Path:
    """A pipeline directory with nothing but the tiny tokenizer, for as long as the process lives."""
    folder = tempfile.TemporaryDirectory(prefix="tokenizer-")
    atexit.register(folder.cleanup)
    (Path(folder.name) / "tokenizer").symlink_to(Path(models.__file__).parent / "assets" / "tiny_tokenizer")
    return Path(folder.name)


SCORERS = Scorers(Resources(pipeline_dir=tokenizer_alone(), device="cpu"))


class Killed(BaseException):
    """The process ends here."""


class Fuse:
    """Burns down by one at each point of a run where it may end."""

    def __init__(self, length: int | None = None) -> None:
        self.left = length

    def burn(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed


class FakeEncoders:
    """Tensors as pure functions of the input: block means of the pixels, numbers from the caption's hash."""

    def __init__(self, fuse: Fuse | None = None) -> None:
        self.fuse = fuse or Fuse()
        self.num_pictures = 0
        self.num_captions = 0

    def latents(self, pixels: Pixels) -> list[dict[str, RawTensor]]:
        self.fuse.burn()
        batch, height, width, _ = pixels.shape
        self.num_pictures += batch
        blocks = pixels.reshape(batch, height // 8, 8, width // 8, 8, 3).mean(axis=(2, 4, 5), dtype=np.float32)
        return [{"mean": RawTensor(data=np.repeat(one[None], 16, axis=0), dtype="float32")} for one in blocks]

    def text(self, captions: Sequence[str]) -> Iterator[tuple[str, RawTensor]]:
        for caption in sorted(captions, key=len):
            self.fuse.burn()
            self.num_captions += 1
            yield caption, RawTensor(data=caption_features(caption), dtype="float32")

    def edit_text(self, prompts: Sequence[EditPrompt]) -> list[RawTensor]:
        """As many features as the words and the pictures' sides make; the pictures' means are in them."""
        self.fuse.burn()
        self.num_captions += len(prompts)
        return [RawTensor(data=edit_features(prompt), dtype="float32") for prompt in prompts]


class BurningDataset(Dataset):
    """A data set whose commits may be the last thing that happens, before or after they took effect."""

    fuse = Fuse()

    def commit(
        self,
        part: Part,
        table: pa.Table,
        *,
        config_hash: str,
        tars: Sequence[Tar] = (),
        extra: Mapping[str, Any] | None = None,
    ) -> bool:
        self.fuse.burn()
        done = super().commit(part, table, config_hash=config_hash, tars=tars, extra=extra)
        self.fuse.burn()
        return done


def caption_features(caption: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    seed = int.from_bytes(hashlib.sha256(caption.encode()).digest()[:4], "little")
    rng = np.random.default_rng(seed)
    return rng.standard_normal((5 + len(caption.split()), 4)).astype(np.float32)


def edit_features(prompt: EditPrompt) -> np.ndarray[Any, np.dtype[np.float32]]:
    means = [np.full((1, 4), pixels.mean(), dtype=np.float32) for pixels in prompt.pictures]
    return np.concatenate([*means, caption_features(prompt.text)])


load_config_once = functools.cache(load_config)


def make_plan_for(*overrides: str, resolutions: Sequence[int] = (64,)) -> Plan:
    config = load_config_once(overrides)
    facets = {resolution: latents_facet(resolution, FINGERPRINT) for resolution in resolutions}
    return make_plan(config, text_facet=text_facet(FINGERPRINT), latents_facets=facets)


class Recorder(Observer):
    def __init__(self) -> None:
        self.reports: list[UnitReport] = []

    def unit_done(self, report: UnitReport) -> None:
        self.reports.append(report)


def produce_here(source: Path, dataset: Dataset, plan: Plan, encoders: Encoders, *overrides: str) -> list[UnitReport]:
    """One round in this process; the reports of the units it brought up to date."""
    config = load_config_once(overrides)
    opened = open_source(config.source.model_copy(update={"path": str(source)}))
    recorder = Recorder()
    driver = Driver(
        dataset=dataset,
        plan=plan,
        root=opened.root,
        make_workers=lambda: InlineWorkers(dataset, plan, opened.root, encoders, SCORERS),
        observer=recorder,
    )
    change = driver.list_source(opened.find())
    assert driver.produce(driver.pending(), change.num_rows)
    return recorder.reports


def draw(file: Path, number: int, size: tuple[int, int] = (80, 80), caption: str | None = None) -> None:
    """A picture that depends on `number` alone, and its caption beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file)
    if caption is not None:
        file.with_suffix(".txt").write_text(caption)


def rows_of(dataset: Dataset, facet: str) -> dict[Any, dict[str, Any]]:
    """All merged rows of a facet, by row number (by key for text)."""
    found: dict[Any, dict[str, Any]] = {}
    for unit in dataset.units(facet):
        table = dataset.read_unit(facet, unit)
        assert table is not None
        for entry in table.to_pylist():
            found[entry["row"] if "row" in entry else (unit, entry["key"])] = entry
    return found


def tensor_at(dataset: Dataset, facet: str, entry: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """The first tensor of a sample, by its place alone; fp32 only."""
    assert entry["dtype"] == "float32"
    with open(dataset.tar(facet, entry["tar"]), "rb") as file:
        file.seek(entry["offset"])
        return np.frombuffer(file.read(entry["nbytes"]), dtype=np.float32).reshape(entry["shape"])


def further(entry: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> place of a latents row's other tensors, which lie in the tar of the first."""
    return {one["name"]: {**one, "tar": entry["tar"]} for one in entry["further"] or ()}


def assert_same(disturbed: Dataset, calm: Dataset, plan: Plan) -> None:
    """The same rows, decisions, keys and tensors, whatever else the disturbed one has besides."""
    for facet in plan.settled:
        assert rows_of(disturbed, facet) == rows_of(calm, facet)
    decided, expected = rows_of(disturbed, ROWS), rows_of(calm, ROWS)
    assert decided.keys() == expected.keys()
    for row, entry in expected.items():
        for name, value in entry.items():
            # A row that was admitted once keeps the scores it got then.
            if not (name.startswith("score_") and value is None):
                assert decided[row].get(name) == value, (row, name)
    kept = {row for row, entry in expected.items() if entry["status"] == "kept"}
    for facet in plan.latents_facets.values():
        here, there = rows_of(disturbed, facet), rows_of(calm, facet)
        assert kept & here.keys() == there.keys()
        for row, entry in there.items():
            skipped = {"tar", "offset", "further"}
            assert {k: v for k, v in here[row].items() if k not in skipped} == {
                k: v for k, v in entry.items() if k not in skipped
            }
            assert np.array_equal(tensor_at(disturbed, facet, here[row]), tensor_at(calm, facet, entry))
            mine, theirs = further(here[row]), further(entry)
            assert list(mine) == list(theirs)
            for name, place in theirs.items():
                assert np.array_equal(tensor_at(disturbed, facet, mine[name]), tensor_at(calm, facet, place))
    here, there = rows_of(disturbed, plan.text_facet), rows_of(calm, plan.text_facet)
    assert there.keys() <= here.keys()
    for key, entry in there.items():
        assert np.array_equal(tensor_at(disturbed, plan.text_facet, here[key]), tensor_at(calm, plan.text_facet, entry))
