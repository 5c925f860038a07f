"""A run of GRPO is held to the weights of what judges it, and not to where they lie."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_scorers

from consumers.judges import FILE, check_judges, hold_to_judges
from qwenimg_dist.compose import load_config
from qwenimg_dist.config import Config, training_identity


def judged_by(folder: Path, *words: str) -> Config:
    return load_config(["stage=grpo", "reward.weights.clip=1", f"reward.settings.clip.path={folder}", *words])


def test_a_copy_is_the_same_judge_and_other_weights_under_its_path_are_another(tmp_path: Path) -> None:
    run, first, copy = tmp_path / "run", tmp_path / "first", tmp_path / "copy"
    run.mkdir()
    tiny_scorers.save_clip(first, seed=3)
    assert check_judges(judged_by(first), run) == hold_to_judges(judged_by(first), run)
    begun = json.loads((run / FILE).read_text())
    assert begun["clip"].keys() == {"weight", "model"}

    shutil.copytree(first, copy)
    (copy / "README.md").write_text("what a clone of the hub's repository has besides")
    (copy / "pytorch_model.bin").write_bytes(b"the same weights, pickled")
    again = judged_by(copy, "reward.settings.clip.batch_size=2", "reward.settings.clip.revision=abc")
    assert hold_to_judges(again, run) == begun
    assert training_identity(again) == training_identity(judged_by(first))

    shutil.rmtree(first)
    tiny_scorers.save_clip(first, seed=4)
    with pytest.raises(ValueError, match=r"another judge: clip\.model is .* there, .* here\. .*train\.fresh=true"):
        check_judges(judged_by(first), run)
    with pytest.raises(ValueError, match="another judge"):
        hold_to_judges(judged_by(first, "train.fresh=true"), run)  # what is there then is a fresh run's own
    assert check_judges(judged_by(first, "train.fresh=true"), run) != begun
    with pytest.raises(ValueError, match=r"clip\.weight is 1\.0 there, 2\.0 here"):
        check_judges(judged_by(copy, "reward.weights.clip=2"), run)
    assert json.loads((run / FILE).read_text()) == begun


def test_stages_without_rewards_and_injected_ones_have_no_record(tmp_path: Path) -> None:
    assert hold_to_judges(load_config(["stage=sft", "reward.weights.shapes=1"]), tmp_path) == {}
    assert hold_to_judges(load_config(["stage=grpo"]), tmp_path) == {}
    assert not (tmp_path / FILE).exists()
    assert hold_to_judges(load_config(["stage=grpo", "reward.weights.shapes=1"]), tmp_path) == {"shapes": {"weight": 1}}


def test_a_record_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("[")
    with pytest.raises(ValueError, match=r"rewards\.json cannot be read .* restore it"):
        check_judges(load_config(["stage=grpo", "reward.weights.shapes=1"]), tmp_path)
