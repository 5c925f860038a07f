"""`train stage=grpo` with rewards in Ray actors, of which one dies, gives the numbers that a process beside the rank
gives."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_scorers
from fake_dataset import FakeProducer, make_rows
from produce_command import environment
from small_run import lines, overrides, write_pipeline

from consumers.checkpoint_files import list_checkpoints, read_certificate
from consumers.run_directory import facets_of
from qwenimg_dist.compose import load_config
from qwenimg_dist.models.tiny import tiny_pipeline_dir

GRPO = (
    "stage=grpo",
    "engine.precision=fp32",
    "optim.lr=1e-3",
    "optim.ema_decay=0",
    "objective.group_size=3",
    "objective.num_steps=2",
    "objective.window=1",
    "objective.window_within=1",
    "objective.guidance=1",
    "objective.group_grid_every=0",
    "curriculum.phases.low.share=null",
    "curriculum.phases.low.steps=2",
    "~curriculum.phases.high",
    "curriculum.phases.low.global_batch=2",
    "curriculum.phases.low.micro_batch_tokens=120",
    "train.steps=2",
    "checkpoint.every=2",
    "checkpoint.certify=off",
    "evaluate.every=0",
    "evaluate.weights=raw",
    "reward.weights.clip=2",
    "cluster.ranks=1",
)


def words(root: Path, run: str, *extra: str) -> list[str]:
    given = [word for word in overrides(root, run) if not word.startswith(("curriculum.", "data.path", "train.steps"))]
    clip = f"reward.settings.clip.path={root / 'clip'}"
    return [*given, *GRPO, f"data.path={root / 'prompts'}", f"evaluate.data_path={root / 'data'}", clip, *extra]


def command(root: Path, run: str, *extra: str, fault_dir: Path | None = None) -> subprocess.CompletedProcess[str]:
    given = [sys.executable, "-m", "qwenimg_dist", "train", *words(root, run, *extra)]
    return subprocess.run(given, env=environment(fault_dir), capture_output=True, text=True, timeout=600, check=False)


def train(root: Path, run: str, *extra: str, fault_dir: Path | None = None) -> list[dict[str, Any]]:
    done = command(root, run, *extra, fault_dir=fault_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    return lines(root / run / "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_same_numbers_come_from_actors_and_from_beside_the_rank(tmp_path: Path) -> None:
    root = tmp_path
    write_pipeline(root / "pipeline")
    for name in ("vae", "scheduler"):
        shutil.rmtree(root / "pipeline" / name)
        shutil.copytree(tiny_pipeline_dir() / name, root / "pipeline" / name)
    tiny_scorers.save_clip(root / "clip", seed=3)
    plain = load_config([f"model.path={root / 'pipeline'}", "~curriculum.phases.high"])
    for name, prompts in (("data", False), ("prompts", True)):
        producer = FakeProducer(root / name, unit_size=16, resolutions=(64,), prompts=prompts)
        given = load_config(words(root, "x")) if prompts else plain
        producer.facets = facets_of(given, root / "pipeline")
        producer.add(make_rows(20))
        producer.produce(complete=True)
    faults = root / "faults"
    faults.mkdir()
    (faults / "reward_actor@1").touch()  # the first actor dies at its first pictures, and the other one judges them
    actors = ("cluster.reward_actors=2", "cluster.cpus_per_reward_actor=0.5")
    by_actors = train(root, "actors", *actors, fault_dir=faults)
    assert (root / "faults.log").read_text().startswith("kill at reward_actor, pass 1")
    beside = train(root, "beside")
    assert len(by_actors) == len(beside) == 2
    for mine, theirs in zip(by_actors, beside, strict=True):
        assert mine["reward/without"] == mine["reward/failures"] == mine["reward/timeouts"] == 0
        assert mine["reward/total"] == pytest.approx(2 * mine["reward/clip"])
        for name in ("reward/clip", "reward/group_std", "train/grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name
    assert json.dumps(by_actors[0]["reward/clip"]) != json.dumps(by_actors[1]["reward/clip"])

    # Both runs are held to the judge's weights: moved they are the same, others in their place are not.
    held = [json.loads((root / run / "rewards.json").read_text()) for run in ("actors", "beside")]
    certificate = read_certificate(list_checkpoints(root / "beside")[-1].path)
    assert certificate is not None
    assert held[0] == held[1] == certificate["judges"]
    shutil.move(root / "clip", root / "moved")
    assert command(root, "beside", f"reward.settings.clip.path={root / 'moved'}").returncode == 0
    tiny_scorers.save_clip(root / "clip", seed=4)
    refused = command(root, "beside")
    assert refused.returncode == 2
    assert "was begun with another judge: clip.model is" in refused.stderr
