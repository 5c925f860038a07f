"""Faults of single pictures and of memory, injected for real into real Ray actors: what is left over is exactly what an
undisturbed run makes, without the picture that is to blame. One Ray serves all tests of this file."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from marked_ray import clear, ray_with_marks
from producer_world import rows_of
from undisturbed import assert_same, produce_quietly, words, write_source

from producers.poison import POISON, trail_file
from qwenimg_dist.commands.main import main
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.schema import ROWS, SCAN


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("faults") / "source", 20, 18)


@pytest.fixture(scope="module")
def calm(source: Path) -> Dataset:
    return produce_quietly(source, source.parent / "undisturbed")


@pytest.fixture(scope="module")
def fault_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with ray_with_marks(
        tmp_path_factory.mktemp("marks"), "cluster.producers=2", "cluster.cpus_per_producer=3"
    ) as folder:
        yield folder


@pytest.fixture
def marks(fault_dir: Path) -> Iterator[Path]:
    yield fault_dir
    clear(fault_dir)


def mark(marks: Path, point: str, file: Path, word: str) -> None:
    (marks / f"{point}@{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}").write_text(word)


@pytest.mark.slow
def test_pictures_that_crash_their_process_are_found_among_several_threads_and_the_rest_is_kept(
    source: Path, calm: Dataset, marks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for row in (6, 8):
        mark(marks, "decode", source / f"{row:03d}.png", "crash")
    command = [*words(source, tmp_path / "data"), "cluster.cpus_per_producer=3", "cluster.unit_retries=1"]
    assert main(["produce", *command]) == 0, capsys.readouterr().err
    dataset = Dataset.open(tmp_path / "data")
    decided = rows_of(dataset, ROWS)
    assert {row for row, entry in decided.items() if entry["reason"] == POISON} == {6, 8}
    assert decided[6]["status"] == "fault"
    assert "crashed in native code" in decided[6]["detail"]
    assert_same(dataset, calm, but={6, 8})
    # The verdict lasts: no later run opens the picture again, though this one must open all others.
    again = [*command, "encode.resolutions=[64,96]", "filters.aspect.max_ratio=2.5", "cluster.unit_retries=0"]
    assert main(["produce", *again]) == 0, capsys.readouterr().err
    assert {row for row, entry in rows_of(dataset, ROWS).items() if entry["reason"] == POISON} == {6, 8}
    assert "nothing to do" not in capsys.readouterr().out
    assert main(["produce", *again]) == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.slow
def test_a_picture_that_crashes_the_scan_is_left_out_too(
    source: Path, calm: Dataset, marks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark(marks, "scan", source / "012.png", "crash")
    assert main(["produce", *words(source, tmp_path / "data")]) == 0, capsys.readouterr().err
    dataset = Dataset.open(tmp_path / "data")
    assert rows_of(dataset, SCAN)[12]["fault"] == rows_of(dataset, ROWS)[12]["reason"] == POISON
    rows = rows_of(dataset, ROWS)
    assert {row: entry for row, entry in rows.items() if row != 12} == {
        row: entry for row, entry in rows_of(calm, ROWS).items() if row != 12
    }


@pytest.mark.slow
def test_too_much_poison_blames_the_machine_and_records_nothing(
    source: Path, calm: Dataset, marks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark(marks, "decode", source / "006.png", "crash")
    command = [*words(source, tmp_path / "data"), "cluster.max_poison_rows=0"]
    assert main(["produce", *command]) == 1
    err = capsys.readouterr().err
    assert "unit 1: 1 pictures seem to kill the process that opens them (rows 6," in err
    assert "cluster.max_poison_rows=0" in err
    dataset = Dataset.open(tmp_path / "data")
    assert all(entry["fault"] is None for entry in rows_of(dataset, SCAN).values())
    assert not trail_file(dataset.root, "encode", 1).exists()
    for each in marks.iterdir():
        each.unlink()
    assert main(["produce", *command]) == 0, capsys.readouterr().err
    assert_same(dataset, calm)


@pytest.mark.slow
def test_a_run_that_was_ended_halfway_to_the_culprit_is_taken_up_there(
    source: Path, calm: Dataset, marks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark(marks, "decode", source / "006.png", "crash")
    command = [*words(source, tmp_path / "data"), "cluster.unit_retries=0"]
    assert main(["produce", *command]) == 1
    assert "unit 1: encode failed 1 times" in capsys.readouterr().err
    file = trail_file(tmp_path / "data", "encode", 1)
    file.parent.mkdir()
    file.write_text('{"opening": 6, "deaths": {}, "poison": {}}')  # as if it had died in a careful try
    assert main(["produce", *command]) == 0, capsys.readouterr().err
    dataset = Dataset.open(tmp_path / "data")
    assert rows_of(dataset, ROWS)[6]["reason"] == POISON
    assert_same(dataset, calm, but={6})


def test_a_producer_out_of_memory_is_replaced_and_nothing_differs(
    source: Path, calm: Dataset, marks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark(marks, "decode", source / "013.png", "starve")
    assert main(["produce", *words(source, tmp_path / "data")]) == 0, capsys.readouterr().err
    assert not list(marks.iterdir())
    assert_same(Dataset.open(tmp_path / "data"), calm)


@pytest.mark.slow
def test_memory_that_never_suffices_is_named(
    source: Path, marks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark(marks, "decode", source / "013.png", "starve")
    assert main(["produce", *words(source, tmp_path / "data"), "cluster.unit_retries=0"]) == 1
    err = capsys.readouterr().err
    assert "unit 2: encode failed 1 times" in err
    assert "the producer ran out of memory" in err or "the kernel for lack of memory" in err


@pytest.mark.slow
def test_files_that_change_or_vanish_between_runs_are_faults_and_come_back(
    source: Path, marks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = shutil.copytree(source, tmp_path / "pictures")
    calm = produce_quietly(pictures, tmp_path / "calm")
    command = words(pictures, tmp_path / "data")
    mark(marks, "decode", pictures / "003.png", "starve")
    assert main(["produce", *command, "cluster.unit_retries=0"]) == 1  # scanned, but not encoded
    changed, gone = (pictures / "002.png").read_bytes(), (pictures / "004.png").read_bytes()
    shutil.copy(pictures / "001.png", pictures / "002.png")
    (pictures / "004.png").unlink()
    assert main(["produce", *command]) == 0, capsys.readouterr().err
    dataset = Dataset.open(tmp_path / "data")
    reasons = {row: entry["reason"] for row, entry in rows_of(dataset, ROWS).items() if entry["status"] == "fault"}
    assert reasons == {2: "changed_file", 4: "missing_file", 10: "truncated"}
    (pictures / "002.png").write_bytes(changed)
    (pictures / "004.png").write_bytes(gone)
    assert main(["produce", *command]) == 0, capsys.readouterr().err
    assert_same(dataset, calm, but={2})
    assert rows_of(dataset, ROWS)[2]["reason"] == "changed_file"  # what was seen to change is not trusted again


def listed(root: Path) -> set[str]:
    """Files but for locks and the look at the source that the funnel's reader may want."""
    names = {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()}
    return {name for name in names if not name.startswith(".") and name != "source.json"}


@pytest.mark.usefixtures("fault_dir")
def test_producers_that_no_machine_can_hold_are_refused_before_anything_is_written(
    source: Path, calm: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, pictures = tmp_path / "data", tmp_path / "pictures"
    too_much = "cluster.gpus_per_producer=64"
    assert main(["produce", *words(source, data), too_much]) == 2
    assert "a producer needs 1 CPUs and 64 GPUs on one machine" in capsys.readouterr().err
    assert not data.exists()
    # Nor is anything listed, or said to be unfinished, in a data set that is there.
    shutil.copytree(source, pictures)
    shutil.copytree(calm.root, data)
    assert main(["produce", *words(source, data), too_much]) == 0  # nothing to do needs no producer
    (pictures / "new.png").write_bytes((source / "003.png").read_bytes())
    (pictures / "new.txt").write_text("another picture")
    assert main(["produce", *words(pictures, data), too_much]) == 2
    assert main(["produce", *words(source, data), too_much, "filters.resolution.min_side=80"]) == 2
    assert listed(data) == listed(calm.root)
