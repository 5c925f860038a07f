"""GRPO on real ZeRO-3 ranks: in pieces, killed wherever it may be, and on another number of ranks it is the same run. A
reward that hangs, raises or dies on one rank costs that rank's pictures their rewards and nobody the training."""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any, Literal

import pytest
from fake_dataset import FakeProducer, make_rows
from grpo_gang import SCRIPT
from PIL import Image
from safetensors.torch import load_file
from small_run import Ended, lines, overrides, run_gang, write_input

from consumers.checkpoint import list_checkpoints, open_checkpoint
from consumers.run_directory import facets_of
from qwenimg_dist.compose import load_config
from qwenimg_dist.models.tiny import tiny_pipeline_dir

STEPS = 4
GRPO = (
    "stage=grpo",
    "engine.precision=fp32",
    "optim.lr=1e-3",
    "optim.ema_decay=0.9",
    "objective.group_size=3",
    "objective.num_steps=4",
    "objective.window_within=3",
    "objective.guidance=2",
    "objective.inner_updates=2",
    "objective.kl_weight=0.05",
    "objective.group_grid_every=2",
    "curriculum.phases.low.share=null",
    "curriculum.phases.low.steps=4",
    "~curriculum.phases.high",
    "curriculum.phases.low.global_batch=3",
    "curriculum.phases.low.micro_batch_tokens=120",
    f"train.steps={STEPS}",
    "checkpoint.every=2",
    "checkpoint.certify=off",
    "evaluate.every=2",
    "evaluate.weights=raw",
    "evaluate.guard=warn",
)
TIMES = ("train/rollout_s", "train/reward_s", "train/reward_busy_s", "train/update_s")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def words(root: Path, run: str, *extra: str) -> list[str]:
    given = [word for word in overrides(root, run) if not word.startswith(("curriculum.", "data.path", "train.steps"))]
    return [*given, *GRPO, f"data.path={root / 'prompts'}", f"evaluate.data_path={root / 'data'}", *extra]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with a VAE that decodes, images in `data`, prompts in `prompts`; and what two ranks did with them."""
    folder = tmp_path_factory.mktemp("grpo")
    write_input(folder)
    for name in ("vae", "scheduler"):
        shutil.rmtree(folder / "pipeline" / name)
        shutil.copytree(tiny_pipeline_dir() / name, folder / "pipeline" / name)
    shutil.rmtree(folder / "data")
    images = FakeProducer(folder / "data", unit_size=16, resolutions=(64,))
    plain = load_config([f"model.path={folder / 'pipeline'}", "~curriculum.phases.high"])
    images.facets = facets_of(plain, folder / "pipeline")
    images.add(make_rows(60))
    images.produce(complete=True)
    prompts = FakeProducer(folder / "prompts", unit_size=16, resolutions=(64,), prompts=True)
    prompts.facets = facets_of(load_config(words(folder, "x")), folder / "pipeline")
    prompts.add(make_rows(20))
    prompts.produce(complete=True)
    gang(
        folder,
        2,
        {"name": "whole"},
        {"name": "pieces", "extra": ["train.stop_after=2"]},
        {"name": "pieces"},
        {"name": "hang", "fault": "hang", "extra": ["objective.reward_timeout_s=1"]},
        {"name": "raise", "fault": "raise"},
        {"name": "exit", "fault": "exit"},
        {"name": "nan", "fault": "nan"},
        {"name": "all", "fault": "all", "extra": ["objective.max_failed_rounds=2"]},
        {"name": "second", "fault": "second", "extra": ["train.stop_after=2", "checkpoint.every=1"]},
        {"name": "gradient", "fault": "gradient", "extra": ["train.stop_after=1"]},
        {"name": "shapes", "extra": ["objective.aspects=[1:1,2:1]"]},
        {"name": "one", "extra": ["train.stop_after=1", "objective.inner_updates=1"]},
    )
    return folder


def gang(root: Path, world: int, *runs: dict[str, Any]) -> None:
    ended = start(root, world, f"out-{world}", *runs)
    assert [end.code for end in ended] == [0] * world, "\n".join(end.output[-4000:] for end in ended)


def start(root: Path, world: int, name: str, *runs: dict[str, Any], faults: Path | None = None) -> list[Ended]:
    """The runs by one gang, whose results and logs come into the folder of that name."""
    out = root / name
    out.mkdir()
    listed = [
        {
            "name": run["name"],
            "fault": run.get("fault", ""),
            "overrides": words(root, run["name"], *run.get("extra", [])),
        }
        for run in runs
    ]
    (out / "runs.json").write_text(json.dumps(listed))
    env = {"QWENIMG_DIST_FAULT_DIR": str(faults)} if faults else {}
    return run_gang([SCRIPT, str(out), str(out / "runs.json")], world, out / "logs", env=env, timeout_s=1500)


def numbers(root: Path, run: str) -> list[dict[str, Any]]:
    """What must not depend on time."""
    kept = []
    for line in lines(root / run / "metrics.jsonl"):
        kept.append(
            {
                name: value
                for name, value in line.items()
                if name.startswith(("eval/", "reward/")) or name in ("step", *COMPARED)
            }
        )
    return kept


COMPARED = (
    "train/loss",
    "train/ratio",
    "train/ratio_of_first_update",
    "train/kl",
    "train/clip_fraction",
    "train/grad_norm",
    "train/advantage_abs",
)


def test_a_round_is_logged_whole_and_begins_on_its_own_policy(root: Path) -> None:
    log = lines(root / "whole" / "metrics.jsonl")
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    for line in log:
        assert line["train/ratio_of_first_update"] == pytest.approx(1.0, abs=1e-6)
        assert line["train/ratio_error_of_first_update"] == pytest.approx(0.0, abs=1e-6)
        assert float(line["train/ratio_error"]) > 1e-6  # type: ignore[arg-type]
        assert line["reward/groups"] in (2, 3)  # the epoch's last batch is filled
        assert line["reward/failures"] == line["reward/timeouts"] == line["reward/without"] == 0
        total = float(line["reward/brightness"]) + 0.5 * float(line["reward/odd"])  # type: ignore[arg-type]
        assert line["reward/total"] == pytest.approx(total)
        assert all(float(line[name]) >= 0 for name in TIMES)  # type: ignore[arg-type]
    assert float(log[0]["train/kl_of_first_update"]) == pytest.approx(0, abs=1e-9)  # type: ignore[arg-type]
    assert float(log[-1]["train/kl"]) > 0  # type: ignore[arg-type]
    assert log[-1]["train/images"] == 3 * sum(int(line["reward/groups"]) for line in log)  # type: ignore[call-overload]
    assert "eval/loss" in log[1]
    assert "eval/start_loss" in log[1]
    grids = sorted(file.name for file in (root / "whole" / "samples").iterdir())
    assert grids == ["step-00000002-groups.png", "step-00000004-groups.png"]


def same_weights(root: Path, one: str, other: str, step: int, which: Literal["master", "ema"] = "ema") -> bool:
    mine, theirs = (open_checkpoint(root / run, step) for run in (one, other))
    return all(bool((mine.read(name, which) == theirs.read(name, which)).all()) for name in mine.names)


def test_in_pieces_it_is_the_same_run_to_the_bit(root: Path) -> None:
    assert numbers(root, "pieces") == numbers(root, "whole")
    assert same_weights(root, "pieces", "whole", STEPS)
    assert not same_weights(root, "hang", "whole", STEPS)


def test_killed_in_a_rollout_between_updates_and_in_a_save_it_is_the_same_run(root: Path) -> None:
    """A rank dies with some of the second step's pictures drawn (before there is a checkpoint), then between the third
    step's two updates, then while the last checkpoint is written."""
    faults = root / "faults"
    faults.mkdir()
    # A rank draws three micro-batches per step: the fifth lies in the middle of the second step.
    kills = [("rollout@5", 1, []), ("update@5", 2, [2]), ("checkpoint_write@1", 4, [2])]
    for number, (token, steps, saved) in enumerate(kills):
        (faults / token).touch()
        ended = start(root, 2, f"killed-{number}", {"name": "killed"}, faults=faults)
        assert -signal.SIGKILL in [end.code for end in ended], ended[0].output[-3000:]
        assert not list(faults.iterdir())
        assert lines(root / "killed" / "metrics.jsonl")[-1]["step"] == steps
        assert [info.step for info in list_checkpoints(root / "killed")] == saved
    ended = start(root, 2, "killed-not", {"name": "killed"})
    assert [end.code for end in ended] == [0, 0], ended[0].output[-3000:]
    assert "resuming from step 2" in ended[0].output
    assert numbers(root, "killed") == numbers(root, "whole")
    assert same_weights(root, "killed", "whole", STEPS)
    assert same_weights(root, "killed", "whole", STEPS, "master")
    grids = [sorted(file.name for file in (root / run / "samples").iterdir()) for run in ("killed", "whole")]
    assert grids[0] == grids[1]


