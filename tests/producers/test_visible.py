"""Parts that another machine committed are waited for: an NFS client shows them late."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from producer_world import SCORERS, FakeEncoders, draw, load_config_once, make_plan_for, produce_here, rows_of

from producers import visible
from producers.driver import Driver
from producers.sources import open_source
from producers.workers import InlineWorkers
from qwenimg_dist.data.facets import DataError, Dataset, Part
from qwenimg_dist.schema import ROWS


class Late(Dataset):
    """As a machine sees it that has asked for each part before it was there: its own at once, others' later."""

    looks: int

    @classmethod
    def of(cls, root: Path, looks: int) -> Late:
        dataset = cls.open(root)
        assert isinstance(dataset, Late)
        dataset.looks, dataset.mine, dataset.seen = looks, set(), Counter[Part]()
        return dataset

    mine: set[Part]
    seen: Counter[Part]

    def unit_parts(self, facet: str, unit: int) -> list[Part]:
        found = []
        for part in super().unit_parts(facet, unit):
            if part not in self.mine and self.seen[part] < self.looks:
                self.seen[part] += 1
                break
            found.append(part)
        return found

    def commit(self, part: Part, *args: Any, **options: Any) -> bool:
        done = super().commit(part, *args, **options)
        self.mine.add(part)
        return done


def two_machines(tmp_path: Path, looks: int) -> tuple[Driver, int]:
    source, config = tmp_path / "source", load_config_once(("source=folder",))
    root = Dataset.create(tmp_path / "data", 2).root
    opened = open_source(config.source.model_copy(update={"path": str(source)}))
    plan = make_plan_for("dedup.near=true")
    workers = InlineWorkers(Late.of(root, looks), plan, opened.root, FakeEncoders(), SCORERS)
    driver = Driver(dataset=Late.of(root, looks), plan=plan, root=opened.root, make_workers=lambda: workers)
    return driver, driver.list_source(opened.find()).num_rows


def test_what_another_machine_committed_is_seen_before_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visible, "_POLL_S", 0.0)
    for name, number in enumerate((0, 1, 0, 2, 1)):
        draw(tmp_path / "source" / f"{name}.png", number, size=(80 + 8 * (name > 1), 80), caption=f"caption {name}")
    calm = Dataset.create(tmp_path / "calm", 2)
    produce_here(tmp_path / "source", calm, make_plan_for("dedup.near=true"), FakeEncoders())
    driver, num_rows = two_machines(tmp_path, looks=2)
    assert driver.produce(driver.pending(), num_rows)
    assert rows_of(Dataset.open(tmp_path / "data"), ROWS) == rows_of(calm, ROWS)
    assert [entry["reason"] for entry in rows_of(calm, ROWS).values()] == [
        "",
        "",
        "near_duplicate",
        "",
        "near_duplicate",
    ]


def test_parts_that_never_appear_end_the_command_with_the_mount_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visible, "_VISIBLE_S", 0.3)
    draw(tmp_path / "source" / "0.png", 0, caption="words")
    driver, num_rows = two_machines(tmp_path, looks=1_000_000)
    with pytest.raises(DataError, match=r"unit 0 of .*: 1 parts of listing were .* sees 0: .*lookupcache=positive"):
        driver.produce(driver.pending(), num_rows)
