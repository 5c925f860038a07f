"""`ray job submit` to a real head with token authentication: the run, its exit code, its log, its stop."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_head import RayHead, ray_head
from small_run import lines, overrides, write_input

from consumers.checkpoint_files import list_checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TRAIN = ("python", "-m", "qwenimg_dist", "train")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("submitted")
    write_input(folder)
    return folder


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with ray_head(num_cpus=4) as one:
        yield one


def test_a_submitted_run_ends_as_one_on_this_machine_and_says_so(head: RayHead, root: Path) -> None:
    ended = head.submit(*TRAIN, *overrides(root, "run"), submission_id="whole")
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert "step 12/12" in ended.stdout
    assert [line["step"] for line in lines(root / "run" / "samples.jsonl")] == list(range(1, 13))
    assert "step 12/12" in head.job("logs", "whole").stdout


def test_unusable_input_reaches_the_caller_with_its_reason_and_code(head: RayHead, root: Path) -> None:
    ended = head.submit(*TRAIN, *overrides(root, "other", "trian.steps=3"), submission_id="mistyped")
    assert ended.returncode == 1
    assert "did you mean 'train.steps'" in ended.stdout, ended.stdout[-2000:]
    told = head.job("list").stdout
    assert "driver_exit_code=2" in told.replace(" ", ""), told[-3000:]
    assert not (root / "other").exists()


def test_a_stop_saves_and_the_same_command_goes_on(head: RayHead, root: Path) -> None:
    words = [*TRAIN, *overrides(root, "stopped", "train.steps=4000", "checkpoint.every=2000", "evaluate.every=4000")]
    assert head.submit(*words, submission_id="first", wait=False).returncode == 0
    samples = root / "stopped" / "samples.jsonl"
    deadline = time.monotonic() + 400
    while not (samples.exists() and len(samples.read_text().splitlines()) >= 5) and time.monotonic() < deadline:
        time.sleep(0.2)
    stopped = head.job("stop", "first")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    [saved] = [info.step for info in list_checkpoints(root / "stopped") if info.fault is None]
    assert 5 <= saved < 2000

    words[words.index("train.steps=4000")] = f"train.stop_after={saved + 3}"
    words.append("train.steps=4000")
    ended = head.submit(*words, submission_id="second")
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert [line["step"] for line in lines(samples)] == list(range(1, saved + 4))


def test_without_the_token_nothing_runs(head: RayHead, tmp_path: Path) -> None:
    env = {key: value for key, value in head.env.items() if key != "RAY_AUTH_TOKEN"}
    env["HOME"] = str(tmp_path)  # where a token might lie
    refused = head.job("submit", "--", "touch", str(tmp_path / "ran"), env={**env, "RAY_AUTH_MODE": "disabled"})
    assert refused.returncode != 0
    assert not (tmp_path / "ran").exists()


def test_no_key_is_kept_with_a_run(root: Path, head: RayHead) -> None:
    """The head's token is in every process of the job; none of it may lie in what the run wrote."""
    token = head.env["RAY_AUTH_TOKEN"].encode()
    written = [path for path in (root / "run").rglob("*") if path.is_file() and os.access(path, os.R_OK)]
    assert len(written) > 10
    assert not [path for path in written if token in path.read_bytes()]
    assert json.loads((root / "run" / "environment.json").read_text())
