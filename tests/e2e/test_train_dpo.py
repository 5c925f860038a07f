"""Finetuning and DPO as a chain of stages on real ranks: killed and resumed they are the same run, and a second model
gives what errors computed beforehand give."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
from fake_dataset import FakeProducer, make_rows
from small_run import Ended, lines, numbers, overrides, run_gang, write_input

from consumers.checkpoint import list_checkpoints, open_checkpoint
from consumers.checkpoint_files import read_certificate
from consumers.run_directory import facets_of
from qwenimg_dist.commands.main import main
from qwenimg_dist.compose import load_config

STEPS = 8
DPO = (
    "stage=dpo",
    "engine.precision=fp32",
    "optim.lr=1e-3",
    "optim.ema_decay=0.9",
    "objective.beta=50",
    f"train.steps={STEPS}",
    "checkpoint.every=2",
    "checkpoint.keep=10",
    "checkpoint.certify=off",
    "evaluate.every=4",
    "evaluate.guard=warn",
)
METRICS = ("train/loss", "train/implicit_accuracy", "train/margin", "train/winner_error", "train/loser_error")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in `data`, pairs in `pairs`, and `sft`: two steps of finetuning from the pipeline."""
    folder = tmp_path_factory.mktemp("dpo")
    write_input(folder)
    producer = FakeProducer(folder / "pairs", unit_size=16, resolutions=(64, 128), pairs=True)
    producer.facets = facets_of(load_config(words(folder, "x")), folder / "pipeline")
    producer.add(make_rows(60, sizes=((256, 256), (256, 128), (128, 256))))
    producer.produce(complete=True)
    sft = ["stage=sft", "engine.precision=fp32", "optim.lr=1e-3", "checkpoint.every=2", "train.stop_after=2"]
    ended = run_gang(["-m", "consumers", *overrides(folder, "sft", *sft)], 1, folder / "logs-sft", timeout_s=900)
    assert [end.code for end in ended] == [0], ended[0].output[-3000:]
    return folder


def words(root: Path, run: str, *extra: str) -> list[str]:
    return overrides(root, run, *DPO, f"data.path={root / 'pairs'}", f"start_from={root / 'sft'}", *extra)


def train(root: Path, run: str, *extra: str, ranks: int = 2, log: str = "", faults: Path | None = None) -> list[Ended]:
    env = {"QWENIMG_DIST_FAULT_DIR": str(faults)} if faults else {}
    command = ["-m", "consumers", *words(root, run, *extra)]
    return run_gang(command, ranks, root / f"logs-{run}{log}", env=env, timeout_s=900)


@pytest.fixture(scope="module")
def reference(root: Path) -> Path:
    """The run that nothing happened to, with errors computed beforehand."""
    ended = train(root, "reference")
    assert [end.code for end in ended] == [0, 0], ended[0].output[-3000:]
    return root / "reference"


