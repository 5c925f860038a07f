"""CPU loaders that feed an encoder (`cluster.loaders_per_producer`): what comes out is what whole producers make, bit
by bit, also when a loader, an encoder or a decoder is killed for real. One Ray serves all tests of this file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from marked_ray import clear, ray_with_marks
from photo_folder import photo
from producer_world import further, rows_of, tensor_at
from undisturbed import assert_same, produce_quietly, words, write_source

from producers.poison import POISON
from qwenimg_dist.commands.main import main
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.schema import ROWS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Two encoders with two loaders each, and room for a third group beside them.
LOADERS = ("cluster.producers=2", "cluster.loaders_per_producer=2", "cluster.cpus_per_loader=0.5")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("loaders") / "source", 40, 36)


@pytest.fixture(scope="module")
def calm(source: Path) -> Dataset:
    return produce_quietly(source, source.parent / "undisturbed")


@pytest.fixture(scope="module")
def fault_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with ray_with_marks(tmp_path_factory.mktemp("marks"), *LOADERS) as folder:
        yield folder


@pytest.fixture
def marks(fault_dir: Path) -> Iterator[Path]:
    yield fault_dir
    clear(fault_dir)


@contextlib.contextmanager
def meanwhile(do: Callable[[], None]) -> Iterator[None]:
    """`do` in a thread; the block ends when both have."""
    thread = threading.Thread(target=do)
    thread.start()
    yield
    thread.join()


def actors(fault_dir: Path, name: str) -> list[psutil.Process]:
    """Processes of our Ray that run this class of actor; others may be on this machine."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            ours = process.environ().get("QWENIMG_DIST_FAULT_DIR") == str(fault_dir)
            if ours and f"ray::{name}" in " ".join(process.info["cmdline"] or []):
                found.append(process)
    return found


def kill_one_at_work(fault_dir: Path, name: str, data: Path, killed: list[int]) -> None:
    """SIGKILL to an actor of this class once the first unit is ready."""
    deadline = time.monotonic() + 300
    while not list(data.glob(f"{ROWS}/*.parquet")):
        if time.monotonic() > deadline:
            return
        time.sleep(0.01)
    for process in actors(fault_dir, name)[:1]:
        process.send_signal(signal.SIGKILL)
        killed.append(process.pid)


def assert_same_bits(dataset: Dataset, calm: Dataset) -> None:
    """Beyond `assert_same`: the tensors are equal, and lie in the same order."""
    assert_same(dataset, calm)
    for facet in calm.facets():
        here, there = rows_of(dataset, facet), rows_of(calm, facet)
        for key, entry in there.items():
            if "tar" in entry:
                assert here[key]["offset"] == entry["offset"]
                assert np.array_equal(tensor_at(dataset, facet, here[key]), tensor_at(calm, facet, entry))


def test_loaders_and_encoders_make_the_same_bytes(
    source: Path, calm: Dataset, marks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["produce", *words(source, tmp_path / "data"), *LOADERS]) == 0, capsys.readouterr().err
    assert_same_bits(Dataset.open(tmp_path / "data"), calm)
    assert not actors(marks, "UnitActor")
    assert not actors(marks, "EncoderActor")


@pytest.mark.parametrize("name", ["UnitActor", "EncoderActor"])
def test_a_killed_loader_or_encoder_leaves_no_trace(
    name: str, source: Path, calm: Dataset, marks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed: list[int] = []
    data = tmp_path / "data"
    with meanwhile(lambda: kill_one_at_work(marks, name, data, killed)):
        assert main(["produce", *words(source, data), *LOADERS]) == 0, capsys.readouterr().err
    assert len(killed) == 1
    assert_same_bits(Dataset.open(data), calm)


def test_an_encoder_that_dies_within_a_call_and_a_loader_within_a_tar(
    source: Path, calm: Dataset, marks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (marks / "encoder_call@3").touch()
    (marks / "tar_write@5").touch()
    assert main(["produce", *words(source, tmp_path / "data"), *LOADERS]) == 0, capsys.readouterr().err
    assert not list(marks.iterdir())
    assert_same_bits(Dataset.open(tmp_path / "data"), calm)


def test_an_encoder_that_hangs_is_replaced(
    source: Path, calm: Dataset, marks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (marks / "encoder_call@4").write_text("stop")
    command = [*words(source, tmp_path / "data"), *LOADERS, "cluster.producers=1", "cluster.unit_timeout_s=30"]
    assert main(["produce", *command]) == 0, capsys.readouterr().err
    assert not list(marks.iterdir())
    assert not actors(marks, "EncoderActor")  # the stopped one does not hear that it is to end
    assert_same_bits(Dataset.open(tmp_path / "data"), calm)


def test_an_encoder_that_always_dies_is_named(
    source: Path, marks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (marks / "encoder_call@1").touch()
    command = [*words(source, tmp_path / "data"), *LOADERS, "cluster.producers=1", "cluster.unit_retries=0"]
    assert main(["produce", *command]) == 1
    err = capsys.readouterr().err
    assert "encode failed 1 times, last: the encoder was killed (SIGKILL" in err


def test_a_picture_that_crashes_its_decoder_kills_loaders_alone_and_the_rest_is_kept(
    source: Path, calm: Dataset, marks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poison = hashlib.sha256((source / "006.png").read_bytes()).hexdigest()[:16]
    (marks / f"decode@{poison}").write_text("crash")
    command = [*words(source, tmp_path / "data"), *LOADERS, "cluster.producers=1", "cluster.unit_retries=1"]
    seen: set[int] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            seen.update(process.pid for process in actors(marks, "EncoderActor"))

    with meanwhile(watch):
        code = main(["produce", *command])
        ended.set()
    assert code == 0, capsys.readouterr().err
    dataset = Dataset.open(tmp_path / "data")
    decided = rows_of(dataset, ROWS)
    assert [row for row, entry in decided.items() if entry["reason"] == POISON] == [6]
    assert "crashed in native code" in decided[6]["detail"]
    assert len(seen) == 1  # one encoder, from beginning to end
    assert_same(dataset, calm, but={6})


def test_edits_are_encoded_alike(marks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Further pictures, and texts that see them, go through the encoder too."""
    source = tmp_path / "source"
    source.mkdir()
    for number, size in enumerate([(150, 110), (90, 140), (100, 100), (120, 80)]):
        photo(number, *size).save(source / f"{number}.png")
    rows = [
        {"source": "0.png", "instruction": "make it red", "target": "1.png"},
        {"source": ["2.png", "3.png"], "instruction": ["join", "put together"], "target": "0.png"},
    ]
    (source / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["produce", "source=edits", f"source.path={source / 'edits.jsonl'}", "encode.resolutions=[64]"]
    command += ["encode.dtype=float32", "encode.image_batch_pixels=9000"]
    for name, layout in (("plain", ["cluster.producers=1"]), ("loaders", list(LOADERS))):
        assert main([*command, f"data.path={tmp_path / name}", *layout]) == 0, capsys.readouterr().err
    plain, fed = Dataset.open(tmp_path / "plain"), Dataset.open(tmp_path / "loaders")
    assert_same_bits(fed, plain)
    facet = next(one for one in plain.facets() if one.startswith("latents-"))
    for row, entry in rows_of(plain, facet).items():
        mine, theirs = further(rows_of(fed, facet)[row]), further(entry)
        assert list(mine) == list(theirs) != []
        for name, place in theirs.items():
            assert np.array_equal(tensor_at(fed, facet, mine[name]), tensor_at(plain, facet, place))
