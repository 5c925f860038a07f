"""The config of a run, with a command's overrides on top: those that say how to look, not those of what it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from qwenimg_dist.compose import ConfigError, load_config
from qwenimg_dist.config_of_run import config_for_drawing, config_for_eval, config_of_run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    words = ["stage=dpo", "data.path=PAIRS", "optim.lr=3e-4", "sample.num_steps=7", "evaluate.num_samples=5"]
    tree = load_config(words).model_dump(mode="json")
    del tree["eval"]  # of a version that did not know it
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def test_what_is_named_is_taken_and_all_else_is_the_run_s(run_dir: Path) -> None:
    words = ["data.path=OTHER", "evaluate.seed=9", "cluster=node_8gpu", "eval.against=X", "objective=flow_matching"]
    config = config_of_run(run_dir, words)
    assert (config.stage, config.optim.lr) == ("dpo", 3e-4)
    assert (config.data.path, config.data.held_out) == ("OTHER", load_config().data.held_out)
    assert (config.evaluate.seed, config.evaluate.num_samples) == (9, 5)
    assert (config.cluster.ranks, config.cluster.device) == (8, "cuda")
    assert (config.eval.against.path, config.sample.num_steps) == ("X", 7)
    assert config.objective.kind == "flow_matching"


def test_the_model_s_group_named_again_leaves_where_the_run_found_it(tmp_path: Path) -> None:
    words = ["model=qwen_image_2512", "model.path=/models/mine"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(load_config(words).model_dump(mode="json")))
    assert config_of_run(tmp_path, ["model=qwen_image_2512"]).model.path == "/models/mine"
    assert config_of_run(tmp_path, ["model=qwen_image_2512", "model.path=/moved"]).model.path == "/moved"
    with pytest.raises(ConfigError, match="has model=qwen_image_2512: leave it out"):
        config_of_run(tmp_path, ["model=tiny"])


def test_what_the_run_is_stays(run_dir: Path) -> None:
    for word in ("stage=sft", "optim.lr=1", "curriculum.phases.low.global_batch=3", "train.steps=9"):
        with pytest.raises(ConfigError, match=r"is that of the run in .*: leave it out"):
            config_of_run(run_dir, [word])
    with pytest.raises(ConfigError, match="did you mean"):
        config_of_run(run_dir, ["evaluate.sed=9"])
    with pytest.raises(ValueError, match="not a run directory"):
        config_of_run(run_dir / "checkpoints", [])
    (run_dir / "config.yaml").write_text("[1")
    with pytest.raises(ValueError, match="cannot be read"):
        config_of_run(run_dir, [])


def test_the_run_is_found_from_a_checkpoint_and_from_an_export(run_dir: Path, tmp_path: Path) -> None:
    checkpoint = run_dir / "checkpoints" / "step-00000003"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text("{}")
    export = tmp_path / "export"
    export.mkdir()
    (export / "model_index.json").write_text("{}")
    assert config_for_eval([f"eval.path={checkpoint}"]).stage == "dpo"
    assert config_for_eval([f"run.path={run_dir}"]).stage == "dpo"
    assert config_for_eval([f"eval.path={export}"]).stage == "pretrain"  # nothing is known of it
    (export / "certificate.json").write_text(json.dumps({"run": {"path": str(run_dir)}}))
    assert config_for_eval([f"eval.path={export}"]).stage == "dpo"


def test_what_draws_from_a_run_draws_as_it_does_here_and_now(tmp_path: Path) -> None:
    words = ["model=qwen_image_2512", "stage=sft", "cluster=nodes_8x8", "export.path=OUT", "sample.num_steps=33"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(load_config(words).model_dump(mode="json")))
    config = config_for_drawing([f"run.path={tmp_path}", "pairs.num_seeds=3", "reward.weights.ocr=2"])
    assert (config.model.name, max(config.resolutions), config.sample.num_steps) == ("qwen_image_2512", 1328, 33)
    assert (config.run.path, config.pairs.num_seeds, config.reward.weights["ocr"]) == (str(tmp_path), 3, 2)
    assert (config.cluster.device, config.export.path) == ("cpu", None)
    assert config_for_drawing([f"run.path={tmp_path}", "cluster=node_8gpu"]).cluster.device == "cuda"
    exported = config_for_drawing([f"run.path={tmp_path}", "sample.path=PIPELINE"])
    assert (exported.model.name, exported.sample.path) == ("tiny", "PIPELINE")
