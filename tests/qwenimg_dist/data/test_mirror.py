"""A data set in a bucket: committed by a PUT, seen alike by every machine, read through a cache with a limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cache_size import tar_bytes
from fake_dataset import FakeProducer, make_rows
from s3_server import BUCKET, Server, objects, s3_server

from qwenimg_dist import storage
from qwenimg_dist.config.data import DataConfig
from qwenimg_dist.data import mirror as module
from qwenimg_dist.data.catalog import Catalog, Ints, Places
from qwenimg_dist.data.catalog_build import build_catalog
from qwenimg_dist.data.catalogs import CatalogFolder, Catalogs
from qwenimg_dist.data.facets import DataError, Dataset
from qwenimg_dist.data.generation_maker import source_complete
from qwenimg_dist.data.mirror import Mirror, data_root
from qwenimg_dist.data.origin import Origin, read_origin, remember_origin
from qwenimg_dist.data.pins import ready_units
from qwenimg_dist.data.reader import TarReader
from qwenimg_dist.data.tar_cache import FETCHING
from qwenimg_dist.files import write_json
from qwenimg_dist.schema import LISTING, ROWS, SOURCE_COMPLETE, Bucket
from qwenimg_dist.storage import Patience, Storage, StorageError

HELPERS = Path(__file__).resolve().parents[2] / "helpers"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def url(server: Server, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(storage, "PATIENCE", Patience(attempts=3, first_s=0.02))
    yield f"s3://{BUCKET}/{request.node.name}/data"
    server.faults.heal()


def machine(url: str, folder: Path, cache_bytes: int = 1 << 30) -> Path:
    """Where a machine with a disk of its own has the data set."""
    return data_root(url, DataConfig(path=url, cache=str(folder), cache_bytes=cache_bytes))


def opened(url: str, folder: Path, cache_bytes: int = 1 << 30) -> Dataset:
    dataset = Dataset.open(machine(url, folder, cache_bytes))
    dataset.refresh()
    return dataset


def filled(url: str, folder: Path, num: int = 12) -> FakeProducer:
    producer = FakeProducer(machine(url, folder), max_shard_bytes=3000)
    producer.add(make_rows(num, captions=2))
    producer.produce(complete=True)
    return producer


def open_run(dataset: Dataset, run: Path) -> tuple[Catalogs, Catalog]:
    catalog = Catalog.open(run, dataset.root)
    catalogs = Catalogs(dataset.root)
    catalogs.add(CatalogFolder(folder=run, num_rows=catalog.num_rows, num_texts=catalog.num_texts))
    return catalogs, catalog


def latents(catalogs: Catalogs, rows: Ints) -> Iterator[Places]:
    for _, _, places in catalogs.latents_places(rows, 32, Bucket(height=32, width=32)):
        yield places


def read(reader: TarReader, places: Places) -> list[bytes]:
    out = [np.empty(n, dtype=np.uint8) for n in places.nbytes]
    reader.read(places, out)
    return [one.tobytes() for one in out]


def read_all(dataset: Dataset, producer: FakeProducer, run: Path, reader: TarReader) -> list[bytes]:
    """Latents and features of all rows, through a catalog of this machine."""
    build_catalog(dataset, ready_units(dataset, producer.facets), producer.facets, run)
    catalogs, catalog = open_run(dataset, run)
    found = [one for places in latents(catalogs, np.arange(catalog.num_rows)) for one in read(reader, places)]
    for _, _, places in catalogs.text_places(np.arange(catalog.num_texts)):
        found += read(reader, places)
    return found


def test_another_machine_reads_what_was_committed_under_a_limit_smaller_than_the_data(
    url: str, tmp_path: Path, server: Server
) -> None:
    producer = filled(url, tmp_path / "a")
    local = FakeProducer(tmp_path / "local", max_shard_bytes=3000)
    local.add(producer.rows)
    local.produce(complete=True)
    tars = {name: size for name, size in objects(url.removeprefix(f"s3://{BUCKET}/")).items() if name.endswith(".tar")}
    limit = 5 * max(tars.values())
    assert limit < sum(tars.values()) / 2

    server.faults.refuse_every = 9
    dataset = opened(url, tmp_path / "b", limit)
    assert source_complete(dataset) == source_complete(local.dataset) == 3
    assert [unit.unit for unit in ready_units(dataset, producer.facets)] == [0, 1, 2]
    assert dataset.mirror is not None
    most, watching = [0], threading.Event()

    def watch() -> None:
        while not watching.wait(0.005):
            most[0] = max(most[0], tar_bytes(dataset.root))

    watcher = threading.Thread(target=watch)
    watcher.start()
    reader = TarReader()
    got = read_all(dataset, producer, tmp_path / "run-b", reader)
    again = read_all(dataset, producer, tmp_path / "run-b2", reader)
    watching.set()
    watcher.join()
    assert got == again == read_all(local.dataset, local, tmp_path / "run-local", TarReader())
    assert 0 < most[0] <= limit
    assert dataset.mirror.tars.num_bytes() <= limit
    assert server.faults.seen["503"] > 5


def test_a_part_is_committed_once_by_whoever_was_first(url: str, tmp_path: Path) -> None:
    first, second = (FakeProducer(machine(url, tmp_path / name)) for name in "ab")
    for producer in (first, second):
        producer.add(make_rows(4))
    first.produce()
    before = objects()
    facet = first.facets.text
    part = second.dataset.next_part(facet, 0)
    assert part.part == 0  # this machine has not looked yet
    assert second._text(0, dict(enumerate(second.rows)))
    assert objects() == before, "neither the parquet nor a tar of the second try may stay"
    assert second.dataset.read(part).equals(first.dataset.read(part))
    assert second.dataset.tars(part) == first.dataset.tars(part)


@pytest.mark.parametrize("point", [pytest.param("upload", marks=pytest.mark.slow), "upload_commit"])
def test_a_producer_killed_in_an_upload_leaves_no_half_unit_and_goes_on(
    url: str, tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = tmp_path / "faults"
    faults.mkdir()
    # The uploads of unit 0 are text and latents; unit 1 dies in its second one.
    (faults / (f"{point}@4" if point == "upload" else f"{point}@10")).touch()
    code = (
        "import sys; from pathlib import Path; from fake_dataset import FakeProducer, make_rows\n"
        "one = FakeProducer(Path(sys.argv[1])); one.add(make_rows(12)); one.produce(complete=True)"
    )
    root = machine(url, tmp_path / "a")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HELPERS), str(HELPERS.parents[1])])}
    command = [sys.executable, "-c", code, str(root)]
    died = subprocess.run(command, env={**env, "QWENIMG_DIST_FAULT_DIR": str(faults)}, check=False, timeout=120)
    assert died.returncode == -signal.SIGKILL
    producer = FakeProducer(tmp_path / "unused")
    seen = opened(url, tmp_path / "b")
    assert [unit.unit for unit in ready_units(seen, producer.facets)] == [0]
    assert source_complete(seen) is None
    named = {f"{f}/{tar.name}" for f in seen.facets() for part in seen.parts(f) for tar in seen.tars(part)}
    there = {name for name in Storage(url).list() if name.endswith(".tar")}
    assert named < there if point == "upload_commit" else named == there

    # The machine that died is gone: another one goes on.
    subprocess.run([sys.executable, "-c", code, str(machine(url, tmp_path / "c"))], env=env, check=True, timeout=120)
    seen.refresh()
    assert [unit.unit for unit in ready_units(seen, producer.facets)] == [0, 1, 2]
    assert source_complete(seen) == 3
    assert seen.mirror is not None
    seen.mirror.clean()
    assert {name for name in Storage(url).list() if name.endswith(".tar")} >= there, "too young to be nobody's"
    monkeypatch.setattr(module, "STRAY_S", -10.0)
    seen.mirror.clean()
    named = {f"{f}/{tar.name}" for f in seen.facets() for part in seen.parts(f) for tar in seen.tars(part)}
    assert {name for name in Storage(url).list() if name.endswith(".tar")} == named


def test_a_reader_names_what_is_missing_and_passes_on_that_the_bucket_cannot_be_reached(
    url: str, tmp_path: Path, server: Server
) -> None:
    producer = filled(url, tmp_path / "a", num=4)
    dataset = opened(url, tmp_path / "b")
    reader = TarReader()
    read_all(dataset, producer, tmp_path / "run", reader)
    first = next(latents(open_run(dataset, tmp_path / "run")[0], np.arange(1)))
    for file in dataset.root.rglob("*.tar"):
        file.unlink()
    server.faults.refuse = 100_000
    with pytest.raises(StorageError, match=r"could not look at .*\.tar after 3 tries"):
        read(reader, first)
    server.faults.heal()
    victim = next(name for name in Storage(url).list("latents-32-0123456789ab") if name.endswith(".tar"))
    Storage(url).remove([victim])
    with pytest.raises(DataError, match=rf"{Path(victim).name} is not in s3://.*reading sample"):
        read(reader, first)
    Storage(url).write(victim, b"short")
    with pytest.raises(DataError, match=r"has 5 bytes, \d+ were committed"):
        read(reader, first)


def test_a_tar_in_use_stays_and_what_the_dead_left_goes(url: str, tmp_path: Path) -> None:
    filled(url, tmp_path / "a", num=8)
    dataset = opened(url, tmp_path / "b", cache_bytes=1)
    assert dataset.mirror is not None
    cache = dataset.mirror.tars
    tars = [(n, o.size_bytes) for n, o in Storage(url).list().items() if n.endswith(".tar")][:3]
    left = dataset.root / FETCHING / "of-the-dead.tar"
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"half")
    handle = cache.open(*tars[0])
    assert not left.exists()
    for name, size in tars[1:]:
        os.close(cache.open(name, size))
    here = {str(file.relative_to(dataset.root)) for file in dataset.root.rglob("*.tar")}
    assert here == {tars[0][0], tars[2][0]}, "the one in use, and the last one, though the limit is passed"
    cache.trim()
    cache.fetch(*tars[1], ahead=True)  # which nobody waits for
    here = {str(file.relative_to(dataset.root)) for file in dataset.root.rglob("*.tar")}
    assert here == {tars[0][0]}, "nothing ahead of need passes the limit"
    os.close(handle)
    cache.trim()
    assert not list(dataset.root.rglob("*.tar"))
    # A tar whose parquet is not here is one that a producer is about to commit.
    (dataset.root / ROWS / "unit-000099.000-abcd-000.tar").write_bytes(b"1")
    cache.trim()
    assert len(list(dataset.root.rglob("*.tar"))) == 1


def test_a_machine_that_never_looks_at_the_index_keeps_the_limit(url: str, tmp_path: Path) -> None:
    """A run that follows its producers: rank 0's machine alone brings the parquets."""
    filled(url, tmp_path / "a", num=8)
    mirror = Mirror.of(machine(url, tmp_path / "b", cache_bytes=1))
    assert mirror is not None
    tars = [(n, o.size_bytes) for n, o in Storage(url).list().items() if n.endswith(".tar")][:3]
    for name, size in tars:
        os.close(mirror.tars.open(name, size))
    assert {str(file.relative_to(mirror.root)) for file in mirror.root.rglob("*.tar")} == {tars[2][0]}
    assert mirror.tars.num_bytes() == tars[2][1]
    assert not list(mirror.root.rglob("*.parquet"))


