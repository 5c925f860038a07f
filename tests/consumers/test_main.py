"""Who says why a gang under torchrun has ended: rank 0, once, and a rank that never was one of it, for itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from consumers import process_group
from consumers.__main__ import main

SECOND = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
"""Of two nodes of one rank each."""


def test_what_keeps_a_rank_from_joining_is_said_by_itself(tmp_path: Path) -> None:
    """Rank 0 waits for it elsewhere, and knows nothing of a node without a driver."""
    command = [sys.executable, "-m", "consumers", f"run.path={tmp_path}", "cluster.device=cuda"]
    environment = {**os.environ, **SECOND, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2, ended.stderr
    assert f"error: rank 1 on {socket.gethostname()}, before it joined the others: cluster.device=cuda" in ended.stderr
    assert "torch finds no GPU here" in ended.stderr


def test_a_bucket_that_is_away_at_the_start_is_said_in_a_line(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    hasty = (
        "import sys; from qwenimg_dist import storage; from consumers.__main__ import main\n"
        "storage.PATIENCE = storage.Patience(attempts=2, first_s=0.01)\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    away = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    ended = subprocess.run(
        [sys.executable, "-c", hasty, f"run.path={tmp_path / 'run'}", "checkpoint.remote=s3://bucket/run"],
        env={**os.environ, **away},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 1, ended.stderr
    assert "error: s3://bucket/run" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_what_the_ranks_agreed_on_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(process_group, "_joined", True)
    for rank, said in (("0", "error: "), ("1", "rank 1 stopped, rank 0 says why")):
        monkeypatch.setenv("RANK", rank)
        assert main(["no.such=key"]) == 2
        told = capsys.readouterr().err
        assert told.startswith(said)
        assert ("no.such" in told) == (rank == "0")
