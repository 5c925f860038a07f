"""`demo-post`: its commands are valid, each stage starts from the one before, and what is done is not done again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from qwenimg_dist.commands.demo import Step, shown
from qwenimg_dist.commands.demo_post import STAGES, cells_of, plan, write_prompts
from qwenimg_dist.commands.demo_post_report import judge_stage, write_post_report
from qwenimg_dist.commands.main import COMMANDS
from qwenimg_dist.compose import load_config
from qwenimg_dist.demo.shapes import parse, render


def steps_of(root: Path, *words: str) -> list[Step]:
    return plan(load_config(["stage=demo", f"demo.path={root}", *words]), [])


def test_every_command_is_one_that_a_user_could_type(tmp_path: Path) -> None:
    for step in steps_of(tmp_path):
        assert step.args[0] in COMMANDS
        assert shown(step.args).startswith("qwenimg-dist ")
        load_config(step.args[1:])  # raises for a mistyped key


def test_each_stage_starts_from_the_one_before_at_64_px(tmp_path: Path) -> None:
    configs = [load_config(step.args[1:]) for step in steps_of(tmp_path) if step.args[0] == "train"]
    assert [config.stage for config in configs] == ["demo", "sft", "dpo", "grpo"]
    early, *later = configs
    assert early.train.stop_after == 500
    before = early.run.path
    for config in later:
        assert config.start_from.path == before
        assert config.start_from.step == (500 if config.stage == "sft" else None)
        assert {r for phase in config.curriculum.phases for r in phase.resolutions} == {64}
        assert config.evaluate.every == config.train.steps  # validated at its end
        before = config.run.path
    sampled = [step for step in steps_of(tmp_path) if step.args[0] == "sample"]
    assert [step.title.rpartition(" ")[2] for step in sampled] == list(STAGES)
    assert len({tuple(w for w in step.args if "seeds" in w or "prompts_file" in w) for step in sampled}) == 1


def test_it_goes_on_from_the_demo_s_own_checkpoint_where_there_is_one(tmp_path: Path) -> None:
    def early_of(root: Path) -> tuple[str | None, list[bool]]:
        steps = steps_of(root)
        config = load_config(next(step for step in steps if step.args[0] == "train").args[1:])
        return config.run.path, [step.done_if is not None and step.done_if.exists() for step in steps[:2]]

    assert early_of(tmp_path) == (str(tmp_path / "run"), [False, False])
    other = tmp_path / "run" / "checkpoints" / "step-00001000"
    other.mkdir(parents=True)  # a demo with other steps: its run has passed the early one
    assert early_of(tmp_path)[0] == str(tmp_path / "post" / "run-early")
    early = tmp_path / "run" / "checkpoints" / "step-00000500"
    early.mkdir()
    (early / "manifest.json").write_text("{}")
    assert early_of(tmp_path) == (str(tmp_path / "run"), [True, True])


def test_pictures_are_judged_and_reported_stage_by_stage(tmp_path: Path) -> None:
    import numpy as np

    write_prompts(tmp_path / "post")
    prompts = (tmp_path / "post" / "prompts.txt").read_text().splitlines()
    rng = np.random.default_rng(0)
    for stage in STAGES:
        folder = cells_of(tmp_path, stage)
        folder.mkdir(parents=True)
        for index, prompt in enumerate(prompts):
            right = stage == "grpo" or index % 2
            picture = render(parse(prompt), 64, rng) if right else Image.new("RGB", (64, 64), "white")
            picture.save(folder / f"{index:04d}.png")
        Image.new("RGB", (8, 8)).save(tmp_path / "post" / f"{stage}.png")
    judged = {stage: judge_stage(tmp_path, stage) for stage in STAGES}
    assert judged["grpo"].score.both == 1.0
    assert judged["early"].score.both == pytest.approx(0.5)
    assert judged["early"].reward == pytest.approx(judged["grpo"].reward / 2, abs=0.05)
    result = {"verdict": {"line": "BETTER than the other model"}}
    page = write_post_report(tmp_path / "post", judged, json.loads(json.dumps(result)), ["qwenimg-dist x"], 60.0)
    text = page.read_text()
    for word in ("after GRPO on the rule", "BETTER than the other model", "qwenimg-dist x", "50.0%"):
        assert word in text
    assert text.count("data:image/png") == len(STAGES)
