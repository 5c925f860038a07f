"""Twenty kills of `train` under Ray; broken samples; producers that come after the trainer."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_dataset
import numpy as np
import pytest
from fake_dataset import FakeProducer, make_rows
from safetensors.torch import load_file
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
    said = ended[0].output + ended[1].output
    assert "the loss is not finite in micro-batch" in said
    assert f"not finite in the data: {broken_key}" in said
    check_dumps(tmp_path / "run" / "faults", hit, broken_key)
    refused = consumers(tmp_path, "strict", *settings, "engine.max_skipped_steps=0")
    assert refused.returncode == 1
    assert f"up to step {hit[0]} were not finite" in refused.stderr
    assert list_checkpoints(tmp_path / "strict") == []


def check_dumps(folder: Path, hit: list[object], broken_key: str) -> None:
    """One dump per step that was hit, by the rank that had the sample, with what a person needs to look at it."""
    dumps = sorted(folder.iterdir())
    assert [int(dump.name.split("-")[1]) for dump in dumps] == hit
    for dump in dumps:
        record = json.loads((dump / "batch.json").read_text())
        assert record["rank"] == int(dump.name.split("-")[3])
        guilty = [sample for sample in record["samples"] if sample["latents_not_finite"]]
        assert {sample["key"] for sample in guilty} == {broken_key}
        assert all(np.isnan(sample["error"]) and 0 < sample["sigma"] < 1 for sample in guilty)
        assert all(np.isfinite(sample["error"]) for sample in record["samples"] if sample not in guilty)
        tensors = load_file(dump / "batch.safetensors")
        assert {"latents", "text", "slots", "weights", "sigma", "error"} <= tensors.keys()
        assert tensors["slots"].tolist() == [sample["slot"] for sample in record["samples"]]
        assert sum(bool(part.isnan().any()) for part in tensors["latents"]) == len(guilty)


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
@pytest.mark.timeout(1800)
def test_twenty_random_kills_of_train_change_nothing(tmp_path: Path) -> None:
    """Ranks killed inside a checkpoint, at its commit, anywhere, and the whole command: by the same command each time.

    Which rank it hits, and where in its work, is left to chance; what is killed next is drawn from a seed.
    """
    write_input(tmp_path)
    steps = "train.steps=80"
    ended = run_gang(["-m", "consumers", *overrides(tmp_path, "reference", steps)], 2, tmp_path / "logs")
    assert [end.code for end in ended] == [0, 0]
    faults, metrics = tmp_path / "faults", tmp_path / "killed" / "metrics.jsonl"
    faults.mkdir()
    command = [sys.executable, "-m", "qwenimg_dist", "train", *overrides(tmp_path, "killed", steps), "cluster.ranks=2"]
    command.append("cluster.max_restarts=30")
    environment = {**os.environ, "QWENIMG_DIST_FAULT_DIR": str(faults), "OMP_NUM_THREADS": "1"}
    planned = ["checkpoint_write"] * 5 + ["checkpoint_commit"] * 2 + ["train_step"] * 4 + ["rank"] * 6 + ["command"] * 3
    chance = random.Random(20)
    chance.shuffle(planned)
    points: list[str] = []

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)

    process = start()
    for what in planned:
        # At work, which a start cuts the log back for; and up to four steps further.
        seen = metrics.stat().st_mtime if metrics.exists() else 0.0
        wait_for(lambda seen=seen: metrics.exists() and metrics.stat().st_mtime > seen)  # type: ignore[misc]
        steps_logged = num_lines(metrics) + chance.randint(0, 4)
        wait_for(lambda: num_lines(metrics) >= steps_logged)  # noqa: B023 - called at once
        time.sleep(chance.uniform(0, 0.3))
        assert process.poll() is None, f"ended too early, after {points}"
        if what == "command":
            process.kill()
            process.wait()
            points.append(f"the command, with {num_lines(metrics)} steps logged")
            process = start()
        elif what == "rank":
            pid = chance.choice(wait_for(lambda: gang_processes(str(faults))))
            os.kill(pid, signal.SIGKILL)
            points.append(f"rank process {pid}, with {num_lines(metrics)} steps logged")
        else:
            (faults / f"{what}@next").touch()
            wait_for(lambda: not any(faults.iterdir()))
            points.append(Path(f"{faults}.log").read_text().splitlines()[-1])
    assert process.wait(timeout=300) == 0
    print("\n".join(f"{number:2d}. {point}" for number, point in enumerate(points, 1)))
    assert len(points) == 20
    assert sum("checkpoint_" in point for point in points) >= 5
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "reference")
    assert lines(tmp_path / "killed" / "samples.jsonl") == lines(tmp_path / "reference" / "samples.jsonl")


def num_lines(file: Path) -> int:
    return len(file.read_bytes().splitlines())


def wait_for(condition: Callable[[], Any], timeout_s: float = 180) -> Any:
    """The first value of `condition` that counts as true."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


def gang_processes(faults: str) -> list[int]:
    """Ray's training workers that were started with this fault folder in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "cmdline").read_bytes()
            mine = f"QWENIMG_DIST_FAULT_DIR={faults}".encode() in (folder / "environ").read_bytes()
        except OSError:
            continue
        if mine and name.startswith(b"ray::") and b"TrainWorker" in name:
            found.append(int(folder.name))
    return found
