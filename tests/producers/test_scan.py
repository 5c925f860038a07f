"""The scan of rows whose files are damaged, cannot be had, or raise what nobody foresaw."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from producer_world import SCORERS, FakeEncoders, draw, make_plan_for, produce_here, rows_of

from producers import pictures, scan
from producers.actor import describe_failure
from producers.listing import sync_listing
from producers.poison import Watch, read_trail, trail_file
from producers.sources.base import SourceRow, TooLargeError, read_bytes
from producers.unit import produce_unit
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.schema import ROWS, SCAN

PLAN = make_plan_for()


def broken(*args: object) -> None:
    raise KeyError("surprise")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for number in range(2):
        draw(tmp_path / "source" / f"{number}.png", number, caption=f"caption {number}")
    return tmp_path / "source"


@pytest.mark.parametrize(("root", "num_threads", "together"), [("http://host", 1, 8), ("/local", 3, 3)])
def test_files_are_read_together_and_rows_stay_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str, num_threads: int, together: int
) -> None:
    """Each waits until so many are open: fewer at a time would wait for ever."""
    dataset = Dataset.create(tmp_path / "data", 24)
    rows = [SourceRow(uri=f"{number}.png", captions=("words",)) for number in range(24)]
    sync_listing(dataset, rows, config_hash="x", before_commit=lambda: None)
    open_now = threading.Barrier(together, timeout=20)

    def read(given_root: str, uri: str) -> bytes:
        open_now.wait()
        raise FileNotFoundError(uri)

    monkeypatch.setattr(scan, "read_bytes", read)
    assert scan.scan_unit(dataset, 0, root=root, config_hash="x", num_threads=num_threads) == 24
    (part,) = dataset.parts(SCAN)
    table = dataset.read(part)
    assert table["row"].to_pylist() == list(range(24))
    assert set(table["fault"].to_pylist()) == {"missing_file"}


def test_a_careful_scan_opens_one_file_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Dataset.create(tmp_path / "data", 24)
    rows = [SourceRow(uri=f"{number}.png", captions=("words",)) for number in range(24)]
    sync_listing(dataset, rows, config_hash="x", before_commit=lambda: None)
    alone = threading.Lock()

    def read(root: str, uri: str) -> bytes:
        assert alone.acquire(blocking=False), "another is open"
        time.sleep(0.001)
        trail = read_trail(trail_file(dataset.root, "scan", 0))
        assert trail is not None
        assert uri == f"{trail.opening}.png"
        alone.release()
        raise FileNotFoundError(uri)

    monkeypatch.setattr(scan, "read_bytes", read)
    watch = Watch(dataset.root, "scan", 0, why="", limit=4)
    assert scan.scan_unit(dataset, 0, root="http://host", config_hash="x", num_threads=8, watch=watch) == 24


def test_what_nobody_foresaw_names_row_and_file(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Dataset.create(tmp_path / "data", 4)
    with monkeypatch.context() as patched:
        patched.setattr(scan, "open_file", broken)
        with pytest.raises(KeyError) as caught:
            produce_here(source, dataset, PLAN, FakeEncoders())
    failure = describe_failure(caught.value)
    assert failure.kind == "fatal"
    assert failure.message == "KeyError: 'surprise' at row 0 (0.png)"
    for place in ("load_image", "render"):
        with monkeypatch.context() as patched:
            patched.setattr(pictures, place, broken)
            with pytest.raises(KeyError) as caught:
                produce_here(source, dataset, PLAN, FakeEncoders())
        assert describe_failure(caught.value).message == "KeyError: 'surprise' at row 0 (0.png)", place
        with monkeypatch.context() as patched:
            patched.setattr(pictures, place, broken)
            options = {"plan": PLAN, "root": str(source), "encoders": FakeEncoders(), "scorers": SCORERS}
            with pytest.raises(KeyError) as caught:
                produce_unit(dataset, 0, num_threads=2, **options)
        assert describe_failure(caught.value).message == "KeyError: 'surprise' at row 0 (0.png)", place
    produce_here(source, dataset, PLAN, FakeEncoders())
    assert [entry["status"] for entry in rows_of(dataset, ROWS).values()] == ["kept", "kept"]
    assert len(rows_of(dataset, SCAN)) == 2


def test_a_file_of_many_gigabytes_is_a_fault_of_its_row_and_not_read(source: Path, tmp_path: Path) -> None:
    with open(source / "film.png", "wb") as file:
        file.truncate(40 * 1024**3)  # sparse
    with pytest.raises(TooLargeError):
        read_bytes(str(tmp_path), "tar:films.tar#film.png@512+42949672960")
    dataset = Dataset.create(tmp_path / "data", 24)
    rows = [SourceRow(uri=name, captions=("words",)) for name in ("0.png", "film.png", "1.png")]
    sync_listing(dataset, rows, config_hash="x", before_commit=lambda: None)
    scan.scan_unit(dataset, 0, root=str(source), config_hash="x")
    scanned = rows_of(dataset, SCAN)
    assert [entry["fault"] for entry in scanned.values()] == [None, "file_too_large", None]
    assert "40.0 GiB, over 2" in scanned[1]["detail"]
