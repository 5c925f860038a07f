"""What a model is compared with: found by its lineage and verified, or given; pinned before any rank starts."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from small_run import overrides
from written_checkpoint import write_checkpoint

from consumers.compare import _open_held_out
from consumers.comparison import pin, plan_comparison
from consumers.hooks import Hooks
from consumers.pictures import Cell
from consumers.ranks import Ranks
from consumers.start_from import open_weights
from qwenimg_dist.compose import load_config
from qwenimg_dist.config import Config, StartFromConfig
from qwenimg_dist.config_of_run import config_for_eval
from qwenimg_dist.models.pipeline import fingerprint_component


@pytest.fixture
def root(small_input: Path, tmp_path: Path) -> Path:
    """`parent` at step 2, and `child` at step 3, which started from the raw weights of that."""
    shutil.copytree(small_input / "pipeline", tmp_path / "pipeline")
    (tmp_path / "data").symlink_to(small_input / "data")
    first = fingerprint_component(tmp_path / "pipeline" / "transformer")
    base = {"stage": "sft", "model": "small", "path": str(tmp_path / "pipeline"), "fingerprint": first, "parent": None}
    parent = write_checkpoint(tmp_path, "parent", 2, lineage=base)
    raw = open_weights(parent, StartFromConfig(weights="raw"))
    lineage = {"stage": "dpo", "model": "small", "path": str(tmp_path / "pipeline"), "fingerprint": raw.fingerprint}
    write_checkpoint(tmp_path, "child", 3, lineage={**lineage, "parent": raw.record["parent"]})
    for run in ("parent", "child"):
        tree = load_config(overrides(tmp_path, run)).model_dump(mode="json")
        (tmp_path / run / "config.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def test_the_ancestor_is_found_step_weights_and_all(root: Path) -> None:
    found = plan_comparison(config_for_eval([f"run.path={root / 'child'}"]))
    start = found.sides["start"]
    assert start.checkpoint == root / "parent" / "checkpoints" / "step-00000002"
    assert start.record["weights"] == "raw"
    assert found.sides["model"].record["weights"] == "ema"
    # And of the first stage: the pipeline's own transformer.
    found = plan_comparison(config_for_eval([f"run.path={root / 'parent'}", "eval.weights=raw"]))
    assert (found.sides["start"].checkpoint, found.sides["start"].record["kind"]) == (None, "export")
    assert found.sides["model"].record["weights"] == "raw"


def test_an_ancestor_that_is_gone_or_was_replaced_is_said_with_the_way_out(root: Path) -> None:
    shutil.rmtree(root / "parent" / "checkpoints")
    words = [f"run.path={root / 'child'}"]
    with pytest.raises(ValueError, match=r"step 3 of .*child .* not found any more .*set eval.against=PATH"):
        plan_comparison(config_for_eval(words))
    write_checkpoint(root, "parent", 2, ranks=2)
    with pytest.raises(ValueError, match=r"step-00000002 holds other weights"):
        plan_comparison(config_for_eval(words))
    found = plan_comparison(config_for_eval([*words, f"eval.against={root / 'parent'}"]))
    assert found.sides["start"].record["weights"] == "ema"


def test_pinned_it_is_the_same_whatever_is_saved_later(root: Path) -> None:
    (root / "prompts.jsonl").write_text('{"prompt": "a red circle", "colour": "red"}\n{"caption": "a sign"}\n')
    words = [f"run.path={root / 'child'}", f"sample.prompts_file={root / 'prompts.jsonl'}", "sample.seeds=[4,5]"]
    pinned = pin(config_for_eval(words))
    write_checkpoint(root, "child", 9, lineage={})
    out = Path(pinned.run.path or "")
    assert out.parent == root / "child" / "eval"
    assert out.name.startswith("step-00000003-ema-")
    assert pin(pinned) == pinned
    (root / "prompts.jsonl").unlink()
    found = plan_comparison(pinned)
    assert found.sides["model"].record["step"] == 3
    assert [(one.text, dict(one.metadata)) for one in found.prompts] == [
        ("a red circle", {"colour": "red"}),
        ("a sign", {}),
    ]
    assert found.cells == [Cell(prompt=p, seed=s) for p in (0, 1) for s in (4, 5)]


def test_prompts_of_the_command_and_of_a_file_stay_as_they_are_the_empty_one_too(root: Path) -> None:
    (root / "prompts.jsonl").write_text('{"prompt": 5, "caption": "a sign"}\n')
    words = [f"run.path={root / 'child'}", "sample.prompts=['',' a cross ']"]
    for more, last in (([], []), ([f"sample.prompts_file={root / 'prompts.jsonl'}"], ["a sign"])):
        found = plan_comparison(pin(config_for_eval([*words, *more])))
        assert [one.text for one in found.prompts] == ["", " a cross ", *last]


def test_held_out_losses_need_nothing_of_what_the_run_trained_on(root: Path) -> None:
    """Its phases' selections and mixes name columns and data sets, and the order it repeated lies in another run."""
    child = f"run.path={root / 'child'}"
    without = classes_of(pin(config_for_eval([child])))
    narrowed = [
        "curriculum.phases.low.where=text_level == 0",
        "+curriculum.phases.high.weights={'theme == \"x\"': 2}",
        "data.weights={'no_such_column > 1': 2}",
        f"data.mix={{photos: {{path: {root / 'gone'}, weight: 1}}, text: {{path: {root / 'gone2'}, weight: 1}}}}",
        "+curriculum.phases.low.mix={photos: 2}",
        f"train.replay_generations={root / 'gone' / 'generations.jsonl'}",
    ]
    tree = load_config([word for word in overrides(root, "child", *narrowed) if not word.startswith("data.path")])
    (root / "child" / "config.yaml").write_text(yaml.safe_dump(tree.model_dump(mode="json")))
    other = [child, f"data.path={root / 'data'}", "data.mix={}", f"eval.out={root / 'out'}"]
    assert classes_of(pin(config_for_eval(other))) == without
    assert without[64]


