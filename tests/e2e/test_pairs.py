"""Prompts -> `pairs`, killed on the way -> the same command -> `produce source=pairs` -> a data set: real Ray actors,
the tiny pipeline, a tiny CLIP."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_scorers
from produce_command import environment, produce
from producer_world import rows_of

from qwenimg_dist.commands.main import main
from qwenimg_dist.commands.pairs_book import PAIRS
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.demo.shapes import all_scenes, caption
from qwenimg_dist.schema import ROWS

NUM_PROMPTS = 6
TIMEOUT_S = 600


def start(words: list[str], fault_dir: Path | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "qwenimg_dist", "pairs", *words],
        env=environment(fault_dir),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def lines_of(file: Path) -> list[dict[str, object]]:
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def ended(process: subprocess.Popen[str]) -> str:
    """What it said; nothing of it is left."""
    try:
        return process.communicate(timeout=TIMEOUT_S)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_pairs_killed_on_the_way_become_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = tiny_scorers.save_clip(tmp_path / "clip", seed=3)
    prompts, out, faults = tmp_path / "prompts.txt", tmp_path / "out", tmp_path / "faults"
    texts = [caption(scene) for scene in all_scenes()[:NUM_PROMPTS]]
    prompts.write_text("\n".join([*texts, texts[0]]) + "\n")  # one of them twice
    words = [
        f"sample.prompts_file={prompts}",
        f"pairs.path={out}",
        "reward.weights.clip=1",
        f"reward.settings.clip.path={clip}",
        "pairs.num_seeds=2",
        "pairs.margin=0",
        "sample.num_steps=2",
        "sample.height=64",
        "sample.width=64",
    ]
    faults.mkdir()
    (faults / "pairs_picture@3").touch()  # the worker dies between two pictures of its second prompt
    first = start(words, faults)
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while len(lines_of(out / PAIRS)) < 3:
            assert first.poll() is None, first.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert not (faults / "pairs_picture@3").exists()
    before = lines_of(out / PAIRS)
    assert 3 <= len(before) < NUM_PROMPTS

    second = start([*words, "cluster.producers=2"])
    told = ended(second)
    assert second.returncode == 0, told
    assert f"{NUM_PROMPTS} prompts, {NUM_PROMPTS - len(before)} to do" in told
    pairs = lines_of(out / PAIRS)
    assert pairs[: len(before)] == before
    assert sorted(str(one["prompt"]) for one in pairs) == sorted(texts)
    named = sorted(str(one[name]) for one in pairs for name in ("chosen", "rejected"))
    assert sorted(str(file.relative_to(out)) for file in out.glob("pictures/*/*.png")) == named

    assert main(["pairs", *words]) == 0  # without Ray: nothing is left to do
    assert f"{NUM_PROMPTS} prompts, 0 to do" in capsys.readouterr().out
    assert main(["pairs", *words, "pairs.margin=0.5"]) == 2
    assert "margin was 0.0, is 0.5" in capsys.readouterr().err

    done = produce(
        "source=pairs",
        f"source.path={out}",
        "source.meta_columns=[rewards,seeds]",
        f"data.path={tmp_path / 'data'}",
        "encode.resolutions=[64]",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(Dataset.open(tmp_path / "data"), ROWS)
    assert [row["reason"] or row["status"] for row in rows.values()] == ["kept"] * NUM_PROMPTS
    assert main(["data", "verify", f"data.path={tmp_path / 'data'}"]) == 0
