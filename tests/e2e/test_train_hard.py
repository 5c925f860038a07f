"""Ten kills of `train` under Ray; broken samples; producers that come after the trainer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fake_dataset
import numpy as np
import pytest
from fake_dataset import FakeProducer, make_rows
from small_run import lines, numbers, overrides, run_gang, write_input, write_pipeline

from consumers.checkpoint_files import list_checkpoints
from consumers.run_directory import facets_of
from qwenimg_dist.compose import load_config
from qwenimg_dist.schema import row_key


def consumers(root: Path, run: str, *extra: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "consumers", *overrides(root, run, *extra)]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)


@pytest.mark.slow
def test_a_broken_sample_is_skipped_and_too_many_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound, broken_key = fake_dataset.fake_latents, row_key("pictures/000007.png")

    def with_nan(key: str, bucket: object) -> np.ndarray:
        latents = sound(key, bucket)  # type: ignore[arg-type]
        return np.full_like(latents, np.nan) if key == broken_key else latents

    monkeypatch.setattr(fake_dataset, "fake_latents", with_nan)
    write_input(tmp_path)
    settings = ("train.steps=10", "evaluate.every=0", "data.held_out=0", "checkpoint.every=10")
    ended = run_gang(["-m", "consumers", *overrides(tmp_path, "run", *settings)], 2, tmp_path / "logs")
    assert [end.code for end in ended] == [0, 0], ended[0].output[-2000:]
    log, samples = lines(tmp_path / "run" / "metrics.jsonl"), lines(tmp_path / "run" / "samples.jsonl")
    hit = [line["step"] for line in samples if broken_key in line["keys"]]  # type: ignore[operator]
    assert hit
    assert [line["step"] for line in log if line["train/loss"] is None] == hit
    assert log[-1]["train/skipped_steps"] == len(hit)
    assert "the loss is not finite in micro-batch" in ended[0].output + ended[1].output
    refused = consumers(tmp_path, "strict", *settings, "engine.max_skipped_steps=0")
    assert refused.returncode == 1
    assert f"up to step {hit[0]} were not finite" in refused.stderr
    assert list_checkpoints(tmp_path / "strict") == []


@pytest.mark.slow
def test_train_waits_for_producers_and_follows_them(tmp_path: Path) -> None:
    write_pipeline(tmp_path / "pipeline")
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "consumers", *overrides(tmp_path, "run", "follow=true", "data.held_out=0")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_until(process, lambda: (run_dir / "config.yaml").exists())  # it waits for a data set that is not there yet
    producer = FakeProducer(tmp_path / "data", unit_size=16, resolutions=(64, 128))
    producer.facets = facets_of(load_config(overrides(tmp_path)), tmp_path / "pipeline")
    producer.add(make_rows(60, captions=2, sizes=((256, 256), (256, 128), (128, 256))))
    for unit in range(producer.num_units):
        known = generations(run_dir)
        producer.produce_unit(unit)
        wait_until(process, lambda known=known: generations(run_dir) > known)  # type: ignore[misc]
    producer.complete()
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "waiting for" in errors
    assert len(lines(tmp_path / "run" / "generations.jsonl")) > 2
    assert [line["step"] for line in lines(tmp_path / "run" / "samples.jsonl")] == list(range(1, 13))


def generations(run_dir: Path) -> int:
    file = run_dir / "generations.jsonl"
    return len(lines(file)) if file.exists() else 0


def wait_until(process: subprocess.Popen[str], condition: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_kills_of_train_change_nothing(tmp_path: Path) -> None:
    """Seven kills of ranks (four inside a checkpoint) and three of the whole command, by the same command each time."""
    write_input(tmp_path)
    steps = "train.steps=40"
    ended = run_gang(["-m", "consumers", *overrides(tmp_path, "reference", steps)], 2, tmp_path / "logs")
    assert [end.code for end in ended] == [0, 0]
    faults = tmp_path / "faults"
    faults.mkdir()
    planned = ["checkpoint_write@1", "checkpoint_write@2", "checkpoint_write@3", "checkpoint_commit@2"]
    planned += ["train_step@6", "train_step@7", "train_step@9"]
    command = [sys.executable, "-m", "qwenimg_dist", "train", *overrides(tmp_path, "killed", steps)]
    metrics = tmp_path / "killed" / "metrics.jsonl"
    environment = {**os.environ, "QWENIMG_DIST_FAULT_DIR": str(faults), "OMP_NUM_THREADS": "1"}
    drivers_killed, code = 0, -1
    for name in planned:
        (faults / name).touch()
    for _ in range(15):
        process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
        begun = metrics.stat().st_mtime if metrics.exists() else 0.0
        if drivers_killed < 3:
            deadline = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline:
                if metrics.exists() and metrics.stat().st_mtime > begun and len(metrics.read_bytes().splitlines()) > 2:
                    process.send_signal(signal.SIGKILL)
                    drivers_killed += 1
                    break
                time.sleep(0.1)
        code = process.wait()
        if code == 0:
            break
    assert code == 0
    assert drivers_killed == 3
    assert list(faults.iterdir()) == []
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "reference")
    assert lines(tmp_path / "killed" / "samples.jsonl") == lines(tmp_path / "reference" / "samples.jsonl")
