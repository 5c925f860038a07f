"""Near duplicates: the exact rule against a plain loop, and the same kept set whatever is interrupted or comes late."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from producer_world import BurningDataset, FakeEncoders, Fuse, Killed, make_plan_for, produce_here, rows_of
from rest_slow import rest_slow

from producers.driver import Driver
from producers.near import load_near_index, settle, settle_near
from producers.near_index import HammingIndex
from producers.plan import Plan
from producers.sources import open_source
from producers.verdicts import Verdicts
from producers.workers import InlineWorkers, Outcome, Task
from qwenimg_dist.compose import load_config
from qwenimg_dist.data.facets import Dataset, Part
from qwenimg_dist.report.funnel import funnel
from qwenimg_dist.schema import ROWS, SCAN, SCAN_COLUMNS

UNIT_SIZE = 4


def near_plan(*overrides: str, distance: int = 6) -> Plan:
    return make_plan_for("dedup.near=true", f"dedup.distance={distance}", *overrides)


def picture(file: Path, number: int, *, quality: int = 95, size: tuple[int, int] = (200, 160)) -> None:
    """A picture that depends on `number` alone, stored well or badly, large or small; `number` is its caption."""
    rng = np.random.default_rng(number)
    pixels = np.zeros((160, 200, 3))
    for cells, weight in ((4, 90), (9, 60), (32, 70)):
        grid = rng.uniform(0, weight, (cells, cells, 3)).astype(np.uint8)
        pixels += np.asarray(Image.fromarray(grid).resize((200, 160), Image.Resampling.BICUBIC), dtype=np.float64)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).resize(size, Image.Resampling.LANCZOS)
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, quality=quality)
    file.with_suffix(".txt").write_text(f"picture number {number} of several")


def statuses(dataset: Dataset) -> dict[int, str]:
    return {row: entry["reason"] or entry["status"] for row, entry in rows_of(dataset, ROWS).items()}


def plainly(rows: list[tuple[int, int]], distance: int) -> dict[int, int]:
    """The rule, word for word: row -> nearest kept row before it, -1 where kept."""
    kept: list[tuple[int, int]] = []
    found = {}
    for row, phash in rows:
        near = [((phash ^ other) & (2**64 - 1)).bit_count() for _, other in kept]
        within = [(bits, kept[number][0]) for number, bits in enumerate(near) if bits <= distance]
        found[row] = min(within)[1] if within else -1
        if not within:
            kept.append((row, phash))
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Rows 3, 6 and 9 look like row 0, row 10 like row 7; row 5 has the bytes of row 4."""
    root = tmp_path / "source"
    for row, number in enumerate([0, 1, 2, 0, 4, 4, 0, 7, 8, 0, 7, 11]):
        picture(root / f"{row:02d}.jpg", number, quality=95 - 5 * row if row != 5 else 75, size=(200 - 4 * row, 160))
    shutil.copy(root / "04.jpg", root / "05.jpg")
    return root


EXPECTED = dict.fromkeys(range(12), "kept") | {3: "near_duplicate", 5: "duplicate", 6: "near_duplicate"}
EXPECTED |= {9: "near_duplicate", 10: "near_duplicate"}


def test_a_row_that_looks_like_a_kept_one_before_it_is_rejected(source: Path, tmp_path: Path) -> None:
    dataset = Dataset.create(tmp_path / "data", UNIT_SIZE)
    encoders = FakeEncoders()
    produce_here(source, dataset, near_plan(), encoders)
    assert statuses(dataset) == EXPECTED
    assert encoders.num_pictures == 7
    decided = rows_of(dataset, ROWS)
    assert decided[9]["detail"].startswith("looks like row 0: ")
    assert decided[10]["detail"].endswith("of 64 bits differ")
    counted = funnel(dataset)
    assert (counted.unique, counted.distinct, counted.admitted) == (11, 7, 7)
    assert counted.reasons == {("rejected", "near_duplicate"): 4, ("rejected", "duplicate"): 1}
    assert ("no near duplicate", 7) in [row[:2] for row in counted.tables()[0].rows]


