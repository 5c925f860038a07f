"""Pictures and texts of `eval` on shared storage: what other machines draw is found, a moment's absence is waited for,
and what bears its name is whole."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from storage_away import stale

from consumers.hooks import Hooks
from consumers.pictures import Cell, TextFolder, _save, judge_pictures, missing_cells, read_picture
from consumers.ranks import Ranks
from consumers.reference_pass import Watch
from qwenimg_dist.compose import load_config
from qwenimg_dist.models.tiny import tiny_pipeline_dir
from qwenimg_dist.patience import StorageAwayError
from qwenimg_dist.rewards.base import Prompt, Scores

CELLS = [Cell(prompt=prompt, seed=seed) for prompt in range(2) for seed in (3, 4)]
ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
CODEC: Any = SimpleNamespace(decode=lambda latents: latents)
QUIET = Watch(stage=Hooks().stage, say=Hooks().say, stop=lambda: None)


def draw(folder: Path, cells: list[Cell]) -> None:
    _save(CODEC, torch.zeros(len(cells), 3, 16, 24), [cell.file(folder) for cell in cells])


def test_what_is_missing_is_told_without_asking_for_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "pictures"
    assert missing_cells(CELLS, folder) == [0, 1, 2, 3]
    draw(folder, CELLS[1:3])

    def stat(path: Any, **_: Any) -> Any:
        raise AssertionError(f"{path} was asked for: if it is not there, NFS remembers that")

    stale(monkeypatch, os, "listdir", "pictures", times=3)
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stat)
        missing = missing_cells(CELLS, folder)
    assert missing == [0, 3]


def test_a_moment_without_the_storage_costs_no_picture_its_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(images: Any, prompts: Any) -> Scores:
        total = torch.tensor([image.width for image in images], dtype=torch.float64).numpy()
        return Scores(components={"wide": total}, total=total, failures={}, timeouts={})

    draw(tmp_path, CELLS)
    stale(monkeypatch, Image, "open", "00001-3", times=3)
    prompts = [Prompt(text="a"), Prompt(text="b")]
    assert judge_pictures(score, CELLS, prompts, tmp_path, ALONE, QUIET)["total"] == [24.0] * 4
    stale(monkeypatch, Image, "open", "00001-3", times=99)
    with pytest.raises(StorageAwayError, match=r"00001-3\.png: Stale file handle"):
        read_picture(CELLS[2].file(tmp_path))


def test_pictures_and_texts_are_on_the_disk_before_they_bear_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    named: list[str] = []
    sync, rename = os.fsync, os.replace

    def fsync(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        sync(handle)

    def replace(source: Any, target: Any) -> None:
        assert os.stat(source).st_ino in synced, f"{target} may be torn after a power cut"
        named.append(Path(target).suffix)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    draw(tmp_path / "pictures", CELLS[:2])
    texts = TextFolder(tmp_path / "text")
    texts.encode(load_config([]), tiny_pipeline_dir(), ["", "a red circle", ""], ALONE, QUIET)
    assert sorted(named) == [".png", ".png", ".safetensors", ".safetensors"]
    assert texts.read("a red circle").shape[0] > texts.read("").shape[0] > 0
    stale(monkeypatch, Path, "read_bytes", "text", times=3)
    assert texts.read("").dtype == torch.float32
