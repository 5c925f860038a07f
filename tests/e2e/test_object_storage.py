"""Data and checkpoints in a bucket that answers late and with bursts of 503: the run is the one on local disks.

Two ranks share a cache that is smaller than the data; the machine is lost in the middle, and an empty one goes on.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from cache_size import tar_bytes
from produce_command import produce, start
from s3_server import BUCKET, objects, s3_server
from small_run import lines, numbers, overrides, run_gang, write_input
from undisturbed import assert_same, produce_quietly, words, write_source

from consumers.checkpoint_files import list_checkpoints
from qwenimg_dist.config.data import DataConfig
from qwenimg_dist.data import mirror
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.data.mirror import Mirror, data_root
from qwenimg_dist.data.reader import _MAX_HELD
from qwenimg_dist.storage import Storage

DATA, RUN = f"s3://{BUCKET}/data", f"s3://{BUCKET}/run"


def download(url: str, folder: Path) -> Path:
    """As `aws s3 sync`."""
    for name, one in Storage(url).list().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Storage(url).fetch(name, folder / name, size_bytes=one.size_bytes)
    return folder


def upload(folder: Path, url: str) -> None:
    """As `aws s3 sync`: a data set may be copied into a bucket."""
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not file.relative_to(folder).parts[0].startswith("."):
            Storage(url).upload(file, str(file.relative_to(folder)))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_ranks_on_a_bucket_lose_their_machine_and_end_in_the_same_run(tmp_path: Path) -> None:
    write_input(tmp_path, unit_size=4)
    data = tmp_path / "data"
    words = ["-m", "consumers", *overrides(tmp_path, "local", "engine.precision=fp32", "train.log_every=1")]
    ended = run_gang(words, 2, tmp_path / "logs-local", timeout_s=600)
    assert [end.code for end in ended] == [0, 0], ended[0].output[-3000:]

    sizes = sorted(file.stat().st_size for file in data.rglob("*.tar"))
    limit = sum(sizes) * 3 // 10
    bound = limit + sum(sizes[-2 * _MAX_HELD :])  # and what both ranks read at one moment
    assert bound < sum(sizes) * 0.7
    with s3_server() as server:
        upload(data, DATA)
        shutil.rmtree(data)
        most = 0
        watching = threading.Event()

        def watch() -> None:
            nonlocal most
            while not watching.wait(0.01):
                most = max([most, *(tar_bytes(one) for one in tmp_path.glob("cache-*/data-*"))])

        watcher = threading.Thread(target=watch)
        watcher.start()
        server.faults.refuse_every, server.faults.late_s = 11, 0.02
        for machine, stop_after in ((1, "6"), (2, "null")):
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
            ended = run_gang(words, 2, tmp_path / f"logs-{machine}", env=server.env, timeout_s=600)
            assert [end.code for end in ended] == [0, 0], ended[0].output[-3000:]
            if machine == 1:
                assert "copied step 6 to" in ended[0].output
                shutil.rmtree(tmp_path / "run-1")
        watching.set()
        watcher.join()
        assert "is at step 6, ahead of" in ended[0].output
        assert "resuming from step 6" in ended[0].output
        assert server.faults.seen["503"] > 10
        assert 0 < most <= bound
    run, local = tmp_path / "run-2", tmp_path / "local"
    assert lines(run / "samples.jsonl") == lines(local / "samples.jsonl")
    assert numbers(run) == numbers(local)
    assert [info.step for info in list_checkpoints(run) if info.fault is None] == [6, 8, 12]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_produce_into_a_bucket_killed_twice_goes_on_elsewhere_and_gives_the_same_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(tmp_path / "source", 30, 25)
    calm = produce_quietly(source, tmp_path / "calm")
    faults = tmp_path / "faults"
    faults.mkdir()
    with s3_server() as server:
        command = [word.replace(str(tmp_path / "data"), DATA) for word in words(source, tmp_path / "data")]
        # A worker dies in an upload, before its parquet, the driver a while later: all of its machine is gone.
        (faults / "upload@2").touch()
        process = start(*command, f"data.cache={tmp_path / 'a'}", fault_dir=faults)
        while process.poll() is None and sum("rows/" in name for name in objects()) < 2:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        done = sum("rows/" in name for name in objects())
        assert 2 <= done < 6
        assert not (faults / "upload@2").exists()
        assert not any(name.endswith("source-complete.json") for name in objects())

        server.faults.refuse_every = 9
        ended = produce(*command, f"data.cache={tmp_path / 'b'}", "data.cache_bytes=20000")
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert server.faults.seen["503"] > 10
        server.faults.heal()
        made = {name: size for name, size in objects().items() if name.endswith(".parquet")}
        again = produce(*command, f"data.cache={tmp_path / 'b'}")
        assert "nothing to do" in again.stdout
        assert made == {name: size for name, size in objects().items() if name.endswith(".parquet")}

        root = data_root(DATA, DataConfig(path=DATA, cache=str(tmp_path / "b")))
        assert sum(file.stat().st_size for file in root.rglob("*.tar")) < sum(
            size for name, size in objects().items() if name.endswith(".tar")
        )
        monkeypatch.setattr(mirror, "STRAY_S", -10.0)
        there = Mirror.of(root)
        assert there is not None
        there.clean()
        assert_same(Dataset.open(download(DATA, tmp_path / "copy")), calm)