def test_switching_and_another_distance_add_facets_and_encode_only_what_is_new(source: Path, tmp_path: Path) -> None:
    dataset = Dataset.create(tmp_path / "data", UNIT_SIZE)
    off = make_plan_for()
    produce_here(source, dataset, off, FakeEncoders())
    assert funnel(dataset).distinct is None
    before = {file: file.read_bytes() for file in dataset.root.rglob("*.*") if file.is_file()}
    hashes = sorted((row, entry["phash"]) for row, entry in rows_of(dataset, SCAN).items() if row != 5)
    identical = sum(of >= 0 for of in plainly(hashes, 0).values())
    for plan, rejected in ((near_plan(), 4), (near_plan(distance=0), identical), (near_plan(), 4), (off, 0)):
        encoders = FakeEncoders()
        reports = produce_here(source, dataset, plan, encoders)
        assert list(statuses(dataset).values()).count("near_duplicate") == rejected
        assert encoders.num_pictures == sum(report.decoded for report in reports) == 0
        assert produce_here(source, dataset, plan, FakeEncoders()) == []
        assert len({facet for facet in dataset.facets() if facet.startswith("near-")}) <= 2
    files = {file for file in before if file.name != "source-complete.json"}
    assert all(file.read_bytes() == before[file] for file in files)
    assert len(dataset.parts(near_plan().near.facet)) == 3  # type: ignore[union-attr]
    narrow = Dataset.create(tmp_path / "narrow", UNIT_SIZE)
    for plan, encoded in ((near_plan(), 7), (off, 4)):
        encoders = FakeEncoders()
        produce_here(source, narrow, plan, encoders)
        assert encoders.num_pictures == encoded


