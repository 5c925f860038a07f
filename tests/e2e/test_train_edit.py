"""Editing beside text-to-image on real ranks: killed and resumed it is the same run; on one rank the losses are too."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from fake_dataset import FakeProducer, make_rows
from small_run import TRANSFORMER, Ended, lines, numbers, overrides, run_gang, write_pipeline

from consumers.checkpoint import list_checkpoints, open_checkpoint
from consumers.run_directory import facets_of
from qwenimg_dist.compose import load_config
from qwenimg_dist.models.transformer import build_transformer

STEPS = 8
EDIT = (
    "stage=edit",
    "engine.precision=fp32",
    "optim.lr=1e-3",
    "optim.ema_decay=0.9",
    f"train.steps={STEPS}",
    "checkpoint.every=2",
    "checkpoint.keep=10",
    "evaluate.every=4",
    "evaluate.num_samples=8",
    "curriculum.phases.high.activation_checkpointing=true",
)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in `photos`, edits in `edits`, and a model that gives condition tokens the time 0."""
    folder = tmp_path_factory.mktemp("edit")
    write_pipeline(folder / "pipeline")
    build_transformer({**TRANSFORMER, "zero_cond_t": True}).save_pretrained(folder / "pipeline" / "transformer")
    facets = facets_of(load_config(words(folder, "x")), folder / "pipeline")
    for name in ("edits", "photos"):
        producer = FakeProducer(folder / name, unit_size=16, resolutions=(64, 128), edits=name == "edits")
        producer.facets = facets.of(name)
        producer.add(make_rows(60, captions=2, sizes=((256, 256), (256, 128), (128, 256))))
        producer.produce(complete=True)
    return folder


def words(root: Path, run: str, *extra: str) -> list[str]:
    given = [word for word in overrides(root, run, *EDIT) if not word.startswith("data.path=")]
    photos = f"{{path: {root}/photos, weight: 1, kind: image}}"
    return [*given, f"data.mix={{edits: {{path: {root}/edits, weight: 2}}, photos: {photos}}}", *extra]


def train(root: Path, run: str, *extra: str, ranks: int = 2, log: str = "", faults: Path | None = None) -> list[Ended]:
    env = {"QWENIMG_DIST_FAULT_DIR": str(faults)} if faults else {}
    command = ["-m", "consumers", *words(root, run, *extra)]
    return run_gang(command, ranks, root / f"logs-{run}{log}", env=env, timeout_s=900)


@pytest.fixture(scope="module")
def reference(root: Path) -> Path:
    """The run that nothing happened to."""
    ended = train(root, "reference")
    assert [end.code for end in ended] == [0, 0], ended[0].output[-3000:]
    return root / "reference"


def test_steps_are_of_one_kind_and_validation_is_of_both(reference: Path) -> None:
    kinds = []
    for line in lines(reference / "samples.jsonl"):
        names = {key.partition("/")[0] for key in line["keys"]}  # type: ignore[attr-defined]
        assert len(names) == 1
        assert ("+" in str(line["bucket"])) == (names == {"edits"})
        kinds += list(names)
    assert set(kinds) == {"edits", "photos"}
    log = lines(reference / "metrics.jsonl")
    buckets = {name for line in log for name in line if name.startswith("eval/bucket/")}
    assert any("+" in name for name in buckets)
    assert any("+" not in name for name in buckets)
    assert float(log[-1]["eval/loss_64"]) < float(log[-1]["eval/start_loss_64"])  # type: ignore[arg-type]


def test_killed_and_resumed_is_the_same_run(root: Path, reference: Path) -> None:
    faults = root / "faults"
    faults.mkdir()
    (faults / "checkpoint_write@2").touch()
    ended = train(root, "killed", log="-1", faults=faults)
    assert -signal.SIGKILL in [end.code for end in ended]
    assert [info.step for info in list_checkpoints(root / "killed")] == [2]
    ended = train(root, "killed", log="-2")
    assert [end.code for end in ended] == [0, 0], ended[0].output[-3000:]
    assert "resuming from step 2" in ended[0].output
    assert numbers(root / "killed") == numbers(reference)
    mine, theirs = open_checkpoint(root / "killed", STEPS), open_checkpoint(reference, STEPS)
    assert all(bool((mine.read(name, "ema") == theirs.read(name, "ema")).all()) for name in mine.names)


def test_one_rank_has_the_same_losses(root: Path, reference: Path) -> None:
    ended = train(root, "alone", ranks=1)
    assert ended[0].code == 0, ended[0].output[-3000:]
    for mine, theirs in zip(lines(root / "alone" / "metrics.jsonl"), lines(reference / "metrics.jsonl"), strict=True):
        for name in {"train/loss", "train/grad_norm", "eval/loss"} & theirs.keys():
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4), (mine["step"], name)
