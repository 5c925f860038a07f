"""`data repair`: whatever `data verify` finds, the next `produce` does exactly these units again, and rows, decisions,
keys and tensors are those from before the damage. Nothing is deleted; a run that pinned the damaged parts is told."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from producer_world import FakeEncoders, draw, make_plan_for, produce_here, rows_of, tensor_at
from rest_slow import rest_slow
from rich.console import Console

from qwenimg_dist.commands.data_repair import ASIDE, repair
from qwenimg_dist.commands.data_verify import Tally, problems
from qwenimg_dist.commands.main import main
from qwenimg_dist.data.catalog import Catalog, RunFacets
from qwenimg_dist.data.catalog_build import build_catalog
from qwenimg_dist.data.facets import DataError, Dataset, Part
from qwenimg_dist.data.pins import Pin, check_pins, ready_units
from qwenimg_dist.schema import LISTING, ROWS, SCAN, SOURCE_COMPLETE, caption_key

PLAN = make_plan_for(resolutions=(64, 96))
DEDUP, CAPTIONS = PLAN.dedup.facet, str(PLAN.dedup.captions_facet)
SMALL, LARGE, TEXT = PLAN.latents_facets[64], PLAN.latents_facets[96], PLAN.text_facet
FACETS = RunFacets(text=TEXT, latents=dict(PLAN.latents_facets))


@pytest.fixture(autouse=True, scope="module")
def without_fsync() -> Iterator[None]:
    """Durability is not what is tested, and it is slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


class World:
    """A data set with a history (so that units have several parts), and an untouched copy of it."""

    def __init__(self, root: Path) -> None:
        self.source = root / "source"
        self.dataset = Dataset(root / "data", 4)
        self.calm = Dataset(root / "calm", 4)

    def produce(self) -> tuple[list[int], FakeEncoders]:
        encoders = FakeEncoders()
        reports = produce_here(self.source, self.dataset, PLAN, encoders)
        return [report.unit for report in reports], encoders

    def verify(self) -> list[str]:
        return [str(problem) for problem in problems(self.dataset, Tally())]

    def repair(self) -> int:
        return repair(self.dataset, Console(width=300))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("pristine"))
    for number in range(15):
        side = (70, 120, 130)[number % 3]
        draw(world.source / f"{number:02d}.png", number, (side, side + 10), f"caption {number}")
    shutil.copy(world.source / "01.png", world.source / "13.png")
    (world.source / "06.png").write_bytes((world.source / "06.png").read_bytes()[:-100])
    (world.source / "07.txt").unlink()
    dataset = Dataset.create(world.dataset.root, 4)
    first = make_plan_for("filters.resolution.min_side=100", resolutions=(64,))
    produce_here(world.source, dataset, first, FakeEncoders())
    (world.source / "07.txt").write_text("caption that came later")
    (world.source / "04.txt").write_text("another caption")
    produce_here(world.source, dataset, PLAN, FakeEncoders())
    shutil.copytree(world.dataset.root, world.calm.root)
    assert all(len(dataset.unit_parts(facet, 1)) == 2 for facet in (LISTING, DEDUP, ROWS, SMALL, TEXT))
    return world


@pytest.fixture
def world(pristine: World, tmp_path: Path) -> World:
    shutil.copytree(pristine.source.parent, tmp_path / "world")
    return World(tmp_path / "world")


