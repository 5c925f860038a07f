"""Objects of a bucket under faults: bursts of 503, answers that stop, lost answers, replaced and missing objects."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import BUCKET, Server, s3_server

from qwenimg_dist import storage as module
from qwenimg_dist.storage import ObjectChangedError, Patience, Storage, StorageError, check_url, is_remote

HASTY = Patience(attempts=8, first_s=0.02, longest_s=0.1, call_s=20)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def store(server: Server, request: pytest.FixtureRequest) -> Iterator[Storage]:
    yield Storage(f"s3://{BUCKET}/{request.node.name}", patience=HASTY)
    server.faults.heal()


def test_what_is_written_is_listed_read_and_removed(store: Storage, tmp_path: Path) -> None:
    assert store.list() == {}
    assert store.folders() == set()
    assert store.look("a") is None
    store.write("a", b"1")
    store.write("rows/unit-000001.000.parquet", b"22")
    store.write("rows/unit-000010.000.parquet", b"333")
    assert {name: one.size_bytes for name, one in store.list().items()} == {
        "a": 1,
        "rows/unit-000001.000.parquet": 2,
        "rows/unit-000010.000.parquet": 3,
    }
    assert list(store.list("rows", prefix="unit-000001.")) == ["rows/unit-000001.000.parquet"]
    assert store.list("row") == {}  # a folder is not the beginning of a name
    assert store.folders() == {"rows"}
    store.fetch("a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == store.read("a") == b"1"
    store.remove(["a", "never"])
    with pytest.raises(FileNotFoundError):
        store.read("a")
    with pytest.raises(FileNotFoundError):
        Storage("s3://no-such-bucket/x", patience=HASTY).list()


def test_a_large_file_goes_and_comes_in_parts(
    store: Storage, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(module, "_PART_BYTES", 5 << 20)
    content = os.urandom((11 << 20) + 5)
    (tmp_path / "there").write_bytes(content)
    server.faults.refuse_every = 5
    store.upload(tmp_path / "there", "big")
    server.faults.refuse_every = 4
    store.fetch("big", tmp_path / "back", size_bytes=len(content))
    assert (tmp_path / "back").read_bytes() == content
    assert server.faults.seen["503"] > 3


def test_create_never_overwrites_and_knows_its_own(store: Storage, server: Server) -> None:
    assert store.write("part", b"first", create=True)
    assert not store.write("part", b"second", create=True)
    assert store.read("part") == b"first"
    server.faults.match = lambda method, path: path.endswith("own")
    server.faults.lose_answer = 1
    assert store.write("own", b"mine", create=True)  # the second try meets what the first one made
    server.faults.match = lambda method, path: True
    assert store.read("own") == b"mine"


def test_a_burst_of_503_is_waited_out_and_a_lasting_one_told(store: Storage, server: Server) -> None:
    store.write("a", b"1")
    server.faults.refuse = 6
    assert store.read("a") == b"1"
    server.faults.refuse = 10_000
    with pytest.raises(
        StorageError, match=r"s3://bucket/.*: could not read a after 2 tries \(.*(reduce your|Unavailable)"
    ):
        Storage(store.url, patience=Patience(attempts=2, first_s=0.01)).read("a")


def test_a_burst_is_waited_out_for_about_two_minutes_by_default() -> None:
    patience = Patience()
    waits = [patience.wait_s(attempt) for attempt in range(patience.attempts - 1)]
    assert 75 < sum(waits) < 155


def test_calls_with_a_time_limit_end_by_it(store: Storage, server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    in_time = store.within(30.0, "a key")
    in_time.upload(tmp_path / "file", "a")
    server.faults.refuse = 10_000
    patient = Storage(store.url, patience=Patience(attempts=10_000, first_s=0.01, longest_s=0.05))
    begin = time.monotonic()
    limited = patient.within(1.0, "a key")
    for name in "bc":  # the second one finds no time left
        with pytest.raises(StorageError, match=rf"could not upload {name} within 1 s \(a key\) \("):
            limited.upload(tmp_path / "file", name)
    assert time.monotonic() - begin < 10
    assert in_time.patience is store.patience


def test_an_answer_that_stops_is_asked_for_again(store: Storage, server: Server) -> None:
    store.write("a", b"0123456789" * 1000)
    server.faults.stall, server.faults.stall_s = 1, 3.0
    impatient = Storage(store.url, patience=Patience(attempts=3, first_s=0.01, call_s=1.0))
    assert impatient.read_range("a", 0, 10_000) == b"0123456789" * 1000
    assert server.faults.stall == 0


def test_an_object_that_is_not_what_was_committed_is_refused(
    store: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write("a", b"1234")
    with pytest.raises(ObjectChangedError, match="has 4 bytes, 5 were committed"):
        store.fetch("a", tmp_path / "a", size_bytes=5)
    fetch_range = Storage._fetch_range

    def replaced_meanwhile(self: Storage, name: str, handle: int, start: int, size_bytes: int) -> None:
        fetch_range(self, name, handle, start, size_bytes)
        store.write("a", b"4321")

    monkeypatch.setattr(Storage, "_fetch_range", replaced_meanwhile)
    with pytest.raises(ObjectChangedError, match="was replaced while it was read"):
        store.fetch("a", tmp_path / "a", size_bytes=4)


def test_missing_credentials_are_told_at_once(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(StorageError, match=r"could not read a \(.*credentials"):
            Storage(f"s3://{BUCKET}/x").read("a")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("s3://key:secret@bucket/x", "must hold no credentials"),
        ("s3://bucket/x?X-Amz-Signature=1", "must hold no credentials"),
        ("gs://bucket/x", "only s3://BUCKET/FOLDER"),
        ("s3://bucket", "name a bucket and a folder"),
        ("s3:///x", "name a bucket and a folder"),
    ],
)
def test_refused_urls(url: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as refused:
        check_url(url, "data.path")
    assert "secret" not in str(refused.value)


def test_what_is_a_url() -> None:
    assert is_remote("s3://a/b")
    assert not is_remote("/a/b")
    assert not is_remote("file:///a")
    assert not is_remote(None)