@pytest.mark.parametrize("run", ["second", "gradient"])
def test_an_update_that_is_not_finite_after_one_that_was_made_is_told_as_what_it_is(root: Path, run: str) -> None:
    whole, told = lines(root / "whole" / "metrics.jsonl")[0], lines(root / run / "metrics.jsonl")[0]
    assert (whole["train/updates"], told["train/updates"]) == (2, 1)
    assert told["train/skipped_steps"] == 0  # the first was made
    for name in ("train/loss", "train/ratio_error"):
        assert told[name] == told[f"{name}_of_first_update"] == whole[f"{name}_of_first_update"], name
    assert told["train/grad_norm"] == lines(root / "one" / "metrics.jsonl")[0]["train/grad_norm"]
    assert same_weights(root, run, "one", 1, "master")
    assert same_weights(root, run, "one", 1, "ema")
    said = (root / "out-2" / "logs" / "rank-0.log").read_text()
    assert said.count("step 1: update 2 of 2 is not finite and was left out on all ranks") == 2
    faults = root / run / "faults"
    if run == "gradient":
        assert json.loads((faults / "step-00000001-gradient.json").read_text())["update"] == 2
        return
    dumped = faults / "step-00000001-rank-00001"
    assert json.loads((dumped / "batch.json").read_text())["update"] == 2
    tensors = load_file(dumped / "batch.safetensors")
    assert tensors["rollout_x"].shape == tensors["latents"].shape
    assert not bool((tensors["rollout_x"] == tensors["rollout_x_next"]).all())
    after = lines(root / run / "metrics.jsonl")[1]
    assert after["train/updates"] == 2
    assert math.isfinite(float(after["train/loss"]))  # type: ignore[arg-type]


