"""Saved and loaded is the same, on any number of ranks; what is not whole is never loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gang_checks import SCRIPT
from small_run import run_gang

from consumers.checkpoint import CheckpointError, list_checkpoints, open_checkpoint, verify_checkpoint
from qwenimg_dist.models.safetensors_directory import SafetensorsDirectory

Results = Callable[[str], dict[str, Any]]


def test_same_ranks_resume_bitwise(results: Results) -> None:
    found = results("save")
    assert found["fresh"]
    assert found["step"] == 4
    assert found["note"] == "kept"
    assert found["same"]
    assert found["same_later"]


def test_damaged_checkpoints_are_skipped_and_named(results: Results) -> None:
    found = results("damage")
    assert found["step"] == 1
    flipped, cut, uncommitted = found["skipped"]
    assert "step 4" in flipped
    assert "sha256" in flipped
    assert "step 3" in cut
    assert "the manifest says" in cut
    assert "step 2" in uncommitted
    assert "never committed" in uncommitted


def test_a_rank_that_cannot_write_fails_all_and_shows_nothing(results: Results) -> None:
    found = results("damage")
    assert "step 5 was not committed: rank 1: [Errno 27] File too large" in found["write_error"]
    assert "GB in" in found["write_error"]
    assert found["visible"] == [f"step-{step:08d}" for step in (1, 2, 3, 4)]


def test_storage_that_is_away_from_one_rank_in_a_save_is_raised_by_all_for_a_new_start(results: Results) -> None:
    found = results("damage")
    told, other = found["away_error"]
    assert told == other
    assert told.startswith("checkpoint of step 5 was not committed: rank 1: [Errno 116] Stale file handle")
    assert "free" not in told  # nobody needs to make room
    assert all(not name.startswith("step-00000005") for name in found["visible"])


def test_what_one_rank_alone_cannot_read_is_refused_by_all(results: Results) -> None:
    assert results("damage")["read_errors"] == ["the mount is gone"] * 2  # as rank 0 is told


def test_each_kind_of_damage_on_each_kind_of_file_is_found_and_said(damage_results: Results) -> None:
    found = damage_results("each_damage")
    assert found.pop("restored") == [2]
    ranks = {f"rank-0000{rank}-of-00002.safetensors" for rank in (0, 1)}
    damages = {"missing", "empty", "cut", "longer", "flipped", "torn"}
    files = {"manifest.json", "state.json", *ranks}
    assert found.keys() == {f"{file} {damage}" for file in files for damage in damages}
    for what, (step, *skipped) in found.items():
        assert step == 1, what
        assert len(skipped) == 1
        assert skipped[0].startswith("step 2: ")
        assert what.split()[0] in skipped[0], what


def test_no_flipped_bit_of_a_manifest_goes_unnoticed(results: Results, gang_out: Path, tmp_path: Path) -> None:
    results("save")
    path = tmp_path / "step-00000004"
    shutil.copytree(gang_out / "run" / "checkpoints" / path.name, path)
    data = (path / "manifest.json").read_bytes()
    sound = json.loads(data)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1
        (path / "manifest.json").write_bytes(damaged)
        if not verify_checkpoint(path):
            assert json.loads(bytes(damaged)) == sound


def test_a_full_disk_is_survived(damage_results: Results, damage_out: Path) -> None:
    found = damage_results("full_disk")
    if not found["mounted"]:
        pytest.skip("no small file system can be mounted here")
    assert found["first"] is None
    for words in ("step 2 was not committed", "No space left on device", "GB in", "Make room"):
        assert words in found["filled_while_writing"]
    assert found["after_filling"] == ["step-00000001"]
    for words in ("step 2 was not begun", "the disk is too full", "GB are free", str(damage_out / "small" / "run")):
        assert words in found["full_before"]
    assert found["unchanged"]
    assert found["loaded"] == [1]
    assert found["room_again"] is None
    assert "step 4 was not committed" in found["filled_in_background"]
    assert "No space left on device" in found["filled_in_background"]
    assert found["left"] == [[3, None]]


def test_the_last_ones_are_kept_and_every_third_for_good(damage_results: Results) -> None:
    assert damage_results("retention")["kept"] == [3, 6, 7, 8]


def test_groups_are_those_of_the_names(damage_results: Results) -> None:
    found = damage_results("retention")
    assert found["decays"] == {name: {"decay": 0.1, "no_decay": 0.0}[group] for name, group in found["groups"].items()}
    assert set(found["groups"].values()) == {"decay", "no_decay"}


def test_none_valid_is_an_error_that_names_each(results: Results) -> None:
    message = results("damage")["none_valid"]
    for words in ("none of them valid", "step 1", "step 4", "train.fresh=true"):
        assert words in message


def test_saving_over_an_invalid_one_and_keeping_the_newest(results: Results) -> None:
    assert results("damage")["kept"] == [[4, None]]


def test_what_is_newer_than_the_checkpoint_just_written_is_an_abandoned_future(results: Results) -> None:
    assert results("damage")["kept_of_new_line"] == [[2, None]]


def test_read_without_ranks(results: Results, gang_out: Path, small_input: Path) -> None:
    results("save")
    reader = open_checkpoint(gang_out / "run")
    source = SafetensorsDirectory(small_input / "pipeline" / "transformer")
    assert reader.step == 4
    assert reader.names == source.names
    assert reader.has_ema
    for name in reader.names:
        assert reader.shape(name) == source.shape(name)
        master, average, start = reader.read(name, "master"), reader.read(name, "ema"), source.read(name)
        assert master.shape == start.shape
        assert (master - start).abs().max() < 0.1
        assert (average - start).abs().max() <= (master - start).abs().max() + 1e-6
    part = torch.empty(5)
    reader.read_range_into("proj_out.weight", "master", 3, part)
    assert torch.equal(part, reader.read("proj_out.weight", "master").flatten()[3:8])


def test_unknown_step_and_empty_run(results: Results, gang_out: Path, tmp_path: Path) -> None:
    results("save")
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7 .*there are: 4"):
        open_checkpoint(gang_out / "run", 7)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        open_checkpoint(tmp_path)
    assert list_checkpoints(tmp_path) == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing_file", "manifest", "state"])
def test_verify_sees_every_damage(results: Results, gang_out: Path, tmp_path: Path, damage: str) -> None:
    results("save")
    path = tmp_path / "checkpoints" / "step-00000004"
    shutil.copytree(gang_out / "run" / "checkpoints" / "step-00000004", path)
    assert verify_checkpoint(path) == []
    file = path / "rank-00000-of-00002.safetensors"
    if damage == "flip":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 64
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "missing_file":
        file.unlink()
    elif damage == "manifest":
        manifest = path / "manifest.json"
        manifest.write_text(manifest.read_text()[:-20])
    else:
        (path / "state.json").write_text("{}")
    assert verify_checkpoint(path)
    with pytest.raises(CheckpointError, match="step 4"):
        open_checkpoint(tmp_path, verify=True)
    if damage == "flip":  # only hashing sees it
        assert open_checkpoint(tmp_path).step == 4
    else:
        with pytest.raises(CheckpointError, match="step 4"):
            open_checkpoint(tmp_path)


@pytest.mark.slow
def test_other_numbers_of_ranks_go_on_equally(
    results: Results, gang_out: Path, small_input: Path, tmp_path: Path
) -> None:
    expected = results("save")["losses"]
    shutil.copytree(gang_out / "run", tmp_path / "other")
    found = []
    for world in (1, 4):
        ended = run_gang([SCRIPT, str(small_input / "pipeline"), str(tmp_path), "continue"], world, tmp_path / "logs")
        assert [end.code for end in ended] == [0] * world, ended[0].output[-2000:]
        found += json.loads((tmp_path / "continue.json").read_text())["losses"]
    for (loss, norm), (wanted_loss, wanted_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(wanted_loss, abs=1e-6)
        assert norm == pytest.approx(wanted_norm, abs=1e-5)
    end, wanted = open_checkpoint(tmp_path / "other", 10), open_checkpoint(gang_out / "end", 10)
    assert end.num_ranks == 4
    for name in end.names:
        for which in ("master", "ema"):
            assert torch.allclose(end.read(name, which), wanted.read(name, which), rtol=0, atol=1e-6), name