def test_dpo_starts_at_ln_2_from_the_averaged_weights_and_moves(
    root: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = lines(reference / "metrics.jsonl")
    assert [line["step"] for line in log] == list(range(1, STEPS + 1))
    assert log[0]["train/loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert log[0]["train/winner_error"] == pytest.approx(log[0]["train/winner_reference_error"], rel=1e-6)
    assert any(abs(float(line["train/loss"]) - np.log(2)) > 1e-3 for line in log[1:])  # type: ignore[arg-type]
    evaluated = [line for line in log if "eval/loss" in line]
    assert [line["step"] for line in evaluated] == [4, 8]
    assert all({"eval/pair_accuracy", "eval/pair_margin", "eval/raw/pair_loss"} <= line.keys() for line in evaluated)
    for line in evaluated:  # pictures are noise here: nothing is learned for held-out pairs, but the figures must agree
        accuracy, margin, loss = (float(line[f"eval/pair_{name}"]) for name in ("accuracy", "margin", "loss"))  # type: ignore[arg-type]
        assert 0 <= accuracy <= 1
        assert margin != 0
        assert margin > 0 or loss > np.log(2)  # by Jensen's inequality
        assert accuracy > 0 or margin < 0
    told = read_certificate(list_checkpoints(reference)[-1].path)
    assert told is not None
    parent = told["lineage"]["parent"]
    assert (parent["step"], parent["weights"]) == (2, "ema")
    assert parent["lineage"]["path"] == str(root / "pipeline")
    assert main(["ckpt", "list", f"run.path={reference}"]) == 0
    chain = capsys.readouterr().out.partition("\n\nLineage\n")[2].splitlines()[1:]
    assert [line.split()[:2] for line in chain] == [["this", "run"], ["from", "sft"], ["from", "-"]]
    assert str(root / "sft") in chain[1]
    assert told["lineage"]["fingerprint"] in chain[1]


def test_killed_in_the_pass_and_in_training_is_the_same_run(root: Path, reference: Path) -> None:
    faults = root / "faults"
    faults.mkdir()
    (faults / "reference_block@3").touch()  # a rank dies with two blocks of six committed
    ended = train(root, "killed", log="-1", faults=faults)
    assert -signal.SIGKILL in [end.code for end in ended]
    assert len(list((root / "killed" / "reference").rglob("errors.npy"))) == 0
    # Rank 0 may still commit the third one before it notices the death of the other.
    num_blocks = len(list((root / "killed" / "reference").rglob("block-*.npy")))
    assert num_blocks in (2, 3)
    (faults / "checkpoint_write@2").touch()  # and in the middle of the second checkpoint
    ended = train(root, "killed", log="-2", faults=faults)
    assert -signal.SIGKILL in [end.code for end in ended]
    assert ("reference at 64 px: block 1 of 1" in ended[0].output) == (num_blocks == 2)
    assert [info.step for info in list_checkpoints(root / "killed")] == [2]
    ended = train(root, "killed", log="-3")
    assert [end.code for end in ended] == [0, 0], ended[0].output[-3000:]
    assert "resuming from step 2" in ended[0].output
    assert "computing the reference" not in ended[0].output
    assert_same_run(root / "killed", reference)


def assert_same_run(run: Path, other: Path) -> None:
    """To the bit."""
    assert numbers(run) == numbers(other)
    for name in METRICS:
        mine, theirs = ([line[name] for line in lines(one / "metrics.jsonl")] for one in (run, other))
        assert mine == theirs
    one, another = open_checkpoint(run, STEPS), open_checkpoint(other, STEPS)
    assert all(bool((one.read(name, "ema") == another.read(name, "ema")).all()) for name in one.names)


@pytest.fixture(scope="module")
def online(root: Path) -> Path:
    """The same with a second model, which nothing happened to either."""
    ended = train(root, "online", "objective.reference=online")
    assert [end.code for end in ended] == [0, 0], ended[0].output[-3000:]
    return root / "online"


def test_killed_with_a_second_model_is_the_same_run(root: Path, online: Path) -> None:
    """The second model must be the starting weights again, and not those of the checkpoint."""
    faults = root / "faults-online"
    faults.mkdir()
    (faults / "train_step@5").touch()  # between two checkpoints
    ended = train(root, "killed-online", "objective.reference=online", log="-1", faults=faults)
    assert -signal.SIGKILL in [end.code for end in ended]
    assert [info.step for info in list_checkpoints(root / "killed-online")] == [2, 4]
    ended = train(root, "killed-online", "objective.reference=online", log="-2")
    assert [end.code for end in ended] == [0, 0], ended[0].output[-3000:]
    assert "resuming from step 4" in ended[0].output
    assert_same_run(root / "killed-online", online)


def test_a_second_model_and_another_number_of_ranks_give_the_same(root: Path, reference: Path, online: Path) -> None:
    assert not (online / "reference").exists()
    shared = f"objective.reference_path={root / 'reference' / 'reference'}"
    alone = train(root, "alone", shared, ranks=1)
    assert alone[0].code == 0, alone[0].output[-3000:]
    assert "computing the reference" not in alone[0].output  # found done, by two ranks of another run
    expected = lines(reference / "metrics.jsonl")
    for run in ("online", "alone"):
        for mine, theirs in zip(lines(root / run / "metrics.jsonl"), expected, strict=True):
            for name in METRICS:
                assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=2e-5), (run, mine["step"], name)


def test_lost_errors_and_lost_weights_are_told(root: Path, reference: Path) -> None:
    assert train(root, "lost", "train.stop_after=2")[0].code == 0
    for file in (root / "lost" / "reference").rglob("errors.npy"):
        file.unlink()
    ended = train(root, "lost", log="-again")
    assert {end.code for end in ended} == {2}, ended[0].output[-3000:]
    assert "they are of the starting weights, which step 2 has left" in ended[0].output
    images = train(root, "images", f"data.path={root / 'data'}", log="-images")
    assert {end.code for end in images} == {2}
    assert "holds samples of kind image, this run trains on kind preference" in images[0].output
