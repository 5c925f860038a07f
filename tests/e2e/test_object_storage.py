"""Data and checkpoints in a bucket that answers late and with bursts of 503: the run is the one on local disks.

Two ranks share a cache that is smaller than the data; the machine is lost in the middle, and an empty one goes on.
"""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
from s3_server import BUCKET, s3_server
from small_run import lines, numbers, overrides, run_gang, write_input

from consumers.checkpoint_files import list_checkpoints
from qwenimg_dist.storage import Storage

DATA, RUN = f"s3://{BUCKET}/data", f"s3://{BUCKET}/run"


def upload(folder: Path, url: str) -> None:
    """As `aws s3 sync`: a data set may be copied into a bucket."""
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not file.relative_to(folder).parts[0].startswith("."):
            Storage(url).upload(file, str(file.relative_to(folder)))


def tar_bytes(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*.tar"):
        try:
            total += file.stat().st_size
        except FileNotFoundError:
            continue
    return total


@pytest.mark.slow
def test_two_ranks_on_a_bucket_lose_their_machine_and_end_in_the_same_run(tmp_path: Path) -> None:
    write_input(tmp_path)
    data = tmp_path / "data"
    words = ["-m", "consumers", *overrides(tmp_path, "local", "engine.precision=fp32", "train.log_every=1")]
    ended = run_gang(words, 2, tmp_path / "logs-local")
    assert [end.code for end in ended] == [0, 0], ended[0].output[-3000:]

    largest = max(file.stat().st_size for file in data.rglob("*.tar"))
    limit = max(tar_bytes(data) // 2, 8 * largest)
    assert limit < tar_bytes(data)
    with s3_server() as server:
        upload(data, DATA)
        shutil.rmtree(data)
        most = 0
        watching = threading.Event()

        def watch() -> None:
            nonlocal most
            while not watching.wait(0.01):
                most = max(most, tar_bytes(tmp_path / "cache-1"), tar_bytes(tmp_path / "cache-2"))

        watcher = threading.Thread(target=watch)
        watcher.start()
        server.faults.refuse_every, server.faults.late_s = 11, 0.02
        for machine, stop_after in ((1, "5"), (2, "null")):
            words = [
                "-m",
                "consumers",
                *overrides(tmp_path, f"run-{machine}", "engine.precision=fp32"),
                f"data.path={DATA}",
                f"data.cache={tmp_path / f'cache-{machine}'}",
                f"data.cache_bytes={limit}",
                f"checkpoint.remote={RUN}",
                f"train.stop_after={stop_after}",
            ]
            ended = run_gang(words, 2, tmp_path / f"logs-{machine}", env=server.env)
            assert [end.code for end in ended] == [0, 0], ended[0].output[-3000:]
            if machine == 1:
                assert "copied step 5 to" in ended[0].output
                shutil.rmtree(tmp_path / "run-1")
        watching.set()
        watcher.join()
        assert "is at step 5, ahead of" in ended[0].output
        assert "resuming from step 5" in ended[0].output
        assert server.faults.seen["503"] > 10
        assert 0 < most <= limit
    run, local = tmp_path / "run-2", tmp_path / "local"
    assert lines(run / "samples.jsonl") == lines(local / "samples.jsonl")
    assert numbers(run) == numbers(local)
    assert [info.step for info in list_checkpoints(run) if info.fault is None] == [5, 8, 12]
