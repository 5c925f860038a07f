"""Finetuning as its stage file says: on the selected rows alone, by their weights, from raw or averaged parameters, on
a schedule of its own; killed in the middle and gone on with, it is the same run."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path

import pytest
from fake_dataset import make_rows
from small_run import Ended, lines, numbers, overrides, run_gang, write_input

from consumers.checkpoint_files import list_checkpoints, read_certificate
from consumers.checkpoint_reader import open_checkpoint

STEPS = 8
SFT = (
    "stage=sft",
    "engine.precision=fp32",
    "optim.lr=1e-3",
    "optim.warmup_steps=2",
    f"train.steps={STEPS}",
    "checkpoint.every=2",
    "checkpoint.keep=10",
    "checkpoint.certify=off",
    "evaluate.every=4",
    "evaluate.guard=warn",
    "data.held_out=0.2",
    "data.where='sharpness < 3 or sharpness >= 4'",
    "data.weights={'sharpness >= 4': 3}",
)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`: four steps of pretraining, with raw and averaged weights that differ."""
    folder = tmp_path_factory.mktemp("sft")
    write_input(folder)
    base = ["engine.precision=fp32", "checkpoint.every=4", "train.stop_after=4", "optim.ema_decay=0.9"]
    ended = run_gang(["-m", "consumers", *overrides(folder, "base", *base)], 1, folder / "logs-base", timeout_s=900)
    assert ended[0].code == 0, ended[0].output[-3000:]
    return folder


def train(root: Path, run: str, *extra: str, log: str = "", faults: Path | None = None) -> list[Ended]:
    env = {"QWENIMG_DIST_FAULT_DIR": str(faults)} if faults else {}
    words = overrides(root, run, *SFT, f"start_from.path={root / 'base'}", *extra)
    return run_gang(["-m", "consumers", *words], 2, root / f"logs-{run}{log}", env=env, timeout_s=900)


@pytest.fixture(scope="module")
def reference(root: Path) -> Path:
    ended = train(root, "reference")
    assert [end.code for end in ended] == [0, 0], ended[0].output[-3000:]
    return root / "reference"


def test_only_selected_rows_are_drawn_as_often_as_their_weight_says(reference: Path) -> None:
    rows = {row.key: row.score for row in make_rows(60, captions=2, sizes=((256, 256), (256, 128), (128, 256)))}
    drawn = Counter(key for line in lines(reference / "samples.jsonl") for key in line["keys"])  # type: ignore[attr-defined]
    scores = [rows[key] for key in drawn]
    assert scores
    assert all(score < 3 or score >= 4 for score in scores)
    plan = json.loads((reference / "plan.json").read_text())
    assert plan["phases"]
    heavy = sum(count for key, count in drawn.items() if rows[key] >= 4)
    # 20 rows of weight 3 and 30 of weight 1: two thirds of the draws, but for held-out rows and fill slots.
    assert 0.5 < heavy / drawn.total() < 0.82


def test_the_stage_has_its_own_schedule_average_and_validation(reference: Path) -> None:
    log = lines(reference / "metrics.jsonl")
    rates = [float(line["train/lr"]) for line in log]  # type: ignore[arg-type]
    assert rates[0] == pytest.approx(5e-4)
    assert rates[1] == max(rates)
    assert rates[-1] == pytest.approx(0.0, abs=1e-9)  # a cosine down to nought, as conf/stage/sft.yaml says
    evaluated = [line for line in log if "eval/loss" in line]
    assert [line["step"] for line in evaluated] == [4, 8]
    assert {"eval/raw/loss", "eval/start_loss", "eval/guard"} <= evaluated[0].keys()
    told = read_certificate(list_checkpoints(reference)[-1].path)
    assert told is not None
    assert (told["lineage"]["stage"], told["lineage"]["parent"]["lineage"]["stage"]) == ("sft", "pretrain")


def test_raw_and_averaged_starts_differ_and_each_is_what_it_says(root: Path, reference: Path) -> None:
    ended = train(root, "raw", "start_from.weights=raw", "train.stop_after=2")
    assert [end.code for end in ended] == [0, 0], ended[0].output[-3000:]
    first = {run: lines(root / run / "metrics.jsonl")[0]["train/loss"] for run in ("raw", "reference")}
    assert first["raw"] != first["reference"]
    for run, weights in (("raw", "raw"), ("reference", "ema")):
        record = json.loads((root / run / "start_from.json").read_text())
        assert (record["weights"], record["step"]) == (weights, 4)


def test_killed_in_the_middle_is_the_same_run(root: Path, reference: Path) -> None:
    faults = root / "faults"
    faults.mkdir()
    (faults / "train_step@5").touch()  # between two checkpoints
    ended = train(root, "killed", log="-1", faults=faults)
    assert -signal.SIGKILL in [end.code for end in ended]
    assert [info.step for info in list_checkpoints(root / "killed")] == [2, 4]
    ended = train(root, "killed", log="-2")
    assert [end.code for end in ended] == [0, 0], ended[0].output[-3000:]
    assert "resuming from step 4" in ended[0].output
    assert numbers(root / "killed") == numbers(reference)
    mine, theirs = open_checkpoint(root / "killed", STEPS), open_checkpoint(reference, STEPS)
    assert all(bool((mine.read(name, "ema") == theirs.read(name, "ema")).all()) for name in mine.names)
    samples = [[line["keys"] for line in lines(run / "samples.jsonl")] for run in (root / "killed", reference)]
    assert samples[0] == samples[1]