def test_one_rank_does_what_two_do(root: Path) -> None:
    gang(root, 1, {"name": "alone"})
    for mine, theirs in zip(numbers(root, "alone"), numbers(root, "whole"), strict=True):
        for name in (
            "train/loss",
            "train/ratio",
            "train/kl",
            "reward/total",
            "reward/group_std",
            "train/advantage_abs",
        ):
            assert mine[name] == pytest.approx(theirs[name], rel=2e-3, abs=2e-5), (mine["step"], name)


def test_steps_have_their_shapes_in_turn(root: Path) -> None:
    log = lines(root / "shapes" / "metrics.jsonl")
    shapes = [(line["train/bucket_width"], line["train/bucket_height"]) for line in log]
    assert shapes == [(96, 48), (64, 64), (96, 48), (64, 64)]
    for line in log:
        assert line["train/ratio_of_first_update"] == pytest.approx(1.0, abs=1e-6)
        assert line["reward/without"] == 0
    grids = [Image.open(file) for file in sorted((root / "shapes" / "samples").iterdir())]
    assert len(grids) == 2


@pytest.mark.parametrize(("run", "counted"), [("hang", "timeouts"), ("raise", "failures"), ("exit", "timeouts")])
def test_a_reward_that_fails_on_one_rank_costs_its_pictures_alone(root: Path, run: str, counted: str) -> None:
    told = json.loads((root / "out-2" / f"{run}.json").read_text())
    assert [one["outcome"] for one in told] == ["complete", "complete"]
    assert max(one["seconds"] for one in told) < 120
    log = lines(root / run / "metrics.jsonl")
    assert log[0][f"reward/{counted}"] == 0
    assert float(log[-1][f"reward/{counted}"]) > 0  # type: ignore[arg-type]
    assert float(log[-1]["reward/without"]) == 4  # type: ignore[arg-type]
    assert all(math.isfinite(float(line["train/loss"])) for line in log)  # type: ignore[arg-type]
    log_of_ranks = (root / "out-2" / "logs" / "rank-0.log").read_text()
    assert "rewards: rank 1:" in log_of_ranks


def test_a_nan_leaves_its_group_and_all_nan_end_the_run(root: Path) -> None:
    log = lines(root / "nan" / "metrics.jsonl")
    assert len(log) == STEPS
    assert all(float(line["reward/without"]) > 0 for line in log)  # type: ignore[arg-type]
    assert all(math.isfinite(float(line["train/loss"])) for line in log)  # type: ignore[arg-type]
    told = json.loads((root / "out-2" / "all.json").read_text())
    for one in told:
        assert "no picture had a reward in 2 steps in a row" in one["error"]
    first = lines(root / "all" / "metrics.jsonl")
    assert len(first) == 1
    assert first[0]["train/grad_norm"] == 0.0