def classes_of(config: Config) -> dict[int, tuple[str, ...]]:
    """Keys of the held-out samples, by resolution."""
    alone = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
    with contextlib.ExitStack() as stack:
        held_out = _open_held_out(plan_comparison(config), alone, Hooks(), stack)
    return {resolution: one.keys for resolution, one in held_out.classes.items()}


def test_another_comparison_has_another_folder_and_is_not_mixed_into_one(root: Path) -> None:
    words = [f"eval.path={root / 'child' / 'checkpoints' / 'step-00000003'}"]
    folders = {
        pin(config_for_eval([*words, *more])).run.path for more in ([], ["evaluate.seed=1"], ["eval.weights=raw"])
    }
    assert len(folders) == 3
    assert pin(config_for_eval([*words, "cluster.ranks=1", "eval.shown=3"])).run.path in folders  # no other numbers
    out = f"eval.out={root / 'out'}"
    pin(config_for_eval([*words, out]))
    pin(config_for_eval([*words, out]))
    with pytest.raises(ValueError, match=r"holds another comparison \(it differs in losses\): choose another eval.out"):
        pin(config_for_eval([*words, out, "evaluate.seed=1"]))


def test_what_cannot_be_compared_is_refused_before_anything_starts(root: Path) -> None:
    child = f"run.path={root / 'child'}"
    cases = [
        ([], "nothing to judge: set run.path=RUN"),
        ([f"eval.path={root / 'nowhere'}"], "neither a run directory"),
        ([child, "eval.step=7"], r"no checkpoint of step 7 .*there are: 3"),
        ([child, "eval.against=nowhere"], "eval.against=nowhere: it is neither"),
        ([child, "eval.losses=false"], "nothing to measure: .* no prompts"),
        ([child, "eval.losses=false", "sample.prompts=[a]"], "no reward has a weight"),
    ]
    for words, message in cases:
        with pytest.raises(ValueError, match=message):
            plan_comparison(config_for_eval(words))
    other = root / "other"
    shutil.copytree(root / "pipeline", other)
    (other / "vae" / "config.json").write_text('{"_class_name": "another"}')
    with pytest.raises(ValueError, match=r"other has another vae than .*pipeline"):
        plan_comparison(config_for_eval([child, f"eval.against={other}"]))
    assert not list(root.glob("child/eval*"))
