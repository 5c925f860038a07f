"""A copy of a run in a bucket: valid by its manifest, kept by the same rule, fetched by a machine that has nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from s3_server import BUCKET, Server, s3_server

from consumers import judges, reference_pass, validation_data
from consumers.checkpoint_files import (
    FileRecord,
    checkpoints_dir,
    list_checkpoints,
    rank_file,
    step_name,
    write_manifest,
    write_state,
)
from consumers.ranks import Ranks
from consumers.remote_checkpoints import RUN_ID, RemoteCheckpoints
from qwenimg_dist import storage
from qwenimg_dist.data import generation_log
from qwenimg_dist.patience import StorageAwayError
from qwenimg_dist.storage import Patience, Storage

ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def url(server: Server, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(storage, "PATIENCE", Patience(attempts=3, first_s=0.02))
    yield f"s3://{BUCKET}/{request.node.name}"
    server.faults.heal()


def save(run_dir: Path, step: int) -> None:
    """A checkpoint as the ranks leave it, with the small files of a run."""
    folder = checkpoints_dir(run_dir) / step_name(step)
    folder.mkdir(parents=True)
    data = f"weights of step {step}".encode()
    (folder / rank_file(0, 1)).write_bytes(data)
    record = FileRecord(name=rank_file(0, 1), size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    write_manifest(folder, step, 1, [record, write_state(folder, {"step": step})])
    (run_dir / "generations.jsonl").write_text("{}\n" * step)
    (run_dir / "samples").mkdir(exist_ok=True)
    (run_dir / "samples" / f"step-{step}.png").write_bytes(b"png")


def copy_of(url: str, run_dir: Path) -> RemoteCheckpoints:
    made = RemoteCheckpoints.of(url, run_dir)
    assert made is not None
    return made


def push(url: str, run_dir: Path, step: int, keep_every: int = 0, stall_s: float = 600.0) -> str:
    return copy_of(url, run_dir).push(step, ALONE, keep=2, keep_every=keep_every, stall_s=stall_s)


def steps(run_dir: Path) -> list[int]:
    return [info.step for info in list_checkpoints(run_dir) if info.fault is None]


def test_an_empty_machine_gets_the_newest_copy_and_the_files_of_the_run(url: str, tmp_path: Path) -> None:
    here, other = tmp_path / "run", tmp_path / "other"
    assert copy_of(url, here).join(fresh=False) is None
    for step in (2, 4, 6, 8):
        save(here, step)
        assert push(url, here, step, keep_every=4) == ""
    kept = {name.split("/")[1] for name in Storage(url).list("checkpoints")}
    assert kept == {step_name(step) for step in (4, 6, 8)}
    assert copy_of(url, here).join(fresh=False) is None  # nothing is ahead

    told = copy_of(url, other).join(fresh=False)
    assert told is not None
    assert "is at step 8, ahead of" in told
    said: list[str] = []
    copy_of(url, other).fetch(ALONE, said.append)
    assert steps(other) == [8]
    assert "fetched step 8" in said[0]
    assert (other / RUN_ID).read_text() == (here / RUN_ID).read_text()
    assert (other / "generations.jsonl").read_text() == "{}\n" * 8
    assert len(list((other / "samples").iterdir())) == 4
    save(other, 10)
    assert push(url, other, 10) == ""
    assert copy_of(url, here).steps_ahead() == [10]  # the first machine would go on from there


def test_a_copy_without_its_manifest_or_a_file_is_none(url: str, tmp_path: Path, server: Server) -> None:
    here, other = tmp_path / "run", tmp_path / "other"
    save(here, 2)
    assert push(url, here, 2) == ""
    save(here, 4)
    server.faults.match = lambda method, path: method == "PUT" and path.endswith("step-00000004/manifest.json")
    server.faults.refuse = 1000
    assert "could not upload checkpoints/step-00000004/manifest.json" in push(url, here, 4)
    server.faults.heal()
    assert copy_of(url, other).steps_ahead() == [2]
    assert push(url, here, 4) == ""
    Storage(url).remove([f"checkpoints/{step_name(4)}/{rank_file(0, 1)}"])
    assert copy_of(url, other).join(fresh=False)
    said: list[str] = []
    copy_of(url, other).fetch(ALONE, said.append)
    assert "the copy of step 4 cannot be used" in said[0]
    assert steps(other) == [2]
    assert not list(checkpoints_dir(other).glob(".tmp-*"))

    Storage(url).remove([f"checkpoints/{step_name(2)}/{rank_file(0, 1)}"])
    with pytest.raises(ValueError, match=r"no copy in .* can be used.*to start anew"):
        copy_of(url, tmp_path / "third").fetch(ALONE, said.append)
    save(tmp_path / "third", 1)
    with pytest.raises(ValueError, match=r"leave checkpoint\.remote out to go on from step 1, which is here"):
        copy_of(url, tmp_path / "third").fetch(ALONE, said.append)


def test_a_machine_lost_in_its_first_upload_leaves_a_copy_that_goes_on(url: str, tmp_path: Path) -> None:
    lost, other = tmp_path / "lost", tmp_path / "other"
    save(lost, 2)
    assert push(url, lost, 2) == ""
    Storage(url).remove([f"checkpoints/{step_name(2)}/manifest.json"])  # as if it had been killed before that
    other.mkdir()
    (other / "generations.jsonl").write_text("")  # a start before this one
    assert copy_of(url, other).join(fresh=False) is None
    assert (other / RUN_ID).read_text() == (lost / RUN_ID).read_text()
    save(other, 2)
    assert push(url, other, 2) == ""
    assert copy_of(url, tmp_path / "third").steps_ahead() == [2]
    # One that has checkpoints of its own is another run, whatever lies in the bucket.
    Storage(url).remove([f"checkpoints/{step_name(2)}/manifest.json"])
    save(tmp_path / "b", 2)
    with pytest.raises(ValueError, match="which was never copied there"):
        copy_of(url, tmp_path / "b").join(fresh=False)


def test_a_copy_over_a_slow_link_is_given_up_before_the_watchdog_ends_the_run(
    url: str, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "run", 2)
    monkeypatch.setattr(storage, "PATIENCE", Patience(attempts=1000, first_s=0.02, longest_s=0.1))
    server.faults.match = lambda method, path: method == "PUT" and path.endswith(".safetensors")
    server.faults.refuse = 100_000
    begin = time.monotonic()
    problem = push(url, tmp_path / "run", 2, stall_s=4.0)
    assert time.monotonic() - begin < 4.0
    assert "within 2 s (half of train.stall_timeout_s)" in problem
    server.faults.heal()
    server.faults.late_s = 3.0  # each answer comes later than all together may take
    begin = time.monotonic()
    assert "within 2 s (half of train.stall_timeout_s)" in push(url, tmp_path / "run", 2, stall_s=4.0)
    assert time.monotonic() - begin < 4.0
    server.faults.heal()
    assert push(url, tmp_path / "run", 2) == ""


def test_a_step_that_is_written_again_is_not_valid_meanwhile(url: str, tmp_path: Path, server: Server) -> None:
    here = tmp_path / "run"
    for step in (2, 4):
        save(here, step)
        assert push(url, here, step) == ""
    shutil.rmtree(checkpoints_dir(here) / step_name(4))
    save(here, 4)
    server.faults.match = lambda method, path: method == "PUT" and path.endswith(".safetensors")
    server.faults.refuse = 1000
    assert "could not upload" in push(url, here, 4)
    server.faults.heal()
    assert copy_of(url, tmp_path / "other").steps_ahead() == [2]
    # A future that was given up goes with the next copy, what is not a checkpoint stays.
    Storage(url).write("checkpoints/notes.txt", b"mine")
    assert push(url, here, 4) == ""
    shutil.rmtree(checkpoints_dir(here) / step_name(4))
    save(here, 3)
    assert push(url, here, 3) == ""
    names = {name.split("/")[1] for name in Storage(url).list("checkpoints")}
    assert names == {step_name(2), step_name(3), "notes.txt"}


def test_copies_of_other_runs_are_refused(url: str, tmp_path: Path) -> None:
    save(tmp_path / "a", 2)
    assert push(url, tmp_path / "a", 2) == ""
    save(tmp_path / "b", 2)
    with pytest.raises(ValueError, match="which was never copied there"):
        copy_of(url, tmp_path / "b").join(fresh=False)
    assert "holds another run" in push(url, tmp_path / "b", 2)
    with pytest.raises(ValueError, match="holds another run than"):
        copy_of(url, tmp_path / "b").join(fresh=False)
    with pytest.raises(ValueError, match=r"holds a run already, and train\.fresh=true would replace it"):
        copy_of(url, tmp_path / "c").join(fresh=True)
    assert copy_of(url, tmp_path / "c").steps_ahead() == [2]
    assert RemoteCheckpoints.of(None, tmp_path) is None


def test_a_machine_that_is_lost_while_it_joins_may_join_again(url: str, tmp_path: Path, server: Server) -> None:
    here, other = tmp_path / "run", tmp_path / "other"
    save(here, 2)
    (here / "metrics.jsonl").write_text("{}\n")
    assert push(url, here, 2) == ""
    server.faults.match = lambda method, path: method == "GET" and path.endswith("metrics.jsonl")
    server.faults.refuse = 1000
    with pytest.raises(OSError, match=r"could not read metrics\.jsonl"):
        copy_of(url, other).join(fresh=False)
    assert (other / "generations.jsonl").is_file()
    server.faults.heal()
    assert copy_of(url, other).join(fresh=False)
    assert (other / "metrics.jsonl").read_text() == "{}\n"


def test_a_bucket_that_is_away_is_no_bad_copy(
    url: str, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older copy in place of the newest would be lost work, and the next upload would remove the newest."""
    here, other = tmp_path / "run", tmp_path / "other"
    for step in (2, 4):
        save(here, step)
        assert push(url, here, step) == ""
    assert copy_of(url, other).join(fresh=False)
    left = checkpoints_dir(other) / f".tmp-{step_name(4)}-of-the-dead"
    left.mkdir(parents=True)
    said: list[str] = []
    server.faults.match = lambda method, path: method == "GET" and "step-00000004/rank" in path
    server.faults.refuse = 1000
    with pytest.raises(StorageAwayError, match=r"could not read checkpoints/step-00000004/rank-00000"):
        copy_of(url, other).fetch(ALONE, said.append)
    server.faults.heal()

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(storage.os, "pwrite", full)
        with pytest.raises(ValueError, match=r"No space left on device: .*step-00000004.*rank-00000"):
            copy_of(url, other).fetch(ALONE, said.append)
    assert said == []
    assert list(checkpoints_dir(other).iterdir()) == []
    copy_of(url, other).fetch(ALONE, said.append)
    assert steps(other) == [4]


