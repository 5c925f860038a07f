"""Training as a user starts it, without Ray: killed, stopped, resumed on other ranks, and given what it must refuse."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from small_run import lines, numbers, overrides, run_gang, write_input

from consumers.__main__ import main as consume
from consumers.checkpoint_files import list_checkpoints, read_certificate
from consumers.checkpoint_reader import verify_checkpoint
from consumers.session import GROUPS_FILE
from qwenimg_dist.commands.main import main

STEPS = 12


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    write_input(folder)
    return folder


@pytest.fixture(scope="module")
def reference(root: Path) -> Path:
    """The run directory of two ranks that nothing happened to."""
    ended = run_gang(
        ["-m", "consumers", *fp32(root, "reference", "train.report=checkpoints")], 2, root / "logs-reference"
    )
    assert [end.code for end in ended] == [0, 0], ended[0].output[-3000:]
    return root / "reference"


def fp32(root: Path, run: str, *extra: str) -> list[str]:
    """Activations are checkpointed in the first phase only, so every resume passes that change."""
    return overrides(root, run, "engine.precision=fp32", "curriculum.phases.low.activation_checkpointing=true", *extra)


def one_rank(root: Path, *extra: str, run: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "consumers", *fp32(root, run, *extra)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def test_every_step_is_logged_once(reference: Path) -> None:
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert [line["step"] for line in lines(reference / name)] == list(range(1, STEPS + 1))
    last = lines(reference / "metrics.jsonl")[-1]
    assert {"eval/loss", "eval/loss_q0.5", "eval/start_loss", "train/padding", "train/data_wait_s"} <= last.keys()
    assert [info.step for info in list_checkpoints(reference) if info.fault is None] == [4, 8, 12]
    assert "resolution" in (reference / "config.yaml").read_text()
    assert json.loads((reference / "environment.json").read_text())["ranks"] == 2


def test_every_checkpoint_has_a_certificate_that_the_list_shows(
    root: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {info.step: read_certificate(info.path) for info in list_checkpoints(reference)}
    assert list(found) == [4, 8, 12]
    images = {line["step"]: line["train/images"] for line in lines(reference / "metrics.jsonl")}
    for step, told in found.items():
        assert told is not None
        assert (told["step"], told["images"], told["parity"]["at_step"]) == (step, images[step], 0)
        assert 0 < told["parity"]["max_difference"] < 1e-5
        assert told["lineage"]["path"] == str(root / "pipeline")
    assert main(["ckpt", "list", f"run.path={reference}"]) == 0
    checkpoints, _, lineage_of_all = capsys.readouterr().out.partition("\n\nLineage\n")
    assert lineage_of_all.splitlines()[1].split()[:3] == ["this", "run", "pretrain"]
    assert str(root / "pipeline") in lineage_of_all.splitlines()[2]
    for line, (step, told) in zip(checkpoints.splitlines()[2:], found.items(), strict=True):
        assert told is not None
        parity, lineage = told["parity"], told["lineage"]
        for word in (f"{parity['max_difference']:.1e}", told["data"]["fingerprint"], lineage["fingerprint"], "valid"):
            assert word in line
        assert line.split()[0] == str(step)


def test_the_run_s_report_is_of_its_end(reference: Path) -> None:
    page = (reference / "report.html").read_text()
    for title in ("Loss", "Steps and speed", "Checkpoints", "Data", "Settings and versions"):
        assert f"<h2>{title}</h2>" in page
    assert "Funnel" in page
    assert "Faults survived" not in page
    row = re.search(r"<tr><td[^>]*>12</td>.*?</tr>", page)  # the last checkpoint, which precedes the last report
    assert row is not None
    told = read_certificate(list_checkpoints(reference)[-1].path)
    assert told is not None
    assert told["data"]["fingerprint"] in row[0]


def test_a_certificate_is_covered_by_the_manifest(root: Path, reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference / "checkpoints", tmp_path / "checkpoints")
    info = list_checkpoints(tmp_path)[-1]
    file = info.path / "certificate.json"
    file.write_text(file.read_text().replace('"precision": "fp32"', '"precision": "bf16"'))
    assert "certificate.json is not what manifest.json says" in verify_checkpoint(info.path)[0]
    file.unlink()
    assert "certificate.json is missing" in str(list_checkpoints(tmp_path)[-1].fault)


def test_the_plan_was_what_happened(reference: Path) -> None:
    plan = json.loads((reference / "plan.json").read_text())
    log, samples = lines(reference / "metrics.jsonl"), lines(reference / "samples.jsonl")
    assert [line["train/activation_checkpointing"] for line in log] == [1] * 8 + [0] * 4
    before = 0
    for index, phase in enumerate(plan["phases"]):
        first, last = phase["first_step"], phase["last_step"]
        steps = log[first:last]
        assert [line["train/phase"] for line in steps] == [index] * len(steps)
        assert (steps[0]["train/lr"], steps[-1]["train/lr"]) == (phase["lr"]["first"], phase["lr"]["last"])
        images = int(steps[-1]["train/images"]) - before  # type: ignore[call-overload]
        before += images
        assert phase["images"] == images
        assert phase["fill_slots"] == sum(len(line["keys"]) for line in samples[first:last]) - images  # type: ignore[arg-type]
        (stream,) = phase["resolutions"].values()
        assert steps[-1]["train/epoch"] <= stream["epochs"] <= steps[-1]["train/epoch"] + 1  # type: ignore[operator]
        buckets = Counter(line["bucket"] for line in samples[first:last])
        assert {name: counts["batches"] for name, counts in stream["buckets"].items() if counts["batches"]} == buckets
    assert before == log[-1]["train/images"]
    assert sum(phase["fill_slots"] for phase in plan["phases"]) > 0


def test_a_dry_run_tells_the_plan_and_writes_nothing(
    root: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digest(reference)
    dry = "train.dry_run=true"
    told = []
    for arguments in (
        fp32(root, "reference", dry),
        fp32(root, "unmade", dry),
        fp32(root, "unmade", dry, "follow=true"),
    ):
        assert main(["train", *arguments]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]  # the run's own generation, and one of what is there: the same data
    assert "so far" in told[2]
    assert "so far" not in told[0]
    assert digest(reference) == before
    assert not (root / "unmade").exists()
    log = (root / "logs-reference" / "rank-0.log").read_text()
    assert told[0] in log  # what the run itself said
    assert consume(fp32(root, "unmade", dry)) == 0
    assert "Buckets; micro-batches of one of 1 ranks" in capsys.readouterr().out
    nothing = "curriculum.phases.high.where='width > 9999'"
    assert main(["train", *fp32(root, "unmade", dry, nothing)]) == 2
    message = capsys.readouterr().err
    for words in ("phase 1 (high) at 128 px has nothing to train on", "where='width > 9999'"):
        assert words in message


def test_killed_inside_a_checkpoint_beside_training_and_resumed_is_the_same_run(root: Path, reference: Path) -> None:
    faults = root / "faults"
    faults.mkdir()
    (faults / "checkpoint_write@2").touch()  # one of the two ranks dies in the middle of the second checkpoint
    command = ["-m", "consumers", *fp32(root, "killed", "checkpoint.background=true")]
    ended = run_gang(command, 2, root / "logs-killed", env={"QWENIMG_DIST_FAULT_DIR": str(faults)})
    assert -signal.SIGKILL in [end.code for end in ended]
    assert [info.step for info in list_checkpoints(root / "killed")] == [4]
    assert lines(root / "killed" / "metrics.jsonl")[-1]["step"] >= 8  # type: ignore[operator]  # logged, never saved
    ended = run_gang(command, 2, root / "logs-resumed")
    assert [end.code for end in ended] == [0, 0], ended[0].output[-3000:]
    assert "resuming from step 4" in ended[0].output
    assert numbers(root / "killed") == numbers(reference)
    assert lines(root / "killed" / "samples.jsonl") == lines(reference / "samples.jsonl")


def test_stopped_by_sigterm_and_resumed_on_one_rank(root: Path, reference: Path) -> None:
    run_dir = root / "stopped"
    command = [sys.executable, "-m", "consumers", *fp32(root, "stopped", "checkpoint.background=true")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    wait_until(lambda: (run_dir / "metrics.jsonl").exists() and len(lines(run_dir / "metrics.jsonl")) >= 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    saved = list_checkpoints(run_dir)[-1]
    assert saved.fault is None
    assert saved.step == lines(run_dir / "metrics.jsonl")[-1]["step"]
    assert one_rank(root, run="stopped").returncode == 0
    assert lines(run_dir / "samples.jsonl") == lines(reference / "samples.jsonl")
    for mine, theirs in zip(numbers(run_dir), numbers(reference), strict=True):
        assert mine == pytest.approx(theirs, abs=2e-5)
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-6)


@pytest.mark.slow
def test_no_valid_checkpoint_is_no_fresh_start_unless_asked(root: Path, reference: Path) -> None:
    run_dir = root / "broken"
    shutil.copytree(reference, run_dir)
    for info in list_checkpoints(run_dir):
        (info.path / "manifest.json").write_text("{")
    before = {path: digest(run_dir / path) for path in ("checkpoints", "metrics.jsonl", "samples.jsonl")}
    refused = one_rank(root, run="broken")
    assert refused.returncode == 2
    for words in ("none of them valid", "step 4", "step 12", "train.fresh=true"):
        assert words in refused.stderr
    assert {path: digest(run_dir / path) for path in before} == before
    fresh = one_rank(root, "train.fresh=true", "train.stop_after=2", run="broken")
    assert fresh.returncode == 0, fresh.stderr
    assert "previous-001" in fresh.stderr
    assert (run_dir / "previous-001" / "checkpoints" / "step-00000012").is_dir()
    assert [info.step for info in list_checkpoints(run_dir)] == [2]


@pytest.mark.slow
def test_logs_that_cannot_be_written_end_the_run_on_all_ranks_and_its_disk_is_named(root: Path) -> None:
    run_dir = root / "full"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").symlink_to("/dev/full")
    ended = run_gang(["-m", "consumers", *fp32(root, "full")], 2, root / "logs-full")
    assert [end.code for end in ended] == [1, 1], ended[0].output[-3000:]
    assert f"the run cannot write its logs any more, noticed at step 2: {run_dir / 'metrics.jsonl'}: No space left" in (
        ended[0].output
    )
    assert "Traceback" not in ended[0].output + ended[1].output


def test_a_finished_run_is_not_started_again(
    root: Path, reference: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producers.ray_cluster.ray_session", None)  # would be called, and fail, if ranks were to start
    assert main(["train", *fp32(root, "reference")]) == 0
    assert "training complete already" in capsys.readouterr().err


def no_run_path(root: Path) -> list[str]:
    return [word for word in overrides(root) if not word.startswith("run.path")]


def other_config(root: Path) -> list[str]:
    return [*fp32(root, "reference"), "optim.lr=0.5", "train.seed=3"]


def no_data(root: Path) -> list[str]:
    return [*overrides(root), f"data.path={root / 'nowhere'}"]


def other_encoder(root: Path) -> list[str]:
    pipeline = root / "other-pipeline"
    if not pipeline.exists():
        shutil.copytree(root / "pipeline", pipeline)
        (pipeline / "text_encoder" / "config.json").write_text('{"_class_name": "another"}')
    return [*overrides(root), f"model.path={pipeline}"]


def no_model(root: Path) -> list[str]:
    return [*overrides(root), f"model.path={root / 'no-model'}"]


def not_encoded(root: Path) -> list[str]:
    return [*overrides(root), "encode.resolutions=[64]"]


def mistyped(root: Path) -> list[str]:
    return [*overrides(root), "optim.lrr=1"]


def no_such_parameter(root: Path) -> list[str]:
    return [*overrides(root), "optim.freeze=[img_mdo]"]


def no_log_variances(root: Path) -> list[str]:
    return [*overrides(root), "objective.posterior=sample", "encode.posterior=mean_logvar"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (no_run_path, ["run.path", "add run.path="]),
        (other_config, ["another config", "optim.lr is 0.002 there, 0.5 here", "train.seed", "train.fresh=true"]),
        (no_data, ["nowhere", "produce"]),
        (other_encoder, ["text-", "another encoder", "produce"]),
        (no_model, ["no-model", "no such directory"]),
        (not_encoded, ["128", "encode.resolutions"]),
        (no_such_parameter, ["optim.freeze: 'img_mdo' finds no parameter", "near are img_mod"]),
        (no_log_variances, ["latents-", "with other encode settings", "produce"]),
        (mistyped, ["optim.lrr", "did you mean 'optim.lr'"]),
    ],
)
def test_unusable_input_is_refused_and_nothing_changes(
    root: Path,
    reference: Path,
    arguments: Callable[[Path], list[str]],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = arguments(root)
    before = digest(root / "data"), digest(reference)
    assert main(["train", *given]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    for word in words:
        assert word in message
    assert (digest(root / "data"), digest(reference)) == before
    assert not (root / "run").exists()


@pytest.mark.slow
def test_a_tracker_without_a_key_is_refused_before_weights_are_loaded(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    refused = one_rank(root, "logger=online", run="untracked")
    assert refused.returncode == 2
    assert "no W&B key" in refused.stderr
    assert not (root / "untracked" / GROUPS_FILE).exists(), "the engine was built before"


def test_full_disk_is_refused_before_anything_is_written(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert main(["train", *overrides(root)]) == 2
    assert "the disk is too full" in capsys.readouterr().err
    assert not (root / "run").exists()


def digest(path: Path) -> str:
    """Of names and contents of a file or folder."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    found = hashlib.sha256()
    for file in files:
        found.update(f"{file.relative_to(path)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


def wait_until(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