def test_a_thumbnail_does_not_cost_the_picture_it_is_of(source: Path, tmp_path: Path) -> None:
    for row in (0, 7):
        picture(source / f"{row:02d}.jpg", [0, 7][row // 7], size=(75, 60))
    dataset = Dataset.create(tmp_path / "data", UNIT_SIZE)
    produce_here(source, dataset, near_plan(), FakeEncoders())
    found = statuses(dataset)
    assert (found[0], found[3], found[6]) == ("too_small", "kept", "near_duplicate")
    assert (found[7], found[10]) == ("too_small", "kept")
    # Where thumbnails are admitted they come first in source order.
    taken = near_plan("filters.resolution.min_side=50", "encode.upscale=true")
    produce_here(source, dataset, taken, FakeEncoders())
    assert statuses(dataset) == EXPECTED


@settings(deadline=None, max_examples=6, suppress_health_check=list(HealthCheck))
@given(
    first=st.sets(st.sampled_from([32, 64, 96, 128]), min_size=1, max_size=2),
    added=st.sampled_from([16, 32, 48, 96, 256]),
    sides=st.lists(st.integers(50, 200), min_size=6, max_size=6),
    upscale=st.booleans(),
)
@example(first={128}, added=64, sides=[70, 150, 150, 70, 150, 150], upscale=False)
def test_decisions_do_not_change_when_a_resolution_is_added(
    tmp_path_factory: pytest.TempPathFactory, first: set[int], added: int, sides: list[int], upscale: bool
) -> None:
    """Only what was too small for every class may come in; who is a copy of whom is said once."""
    root = tmp_path_factory.mktemp("grown")
    for row, side in enumerate(sides):
        picture(root / "source" / f"{row:02d}.jpg", row % 2, size=(side + 20, side))
    dataset = Dataset.create(root / "data", UNIT_SIZE)
    words = ("dedup.near=true", "filters.resolution.min_side=60", f"encode.upscale={str(upscale).lower()}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        plans = [make_plan_for(*words, resolutions=sorted(first)), make_plan_for(*words, resolutions=[*first, added])]
        produce_here(root / "source", dataset, plans[0], FakeEncoders())
        before = statuses(dataset)
        produce_here(root / "source", dataset, plans[1], FakeEncoders())
    after = statuses(dataset)
    assert {row: after[row] for row in after if before[row] != "too_small"} == {
        row: status for row, status in before.items() if status != "too_small"
    }
    assert all(after[row] in ("too_small", "kept") for row in after if before[row] == "too_small")


def test_scans_from_before_there_were_hashes_have_none(source: Path, tmp_path: Path) -> None:
    dataset = Dataset.create(tmp_path / "data", UNIT_SIZE)
    produce_here(source, dataset, make_plan_for(), FakeEncoders())
    part = Part(facet=SCAN, unit=0, part=0)
    old, meta = dataset.read(part).drop_columns("phash"), dataset.meta(part)
    assert set(SCAN_COLUMNS.names) - set(old.column_names) == {"phash"}
    dataset.parquet(part).unlink()
    dataset.commit(part, old, config_hash=meta["config_hash"])
    produce_here(source, dataset, near_plan(), FakeEncoders())
    found = statuses(dataset)
    assert [row for row, status in found.items() if status == "near_duplicate"] == [9, 10]
    assert rows_of(dataset, ROWS)[9]["detail"].startswith("looks like row 6")  # rows 0 to 3 take no part


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**32),
    distance=st.sampled_from([0, 1, 3, 6, 9]),
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5),
)
def test_settling_unit_by_unit_is_the_plain_loop(seed: int, distance: int, sizes: list[int]) -> None:
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2**64, 3, dtype=np.uint64)
    hashes = centres[rng.integers(0, 3, sum(sizes))]
    for _ in range(distance + 1):
        hashes ^= np.uint64(1) << rng.integers(0, 64, len(hashes), dtype=np.uint64)
    rows = np.arange(len(hashes)) * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("producers.near_index._RECENT", 25)
        index = HammingIndex(distance)
        found: dict[int, int] = {}
        for end in np.cumsum(sizes):
            unit = slice(len(found), end)
            near, distances, wanted = settle(hashes[unit], rows[unit], index)
            assert not wanted
            assert ((near == -1) == (distances == -1)).all()
            index.add(hashes[unit][near == -1], rows[unit][near == -1])
            found |= dict(zip(rows[unit].tolist(), near.tolist(), strict=True))
        assert found == plainly(list(zip(rows.tolist(), hashes.tolist(), strict=True)), distance)
        # Any unit, settled again beside all the others, comes out the same.
        for begin, end in zip(np.cumsum([0, *sizes]), np.cumsum(sizes)):
            rest = _without(index, rows[begin:end], hashes, rows, found)
            again, _, _ = settle(hashes[begin:end], rows[begin:end], rest)
            assert again.tolist() == [found[int(row)] for row in rows[begin:end]]


def _without(index: HammingIndex, lost: np.ndarray, hashes: np.ndarray, rows: np.ndarray, found: Any) -> HammingIndex:
    """The index as it is loaded when these rows' part is gone."""
    left = np.array([found[int(row)] == -1 and row not in lost for row in rows], dtype=np.bool_)
    rest = HammingIndex(index.distance)
    rest.add(hashes[left], rows[left])
    return rest


def test_the_whole_pipeline_follows_the_rule_for_every_order_of_work(source: Path, tmp_path: Path) -> None:
    """Scans and encodings end in any order, as they do with several actors."""
    plan = near_plan()
    calm = Dataset.create(tmp_path / "calm", UNIT_SIZE)
    produce_here(source, calm, plan, FakeEncoders())
    assert plan.near is not None
    taking_part = {row: entry["phash"] for row, entry in rows_of(calm, SCAN).items() if row != 5}
    assert {row: entry["near_duplicate_of"] for row, entry in rows_of(calm, plan.near.facet).items()} == plainly(
        sorted(taking_part.items()), 6
    )
    for seed in range(6):
        dataset = Dataset.create(tmp_path / f"shuffled {seed}", UNIT_SIZE)
        _produce_shuffled(source, dataset, plan, np.random.default_rng(seed))
        for facet in (SCAN, plan.dedup.facet, plan.near.facet, ROWS):
            assert rows_of(dataset, facet) == rows_of(calm, facet), (seed, facet)


