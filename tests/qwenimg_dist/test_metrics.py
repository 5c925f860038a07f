"""No step stands twice in the logs, whatever was killed when; W&B works without a network and never fails a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwenimg_dist.config import LoggerConfig
from qwenimg_dist.metrics import JsonLines, RunLog, peak_flops, truncate_after


def write(file: Path, steps: list[int], tail: str = "") -> None:
    file.write_text("".join(json.dumps({"step": step}) + "\n" for step in steps) + tail)


@pytest.mark.parametrize("tail", ["", '{"step": 9, "lo', "garbage\n", "\n"])
def test_cut_back_to_a_step(tmp_path: Path, tail: str) -> None:
    file = tmp_path / "metrics.jsonl"
    write(file, [1, 2, 3, 4, 5], tail)
    truncate_after(file, 3)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]
    assert file.read_text().endswith("\n")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_cut_to_nothing_and_of_nothing(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert truncate_after(file, 3) == 0
    write(file, [1, 2])
    assert truncate_after(file, 0) == 2
    assert file.read_text() == ""


def test_what_is_whole_is_not_rewritten(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    write(file, [1, 2])
    inode = file.stat().st_ino
    assert truncate_after(file, 2) == 0
    assert file.stat().st_ino == inode


def test_lines_are_readable_at_once_and_hold_no_nan(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "metrics.jsonl")
    log.write(1, {"train/loss": float("nan"), "train/lr": 0.1})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "train/loss": None, "train/lr": 0.1}
    log.close()


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H20", 148),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD EPYC", None),
    ],
)
def test_peak(name: str, tflops: float | None) -> None:
    peak = peak_flops(name)
    assert peak == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_wandb_offline(tmp_path: Path) -> None:
    config = LoggerConfig(wandb="offline", project="test")
    log = RunLog(config, tmp_path, samples=True, wandb_id="ignored", values={"optim.lr": 1e-3})
    log.metrics(1, {"train/loss": 2.0})
    log.metrics(1, {"train/loss": 2.0})  # a resumed run repeats a step
    log.samples(1, "64x64", ["a", "b"])
    assert log.wandb_id is None  # an offline attempt cannot be continued
    log.close()
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    assert json.loads((tmp_path / "samples.jsonl").read_text()) == {"step": 1, "bucket": "64x64", "keys": ["a", "b"]}


def test_a_failing_tracker_does_not_fail_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(LoggerConfig(wandb="offline", project="test"), tmp_path, samples=False, wandb_id=None, values={})
    assert log._wandb is not None
    log._wandb.close()
    log._wandb._run = None  # type: ignore[assignment]
    log.metrics(1, {"train/loss": 1.0})
    log.metrics(2, {"train/loss": 1.0})
    log.close()
    assert capsys.readouterr().err.count("W&B failed") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