def test_what_a_run_cannot_make_anew_comes_with_the_copy(url: str, tmp_path: Path, server: Server) -> None:
    """Its judges, what it validates on, and the errors of a reference that it has left; not the single blocks."""
    here, other = tmp_path / "run", tmp_path / "other"
    save(here, 2)
    kept = {
        judges.FILE: b"{}",
        f"{validation_data.FOLDER}/{generation_log.FILE}": b"{}\n",
        f"{reference_pass.FOLDER}/0a1b/about.json": b"{}",
        f"{reference_pass.FOLDER}/0a1b/errors.npy": b"errors of the starting weights",
    }
    for name, data in {**kept, "reference/2c3d/block-00000001.npy": b"1", "validation/index/x": b"1"}.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(data)
    assert push(url, here, 2) == ""
    save(here, 4)
    server.faults.paths.clear()
    assert push(url, here, 4) == ""
    assert not [path for method, path in server.faults.paths if method == "PUT" and "reference/" in path]  # not again
    assert copy_of(url, other).join(fresh=False)
    copy_of(url, other).fetch(ALONE, lambda _: None)
    assert steps(other) == [4]
    for name, data in kept.items():
        assert (other / name).read_bytes() == data
    assert len(list((other / "reference").rglob("*.npy"))) == 1
    assert [file.name for file in (other / "validation").iterdir()] == ["generations.jsonl"]