class _Shuffled(InlineWorkers):
    """Three tasks at a time, which end in random order."""

    rng: np.random.Generator
    num_workers = 3

    def num_idle(self) -> int:
        return 3 - len(self._queue)

    def wait(self, timeout_s: float) -> list[Outcome]:
        self._queue.rotate(int(self.rng.integers(0, 3)))
        return list(super().wait(timeout_s))

    def submit(self, task: Task) -> None:
        self._queue.append(task)


def _produce_shuffled(source: Path, dataset: Dataset, plan: Plan, rng: np.random.Generator) -> None:
    from producer_world import SCORERS

    opened = open_source(load_config([f"source.path={source}"]).source)
    workers = _Shuffled(dataset, plan, opened.root, FakeEncoders(), SCORERS)
    workers.rng = rng
    driver = Driver(dataset=dataset, plan=plan, root=opened.root, make_workers=lambda: workers)
    change = driver.list_source(opened.find())
    assert driver.produce(driver.pending(), change.num_rows)


@pytest.mark.parametrize("fuse", rest_slow(range(0, 34, 3), range(0, 34, 9)))
def test_killed_anywhere_with_a_file_that_turns_up_late(source: Path, tmp_path: Path, fuse: int) -> None:
    """The same history, with and without kills: everything but row 2, then row 2, whose look rows 8 and 11 have."""
    for row in (2, 8, 11):
        picture(source / f"{row:02d}.jpg", 2, quality=90 - 3 * row)
    lines = [f'{{"file_name": "{row:02d}.jpg", "text": "picture number {row}"}}' for row in range(12)]
    (source / "metadata.jsonl").write_text("\n".join(lines))
    late = (source / "02.jpg").read_bytes()
    calm = Dataset.create(tmp_path / "calm", UNIT_SIZE)
    killed = BurningDataset.create(tmp_path / "killed", UNIT_SIZE)
    assert isinstance(killed, BurningDataset)
    plan = near_plan()
    assert plan.near is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        for there in (False, True):
            if there:
                (source / "02.jpg").write_bytes(late)
            else:
                (source / "02.jpg").unlink()
            produce_here(source, calm, plan, FakeEncoders())
            killed.fuse = Fuse(fuse)
            try:
                produce_here(source, killed, plan, FakeEncoders(killed.fuse))
            except Killed:
                killed.fuse = Fuse()
                killed.clean()
                produce_here(source, killed, plan, FakeEncoders())
            killed.fuse = Fuse()
    assert statuses(calm)[2] == "near_duplicate"
    assert rows_of(calm, ROWS)[2]["detail"].startswith("looks like row 8")
    for facet in (SCAN, plan.dedup.facet, plan.near.facet, ROWS):
        assert rows_of(killed, facet) == rows_of(calm, facet)


def test_a_lost_part_is_made_again_as_it_was(source: Path, tmp_path: Path) -> None:
    dataset = Dataset.create(tmp_path / "data", UNIT_SIZE)
    rule = near_plan().near
    assert rule is not None
    produce_here(source, dataset, near_plan(), FakeEncoders())
    before = rows_of(dataset, rule.facet)
    for part in dataset.parts(rule.facet):
        dataset.parquet(part).unlink()
        ask = Verdicts(dataset, near_plan()).of
        assert not settle_near(dataset, part.unit, rule, load_near_index(dataset, rule), ask, config_hash="x")
        assert rows_of(dataset, rule.facet) == before
    assert dataset.read(dataset.parts(rule.facet)[0]).schema.field("phash").type == pa.int64()
