"""The log that each rank may write of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from consumers.hooks import Hooks
from consumers.rank_log import rank_logged
from qwenimg_dist.compose import load_config


def test_a_rank_tells_its_stages_messages_and_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    heard: list[object] = []
    hooks = Hooks(stage=heard.append, heartbeat=heard.append, say=heard.append)
    config = load_config([f"run.path={tmp_path}", "logger.every_rank=true"])

    def work() -> None:
        with rank_logged(config, hooks) as logged:
            logged.stage("reading the batch")
            logged.stage("update")
            logged.heartbeat(1)
            logged.say("a warning")
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError):
        work()
    assert heard == ["reading the batch", "update", 1, "a warning"]
    lines = [json.loads(line) for line in (tmp_path / "logs" / "rank-00003.jsonl").read_text().splitlines()]
    assert [line["rank"] for line in lines] == [3, 3, 3]
    assert lines[0]["step"] == 1
    assert list(lines[0]["seconds"]) == ["starting", "reading the batch", "update"]
    assert all(0 <= seconds < 60 for seconds in lines[0]["seconds"].values())
    assert (lines[1]["said"], lines[2]["ended"]) == ("a warning", "RuntimeError: broken")


def test_no_file_unless_asked_and_a_run_goes_on_without_one(tmp_path: Path) -> None:
    hooks = Hooks()
    with rank_logged(load_config([f"run.path={tmp_path}"]), hooks) as same:
        assert same is hooks
    assert not list(tmp_path.iterdir())
    (tmp_path / "logs").write_text("in the way")
    said: list[str] = []
    hooks = Hooks(say=said.append)
    with rank_logged(load_config([f"run.path={tmp_path}", "logger.every_rank=true"]), hooks) as same:
        assert same is hooks
    assert "no log of its own" in said[0]


def test_a_full_disk_ends_the_log_and_not_the_rank(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-00000.jsonl").symlink_to("/dev/full")
    said: list[str] = []
    config = load_config([f"run.path={tmp_path}", "logger.every_rank=true"])
    with rank_logged(config, Hooks(say=said.append)) as logged:
        for step in range(3):
            logged.heartbeat(step)
    assert len(said) == 1
    assert "No space left" in said[0]