def test_a_store_that_overwrites_what_is_committed_is_refused(url: str, tmp_path: Path, server: Server) -> None:
    server.faults.overwrite = True
    with pytest.raises(DataError, match=rf"{url}: this store overwrites .* use a store with conditional writes"):
        Dataset.create(machine(url, tmp_path), 4)
    assert Storage(url).list() == {}
    server.faults.heal()
    Dataset.create(machine(url, tmp_path), 4)
    assert list(Storage(url).list()) == ["dataset.json"]


def test_many_readers_of_one_tar_fetch_it_once(url: str, tmp_path: Path, server: Server) -> None:
    filled(url, tmp_path / "a", num=4)
    dataset = opened(url, tmp_path / "b")
    assert dataset.mirror is not None
    name, entry = next((n, o) for n, o in Storage(url).list().items() if n.endswith(".tar"))
    server.faults.paths.clear()
    handles: list[int] = []
    cache = dataset.mirror.tars
    threads = [threading.Thread(target=lambda: handles.append(cache.open(name, entry.size_bytes))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        os.close(handle)
    assert len(handles) == 6
    assert sum(method == "GET" and path.endswith(name) for method, path in server.faults.paths) == 1


def test_what_changed_in_the_bucket_is_noticed(url: str, tmp_path: Path) -> None:
    filled(url, tmp_path / "a", num=8)
    dataset = opened(url, tmp_path / "b")
    bucket = Storage(url)
    bucket.remove([SOURCE_COMPLETE, f"{ROWS}/unit-000001.000.parquet"])
    dataset.refresh()
    assert source_complete(dataset) is None
    assert dataset.units(ROWS) == [0]
    bucket.write(f"{LISTING}/unit-000000.000.parquet", b"another")
    with pytest.raises(DataError, match="parts never change"):
        dataset.refresh()
    bucket.write("dataset.json", b'{"schema_version": 1, "unit_size": 5}')
    with pytest.raises(DataError, match="holds another data set"):
        Dataset.open(dataset.root)
    with pytest.raises(DataError, match="is not a data set"):
        Dataset.open(machine(f"{url}/none", tmp_path / "b"))


def test_a_mirror_says_what_it_mirrors_and_a_new_limit_holds(url: str, tmp_path: Path) -> None:
    root = machine(url, tmp_path, cache_bytes=5)
    assert machine(url, tmp_path, cache_bytes=7) == root
    mirror = Mirror.of(root)
    assert mirror is not None
    assert (mirror.url, mirror.max_bytes) == (url, 7)
    assert Mirror.of(tmp_path) is None
    assert data_root("/plain/path", DataConfig()) == Path("/plain/path")
    write_json(root / ".remote.json", {})
    assert Mirror.of(root) is None


def test_where_the_pictures_came_from_is_known_on_another_machine(url: str, tmp_path: Path) -> None:
    origin = Origin(kind="folder", root="/pictures")
    remember_origin(Dataset.create(machine(url, tmp_path / "a"), 4), origin)
    assert read_origin(opened(url, tmp_path / "b")) == origin
