"""Tars, manifests and pictures on s3:// are listed and read as those on a disk; an outage is no fault of a row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from producer_world import SCORERS, FakeEncoders, draw, make_plan_for, rows_of
from s3_server import BUCKET, Server, s3_server
from tar_samples import samples, write_tar

from producers.driver import Driver
from producers.sources import open_source, remote
from producers.sources.base import Found, SourceGoneError, read_bytes
from producers.workers import InlineWorkers
from qwenimg_dist import storage
from qwenimg_dist.config import ManifestSource, WebdatasetSource
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.schema import ROWS
from qwenimg_dist.storage import Patience, Storage, StorageError


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def url(server: Server, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(storage, "PATIENCE", Patience(attempts=3, first_s=0.02))
    yield f"s3://{BUCKET}/{request.node.name}"
    server.faults.heal()


def find(path: Any) -> tuple[Found, str]:
    source = open_source(WebdatasetSource(kind="webdataset", path=path))
    found = source.find()
    return replace(found, rows=list(found.rows)), source.root


def test_tars_of_a_bucket_give_the_rows_and_bytes_of_those_on_a_disk(url: str, tmp_path: Path, server: Server) -> None:
    for name, first in (("a/000.tar", 0), ("a/001.tar", 3), ("a/002.tar", 6), ("b/000.tar", 9)):
        Storage(url).upload(write_tar(tmp_path / name, samples(first, first + 3)), name)
    local, _ = find(str(tmp_path / "a"))
    server.faults.refuse_every = 5
    for path in (f"{url}/a", f"{url}/a/*.tar", url + "/a/{000..002}.tar"):
        found, root = find(path)
        assert root == f"{url}/a"
        assert list(found.rows) == list(local.rows)
    for row in found.rows:
        assert read_bytes(root, row.uri) == read_bytes(str(tmp_path / "a"), row.uri)
    both, root = find((f"{url}/a/001.tar", f"{url}/b"))
    assert root == url
    assert len(list(both.rows)) == 6
    assert read_bytes(root, list(both.rows)[-1].uri) == b"picture 11" * 40
    server.faults.heal()

    uri = list(local.rows)[4].uri
    Storage(url).upload(write_tar(tmp_path / "other.tar", samples(0, 1)), "a/001.tar")
    with pytest.raises(FileNotFoundError, match="was written anew"):
        read_bytes(f"{url}/a", uri)
    server.faults.refuse = 100_000
    with pytest.raises(SourceGoneError, match="after 3 tries"):
        read_bytes(f"{url}/a", uri)
    with pytest.raises(StorageError):
        find(f"{url}/a")


def test_each_tar_is_fetched_once_and_again_only_when_it_was_written_anew(
    url: str, tmp_path: Path, server: Server
) -> None:
    def put(name: str, first: int, last: int) -> None:
        Storage(url).upload(write_tar(tmp_path / name, samples(first, last)), name)

    source = open_source(WebdatasetSource(kind="webdataset", path=url))

    def look(*, rows: bool = True) -> tuple[list[str], dict[str, int]]:
        """Captions of the rows given, and tar -> GETs for it."""
        server.faults.paths.clear()
        found = source.find()
        captions = [row.captions[0] for row in found.rows] if rows else []
        gets = Counter(Path(path).name for method, path in server.faults.paths if method == "GET")
        return captions, {name: count for name, count in gets.items() if name.endswith(".tar")}

    put("000.tar", 0, 2)
    put("001.tar", 2, 4)
    assert look(rows=False)[1] == {"000.tar": 1}
    assert look() == ([f"words {n}" for n in range(4)], {"001.tar": 1})
    assert look() == ([], {})
    put("002.tar", 4, 5)
    put("000.tar", 0, 3)
    assert look() == (["words 0", "words 1", "words 2", "words 4"], {"000.tar": 1, "002.tar": 1})
    # A look that breaks off has perhaps not listed what it walked through.
    put("000.tar", 0, 1)
    server.faults.refuse, server.faults.match = 1000, lambda method, path: method == "GET" and path.endswith("001.tar")
    put("001.tar", 2, 5)
    with pytest.raises(StorageError):
        look()
    server.faults.heal()
    assert look()[0] == ["words 0", "words 2", "words 3", "words 4"]


def test_a_manifest_and_its_pictures_may_lie_in_a_bucket(url: str) -> None:
    store = Storage(url)
    store.write("pictures/a 1?.jpg", b"bytes of a")
    store.write("list.jsonl", b'{"uri": "pictures/a 1?.jpg", "caption": "a"}\n{"uri": "gone.jpg", "caption": "b"}\n')
    source = open_source(ManifestSource(kind="manifest", path=f"{url}/list.jsonl"))
    rows = list(source.find().rows)
    assert [row.captions for row in rows] == [("a",), ("b",)]
    assert source.root == url
    assert read_bytes(source.root, rows[0].uri) == read_bytes("/elsewhere", f"{url}/pictures/a 1?.jpg") == b"bytes of a"
    with pytest.raises(FileNotFoundError):
        read_bytes(source.root, rows[1].uri)
    assert len(list(source.find().rows)) == 2  # a second look, as with follow=true
    with pytest.raises(ValueError, match="is not there"):
        open_source(ManifestSource(kind="manifest", path=f"{url}/none.jsonl")).find()


def test_one_object_that_the_bucket_refuses_is_the_fault_of_its_row(url: str, server: Server) -> None:
    store = Storage(url)
    store.write("open.jpg", b"x")
    store.write("secret.jpg", b"y")
    server.faults.deny = "secret"
    remote._giving.clear()
    for uri in (f"{url}/secret.jpg", "s3://No_Bucket!/a.jpg"):
        with pytest.raises(OSError, match=r"AccessDenied|ParamValidation") as caught:
            read_bytes(url, uri)
        assert not isinstance(caught.value, StorageError | SourceGoneError), uri
    for uri in (f"s3://{BUCKET}", f"s3://{BUCKET}/", "s3://"):
        with pytest.raises(FileNotFoundError):
            read_bytes(url, uri)
    # Where nothing may be listed and nothing was ever read, it may as well be all of the bucket.
    server.faults.deny_lists = True
    with pytest.raises(SourceGoneError, match="secret"):
        read_bytes(url, "secret.jpg")
    assert read_bytes(url, "open.jpg") == b"x"
    with pytest.raises(PermissionError, match="AccessDenied"):
        read_bytes(url, "secret.jpg")


def test_pictures_of_a_tar_written_anew_are_found_at_the_next_look(url: str, tmp_path: Path) -> None:
    pictures = []
    for number in range(5):
        draw(tmp_path / f"{number}.png", number)
        pictures.append((tmp_path / f"{number}.png").read_bytes())

    def upload(*order: int) -> None:
        members = [each for n in order for each in ((f"{n}.png", pictures[n]), (f"{n}.txt", f"words {n}".encode()))]
        Storage(url).upload(write_tar(tmp_path / "a.tar", members), "a.tar")

    dataset, plan = Dataset.create(tmp_path / "data", 4), make_plan_for()
    source = open_source(WebdatasetSource(kind="webdataset", path=url))

    def driver() -> Driver:
        workers = InlineWorkers(dataset, plan, source.root, FakeEncoders(), SCORERS)
        return Driver(dataset=dataset, plan=plan, root=source.root, make_workers=lambda: workers)

    upload(0, 1, 2, 3)
    first = driver()
    num_rows = first.list_source(source.find()).num_rows
    upload(4, 2, 3, 1, 0)  # between listing and scan
    first.produce(first.pending(), num_rows)
    assert {entry["reason"] for entry in rows_of(dataset, ROWS).values()} == {"missing_file"}
    for again in (first, driver()):  # at the next look with `follow`, and nothing to do for another command
        change = again.list_source(source.find())
        again.produce(again.pending(), change.num_rows)
        assert [entry["status"] for entry in rows_of(dataset, ROWS).values()] == ["kept"] * 5
    assert (change.added, change.recaptioned) == (0, 0)


def test_a_tar_that_was_put_back_as_it_was_is_asked_for_again_on_demand(url: str, tmp_path: Path) -> None:
    draw(tmp_path / "0.png", 0)
    tar = write_tar(tmp_path / "a.tar", [("0.png", (tmp_path / "0.png").read_bytes()), ("0.txt", b"words")])
    dataset, plan = Dataset.create(tmp_path / "data", 4), make_plan_for()
    Storage(url).upload(tar, "a.tar")
    source = open_source(WebdatasetSource(kind="webdataset", path=url))

    def produced(*, retry_missing: bool = False, removed: bool = False) -> str:
        workers = InlineWorkers(dataset, plan, source.root, FakeEncoders(), SCORERS)
        driver = Driver(
            dataset=dataset, plan=plan, root=source.root, make_workers=lambda: workers, retry_missing=retry_missing
        )
        num_rows = driver.list_source(source.find()).num_rows
        if removed:
            Storage(url).remove(["a.tar"])
        driver.produce(driver.pending(), num_rows)
        return str(rows_of(dataset, ROWS)[0]["reason"])

    assert produced(removed=True) == "missing_file"
    Storage(url).upload(tar, "a.tar")
    assert produced() == "missing_file"
    assert produced(retry_missing=True) == ""


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("s3://key:secret@bucket/a", "must hold no credentials"),
        ("gs://bucket/a", "only s3://BUCKET/FOLDER"),
        ("pipe:curl", "reads tars on disks, or all of them on s3://"),
        (("s3://a/b", "/local"), "reads tars on disks, or all of them on s3://"),
        (("s3://a/b", "s3://c/d"), "tars of different buckets"),
        ("s3://bucket/none", "names no tar"),
    ],
)
def test_refused(server: Server, path: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        find(path)