def flip(facet: str, part: int, unit: int = 1) -> Callable[[Dataset], None]:
    def damage(dataset: Dataset) -> None:
        tar = dataset.tars(Part(facet=facet, unit=unit, part=part))[0]
        with open(dataset.tar(facet, tar.name), "r+b") as file:
            file.seek(tar.size_bytes // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))

    return damage


def lose_tar(facet: str, part: int, unit: int = 1) -> Callable[[Dataset], None]:
    def damage(dataset: Dataset) -> None:
        dataset.tar(facet, dataset.tars(Part(facet=facet, unit=unit, part=part))[0].name).unlink()

    return damage


def lose(facet: str, part: int, unit: int = 1) -> Callable[[Dataset], None]:
    return lambda dataset: dataset.parquet(Part(facet=facet, unit=unit, part=part)).unlink()


def garble(facet: str, part: int, unit: int = 1) -> Callable[[Dataset], None]:
    def damage(dataset: Dataset) -> None:
        file = dataset.parquet(Part(facet=facet, unit=unit, part=part))
        file.write_bytes(file.read_bytes()[:-20])

    return damage


DAMAGES: dict[str, list[Callable[[Dataset], None]]] = {
    "a flipped bit in the first of two tars": [flip(SMALL, 0)],
    "a flipped bit in the last": [flip(SMALL, 1)],
    "a flipped bit in text": [flip(TEXT, 0)],
    "a tar that is gone": [lose_tar(LARGE, 0)],
    "a text tar that is gone": [lose_tar(TEXT, 1)],
    "the last parquet gone": [lose(SMALL, 1)],
    "the first parquet gone, a gap": [lose(SMALL, 0)],
    "the only parquet gone": [lose(LARGE, 0)],
    "a garbled latents parquet": [garble(SMALL, 0)],
    "a garbled scan": [garble(SCAN, 0)],
    "garbled scans of two units": [garble(SCAN, 0), garble(SCAN, 0, unit=3)],
    "a scan that is gone": [lose(SCAN, 0)],
    "a garbled dedup": [garble(DEDUP, 1)],
    "garbled captions": [garble(CAPTIONS, 0)],
    "all captions": [garble(CAPTIONS, 0), garble(CAPTIONS, 1)],
    "all of dedup": [garble(DEDUP, 0), garble(DEDUP, 1)],
    "garbled decisions": [garble(ROWS, 1)],
    "the first decisions": [garble(ROWS, 0)],
    "all decisions": [garble(ROWS, 0), garble(ROWS, 1)],
    "everything but the listing": [garble(SCAN, 0), garble(DEDUP, 0), garble(ROWS, 1), flip(SMALL, 0), lose(TEXT, 1)],
    "three units": [flip(SMALL, 0, unit=0), lose(LARGE, 0, unit=2), garble(TEXT, 0, unit=3)],
}
QUICK = (
    "a flipped bit in the last",
    "a tar that is gone",
    "a garbled scan",
    "garbled captions",
    "all of dedup",
    "the first decisions",
    "three units",
)
"""One of each kind; the others with the slow tests."""


@pytest.mark.parametrize("name", rest_slow(DAMAGES, QUICK))
def test_exactly_the_damaged_units_are_made_again_as_they_were(
    world: World, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for damage in DAMAGES[name]:
        damage(world.dataset)
    units = {"three units": [0, 2, 3], "garbled scans of two units": [1, 3]}.get(name, [1])
    assert world.verify()
    parts = [file for file in world.dataset.root.glob("*/*") if file.is_file()]
    content = {hashlib.sha256(file.read_bytes()).hexdigest() for file in parts}
    assert world.repair() == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert f"{len(units)} unit" in said
    assert "run it before the next training" in said
    left = {hashlib.sha256(f.read_bytes()).hexdigest() for f in world.dataset.root.rglob("*") if f.is_file()}
    assert content <= left  # moved, not deleted
    assert world.verify() == []
    assert not (world.dataset.root / SOURCE_COMPLETE).exists()
    assert {one.unit for one in ready_units(world.dataset, FACETS)} == set(range(units[0]))
    done, _ = world.produce()
    assert sorted(done) == units
    assert world.verify() == []
    assert_as_before(world)
    assert world.produce()[0] == []
    assert world.repair() == 0
    assert "sound, nothing to repair" in capsys.readouterr().out


def assert_as_before(world: World) -> None:
    for facet in (LISTING, SCAN, CAPTIONS, DEDUP, ROWS):
        assert rows_of(world.dataset, facet) == rows_of(world.calm, facet)
    for facet in (SMALL, LARGE, TEXT):
        here, there = rows_of(world.dataset, facet), rows_of(world.calm, facet)
        assert there.keys() - here.keys() <= {(1, caption_key("caption 4"))}  # which nothing uses any more
        assert here.keys() <= there.keys()
        for key, entry in here.items():
            mine, theirs = tensor_at(world.dataset, facet, entry), tensor_at(world.calm, facet, there[key])
            assert np.array_equal(mine, theirs)
    assert not world.dataset.strays()


def test_only_what_is_lost_is_encoded_again(world: World) -> None:
    tar = world.dataset.tars(Part(facet=SMALL, unit=1, part=1))[0]
    flip(SMALL, 0)(world.dataset)
    lost = world.dataset.read(Part(facet=SMALL, unit=1, part=0)).num_rows
    world.repair()
    # The sound second part is the first one now, with the same tar.
    assert world.dataset.tars(Part(facet=SMALL, unit=1, part=0)) == [tar]
    _, encoders = world.produce()
    assert (encoders.num_pictures, encoders.num_captions) == (lost, 0)


def test_a_run_that_pinned_the_damaged_parts_is_told_and_a_new_one_sees_the_same_rows(
    world: World, tmp_path: Path
) -> None:
    before = build_catalog(world.dataset, ready_units(world.dataset, FACETS), FACETS, tmp_path / "before")
    pins = [pin for one in ready_units(world.dataset, FACETS) for pin in pins_of(world.dataset, one.parts())]
    check_pins(world.dataset, pins, [])
    flip(SMALL, 0)(world.dataset)
    world.repair()
    world.produce()
    with pytest.raises(DataError, match="start a new run directory"):
        check_pins(world.dataset, pins, [])
    after = build_catalog(world.dataset, ready_units(world.dataset, FACETS), FACETS, tmp_path / "after")
    one, other = (Catalog.open(made.folder, world.dataset.root) for made in (before, after))
    assert np.array_equal(one.keys, other.keys)
    assert np.array_equal(one.latents[64].bucket, other.latents[64].bucket)


def pins_of(dataset: Dataset, parts: list[Part]) -> list[Pin]:
    return [Pin(part=p, sha256=hashlib.sha256(dataset.parquet(p).read_bytes()).hexdigest()) for p in parts]


@pytest.mark.parametrize("gone", ["before the first produce", "after it"])
def test_a_lost_scan_of_a_unit_with_a_file_that_is_gone_is_made_again(tmp_path: Path, gone: str) -> None:
    world = World(tmp_path)
    for number in range(4):
        draw(world.source / f"{number:02d}.png", number, (100, 100), f"caption of number {number}")
    Dataset.create(world.dataset.root, 4)
    if gone == "before the first produce":
        listed = [f'{{"file_name": "{n:02d}.png", "text": "caption of number {n}"}}' for n in range(4)]
        (world.source / "metadata.jsonl").write_text("\n".join(listed))
        (world.source / "02.png").unlink()
    world.produce()
    if gone == "after it":
        (world.source / "02.png").rename(tmp_path / "away.png")
        (world.source / "metadata.jsonl").write_text('{"file_name": "02.png", "text": "caption of number 2"}')
    world.dataset.parquet(Part(facet=SCAN, unit=0, part=0)).unlink()
    world.repair()
    assert world.produce()[0] == [0]
    assert rows_of(world.dataset, ROWS)[2]["reason"] == "missing_file"
    assert [rows_of(world.dataset, ROWS)[row]["status"] for row in (0, 1, 3)] == ["kept"] * 3
    assert world.verify() == []
    assert world.produce()[0] == []


def test_leftovers_are_moved_aside_and_no_unit_is_done_again(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (".tmp-unit-000001.001-x-000.tar-1", "unit-000002.000-abcd-000.tar"):
        (world.dataset.root / SMALL / name).write_bytes(b"half")
    assert main(["data", "repair", f"data.path={world.dataset.root}"]) == 0
    assert capsys.readouterr().out.count("named by no part, moved to _aside/0001") == 2
    assert len(list((world.dataset.root / ASIDE / "0001" / SMALL).iterdir())) == 2
    assert not world.dataset.strays()
    assert (world.dataset.root / SOURCE_COMPLETE).exists()
    assert world.produce()[0] == []


def test_a_damaged_listing_is_beyond_repair_and_its_unit_is_left_alone(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    garble(LISTING, 0)(world.dataset)
    flip(SMALL, 0)(world.dataset)
    lose(LARGE, 0, unit=2)(world.dataset)
    parts = set((world.dataset.root / SMALL).iterdir())
    assert world.repair() == 1
    said = capsys.readouterr().out
    assert "beyond repair: listing/unit-000001.000.parquet (unit 1)" in said
    assert "unit 2: what" in said
    assert set((world.dataset.root / SMALL).iterdir()) == parts
    shutil.copy(
        world.calm.parquet(Part(facet=LISTING, unit=1, part=0)),
        world.dataset.parquet(Part(facet=LISTING, unit=1, part=0)),
    )
    assert world.repair() == 0
    assert sorted(world.produce()[0]) == [1, 2]
    assert_as_before(world)


def test_repair_waits_for_nobody(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    with world.dataset.lock():
        assert main(["data", "repair", f"data.path={world.dataset.root}"]) == 2
    assert "another `produce` is working on" in capsys.readouterr().err


@pytest.mark.parametrize("after", [0, 1, 3, 4, 6, 7])
def test_killed_halfway_it_is_run_again(
    world: World, after: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for damage in DAMAGES["everything but the listing"]:
        damage(world.dataset)
    real, left = os.rename, [after]

    def rename(old: Path, new: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        real(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with contextlib.suppress(KeyboardInterrupt):
            world.repair()
    assert world.repair() == 0
    assert world.verify() == []
    assert world.produce()[0] == [1]
    assert_as_before(world)
