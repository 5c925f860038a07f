"""What cannot be seen for a moment is neither missing nor damaged: a checkpoint, in whose place no earlier one may
come, a compiled catalog, what judges a run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_dataset import FakeProducer, make_rows
from storage_away import stale
from written_checkpoint import write_bare_checkpoint

from consumers.checkpoint import share_of_faults
from consumers.checkpoint_files import STATE, checkpoints_dir, list_checkpoints, step_name
from consumers.judges import FILE, check_judges, hold_to_judges
from consumers.ranks import Ranks
from consumers.remote_checkpoints import RUN_ID, _read_id
from qwenimg_dist.compose import load_config
from qwenimg_dist.data.catalog import HEAD, Catalog
from qwenimg_dist.data.catalog_build import build_catalog
from qwenimg_dist.data.pins import ready_units
from qwenimg_dist.data.takedown import Takedown, keep_copy, read_takedown, recorded
from qwenimg_dist.files import write_json
from qwenimg_dist.patience import StorageAwayError

ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for step in (4, 8):
        write_bare_checkpoint(tmp_path, step, {})
    return tmp_path


PLACES = [(os, "listdir", "checkpoints"), (Path, "read_text", "manifest"), (Path, "stat", "rank-00000")]


@pytest.mark.parametrize(("owner", "name", "word"), PLACES)
def test_a_moment_is_waited_for(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, word: str
) -> None:
    stale(monkeypatch, owner, name, word, times=3)
    assert [(info.step, info.fault) for info in list_checkpoints(run_dir)] == [(4, None), (8, None)]


@pytest.mark.parametrize(("owner", "name", "word"), PLACES)
def test_what_stays_away_is_no_missing_checkpoint(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, word: str
) -> None:
    stale(monkeypatch, owner, name, word, times=99)
    with pytest.raises(StorageAwayError, match="Stale file handle"):
        list_checkpoints(run_dir)


def test_nor_is_it_a_damaged_one(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = checkpoints_dir(run_dir) / step_name(8)
    assert share_of_faults(newest, ALONE) is None
    stale(monkeypatch, Path, "stat", STATE, times=99)
    with pytest.raises(StorageAwayError):
        share_of_faults(newest, ALONE)


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path) == []


@pytest.mark.parametrize(("owner", "name", "word"), [(Path, "read_text", HEAD), (np, "load", "caption_start")])
def test_a_catalog_is_not_made_again_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, word: str
) -> None:
    producer = FakeProducer(tmp_path / "data", unit_size=8, resolutions=(64,))
    producer.add(make_rows(8))
    producer.produce(complete=True)
    units = ready_units(producer.dataset, producer.facets)
    folder = build_catalog(producer.dataset, units, producer.facets, tmp_path / "index").folder
    stale(monkeypatch, owner, name, word, times=3)
    assert Catalog.open(folder, producer.dataset.root).num_rows == 8
    stale(monkeypatch, owner, name, word, times=99)
    with pytest.raises(StorageAwayError, match="Stale file handle"):
        Catalog.open(folder, producer.dataset.root)


def test_a_judge_is_not_another_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(["stage=grpo", "reward.weights.shapes=1"])
    begun = hold_to_judges(config, tmp_path)
    stale(monkeypatch, Path, "read_text", FILE, times=3)
    assert check_judges(config, tmp_path) == begun
    stale(monkeypatch, Path, "read_text", FILE, times=99)
    with pytest.raises(StorageAwayError, match="Stale file handle"):
        check_judges(config, tmp_path)


def test_nor_is_a_takedown_list_or_its_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "takedown.txt"
    file.write_text("a.jpg\n")
    told = read_takedown(file)
    keep_copy(tmp_path, told)
    reads: list[Callable[[], Takedown]] = [lambda: read_takedown(file), lambda: recorded(tmp_path, told.digest)]
    for read in reads:
        with monkeypatch.context() as moment:
            stale(moment, Path, "read_text", "takedown", times=3)
            assert read() == told
            stale(moment, Path, "read_text", "takedown", times=99)
            with pytest.raises(StorageAwayError, match="Stale file handle"):
                read()


def test_nor_is_a_run_another_one_than_its_bucket_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / RUN_ID, {"run_id": "abc"})
    stale(monkeypatch, Path, "read_text", RUN_ID, times=3)
    assert _read_id(tmp_path) == "abc"
    stale(monkeypatch, Path, "read_text", RUN_ID, times=99)
    with pytest.raises(StorageAwayError, match="Stale file handle"):
        _read_id(tmp_path)
