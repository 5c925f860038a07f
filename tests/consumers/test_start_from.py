"""A stage starts from what `start_from` names, exactly, whatever number of ranks wrote it, and keeps to it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import overrides
from written_checkpoint import write_checkpoint

from consumers.certificate import parent_of_pipeline
from consumers.checkpoint_files import checkpoints_dir, describe, rank_file, write_manifest
from consumers.run_directory import preflight
from consumers.start_from import START_FROM, StartWeights, find_start
from qwenimg_dist import patience
from qwenimg_dist.compose import load_config
from qwenimg_dist.config import training_identity
from qwenimg_dist.files import write_json
from qwenimg_dist.models.pipeline import PROVENANCE
from qwenimg_dist.models.safetensors_directory import SafetensorsDirectory
from qwenimg_dist.patience import StorageAwayError
from qwenimg_dist.report.run_events import lineage_text


@pytest.fixture
def root(small_input: Path, tmp_path: Path) -> Path:
    shutil.copytree(small_input / "pipeline", tmp_path / "pipeline")
    (tmp_path / "data").symlink_to(small_input / "data")
    return tmp_path


Results = Callable[[str], dict[str, Any]]


def find(root: Path, *words: str, recorded: dict[str, Any] | None = None) -> StartWeights | None:
    config = load_config(overrides(root, "child", *words))
    return find_start(config, root / "child", root / "pipeline", recorded=recorded)


def test_weights_come_range_by_range_from_any_number_of_ranks(root: Path) -> None:
    write_checkpoint(root, "parent", 2)
    newest = write_checkpoint(root, "parent", 4)
    stock = SafetensorsDirectory(root / "pipeline" / "transformer")
    cases = [
        ([f"start_from={root / 'parent'}"], -4),
        ([f"start_from.path={root / 'parent'}", "start_from.step=2"], -2),
        ([f"start_from.path={newest}", "start_from.weights=raw"], 4),
    ]
    fingerprints = set()
    for words, change in cases:
        start = find(root, *words)
        assert start is not None
        assert start.source is not None
        for name in stock.names:
            numel = torch.Size(stock.shape(name)).numel()
            for low, high in ((0, numel), (numel // 3, numel // 2 + 1)):
                expected = stock.read_flat_range(name, low, high).float() + change
                assert torch.equal(start.source.read_flat_range(name, low, high), expected)
        fingerprints.add(start.fingerprint)
    assert len(fingerprints) == 3
    assert find(root, f"start_from={root / 'parent'}").fingerprint in fingerprints  # type: ignore[union-attr]


def test_a_run_keeps_to_what_it_started_from(root: Path) -> None:
    write_checkpoint(root, "parent", 2)
    words = f"start_from={root / 'parent'}"
    first = find(root, words)
    assert first is not None
    write_checkpoint(root, "parent", 4)
    again = find(root, words, recorded=first.record)
    assert again is not None
    assert (again.record, again.checkpoint) == (first.record, first.checkpoint)
    with pytest.raises(ValueError, match=r"started from step 2 of .*parent, not from start_from.step=4"):
        find(root, f"start_from.path={root / 'parent'}", "start_from.step=4", recorded=first.record)
    with pytest.raises(ValueError, match=r"holds weights \w+, .*child started from"):
        find(root, f"start_from.path={root / 'parent'}", "start_from.weights=raw", recorded=first.record)
    with pytest.raises(ValueError, match=r"child started from .*parent \(step 2\): give start_from="):
        find(root, recorded=first.record)
    # The source may go when the run has a checkpoint of its own, not before.
    shutil.move(root / "parent", root / "moved")
    with pytest.raises(ValueError, match="neither a run directory"):
        find(root, words, recorded=first.record)
    moved = find(root, f"start_from={root / 'moved'}", recorded=first.record)
    assert moved is not None
    assert moved.fingerprint == first.fingerprint
    write_checkpoint(root, "child", 1)
    gone = find(root, words, recorded=first.record)
    assert gone is not None
    assert (gone.source, gone.fingerprint) == (None, first.fingerprint)
    with pytest.raises(ValueError, match=r"started from model.path, start_from=.* is new to it"):
        find(root, f"start_from={root / 'moved'}")


def test_what_is_no_source_is_refused_before_anything_starts(root: Path) -> None:
    write_checkpoint(root, "parent", 2, ema=False)
    cases = [
        (["start_from=nowhere"], "start_from=nowhere: it is neither a run directory"),
        ([f"start_from={root / 'parent'}"], "has no EMA: set start_from.weights=raw"),
        ([f"start_from.path={root / 'parent'}", "start_from.step=3"], r"no checkpoint of step 3 .*there are: 2"),
        ([f"start_from.path={root / 'pipeline'}", "start_from.step=3"], "has no steps"),
    ]
    for words, message in cases:
        with pytest.raises(ValueError, match=message):
            find(root, *words)
    file = next(checkpoints_dir(root / "parent").rglob("rank-00001*"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"no valid checkpoint in .*rank-00001"):
        find(root, f"start_from.path={root / 'parent'}", "start_from.weights=raw")


def test_another_architecture_is_refused_by_name(root: Path) -> None:
    folder = write_checkpoint(root, "parent", 2)
    state = json.loads((folder / "state.json").read_text())
    state["parameters"]["proj_out.weight"]["shape"] = [32, 64]
    (folder / "state.json").write_text(json.dumps(state))
    names = [rank_file(rank, 3) for rank in range(3)] + ["state.json", "certificate.json"]
    write_manifest(folder, 2, 3, [describe(folder / name) for name in names])
    with pytest.raises(ValueError, match=r"another architecture .*proj_out.weight is \(32, 64\), there \(64, 32\)"):
        find(root, f"start_from={root / 'parent'}")


def test_preflight_takes_it_in_and_lineage_shows_it(root: Path) -> None:
    write_checkpoint(root, "parent", 2)
    config = load_config(overrides(root, "child", f"start_from={root / 'parent'}"))
    prepared = preflight(config)
    assert prepared.start is not None
    assert prepared.model_fingerprint == prepared.start.fingerprint
    assert not (root / "child").exists()
    parent = prepared.start.record["parent"]
    assert (parent["data"], parent["lineage"]["model"]) == ("da7a", "small")
    told = lineage_text({"model": "small", "fingerprint": prepared.model_fingerprint, "parent": parent})
    assert told.endswith(f"step 2 of {root / 'parent' / 'checkpoints' / 'step-00000002'}")
    (root / "child").mkdir()
    write_json(root / "child" / START_FROM, {"path": "x"})
    with pytest.raises(ValueError, match=r"start_from.json cannot be read"):
        preflight(config)


def test_an_export_is_a_source_with_its_own_past(root: Path) -> None:
    export = root / "export"
    shutil.copytree(root / "pipeline", export)
    write_json(export / PROVENANCE, {"run": "RUN/step-7", "step": 7, "weights": "ema", "from": "hub"})
    start = find(root, f"start_from={export}")
    assert start is not None
    assert start.record["parent"] == parent_of_pipeline(export)
    assert (start.record["step"], start.told) == (7, str(export))


def test_raw_or_averaged_is_part_of_the_run_and_the_path_is_not(root: Path) -> None:
    base = training_identity(load_config(["start_from=a"]))
    assert training_identity(load_config(["start_from=b"])) == base
    assert training_identity(load_config(["start_from.path=a", "start_from.weights=raw"])) != base


@pytest.mark.parametrize(
    ("owner", "name", "word"),
    [
        (Path, "is_file", "model_index"),
        (Path, "read_text", "certificate"),
        (Path, "read_bytes", "manifest"),
    ],
)
def test_a_source_that_is_away_for_a_moment_has_not_gone(
    root: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, word: str
) -> None:
    write_checkpoint(root, "parent", 2)
    write_checkpoint(root, "child", 1)
    words = f"start_from={root / 'parent'}"
    first = find(root, words, "train.fresh=true")
    assert first is not None
    real, left = getattr(owner, name), [2]

    def stale(path: Path, *args: Any, **options: Any) -> Any:
        if word in path.name and "parent" in str(path) and left[0] > 0:
            left[0] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(owner, name, stale)
    monkeypatch.setattr(patience, "PAUSES_S", (0.0,) * 3)
    again = find(root, words, recorded=first.record)
    assert again is not None
    assert again.source is not None
    assert left == [0]
    left[0] = 99
    with pytest.raises(StorageAwayError, match="Stale file handle"):
        find(root, words, recorded=first.record)


def test_a_source_that_one_rank_cannot_see_is_gone_for_all(results: Results) -> None:
    found = results("start_weights")
    assert found["rank 0"] == found["rank 1"]
    assert found["rank 0"]["seen"] == [True, True, 2, ""]
    assert found["rank 0"]["hidden"] == [False, False, 2, "rank 1: no mount"]
    for stage in ("dpo", "grpo"):
        kind, told = found["rank 0"][stage]
        assert kind == "ValueError"
        assert "is gone (rank 1: no mount): restore it, or give where every rank finds it now" in told
