"""A part exists if and only if its parquet does, whoever dies when; and it is never rewritten."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fake_dataset import FakeProducer, make_rows

from qwenimg_dist.data.errors import LockedError
from qwenimg_dist.data.facets import DataError, Dataset, Part
from qwenimg_dist.data.shards import RawTensor, ShardWriter
from qwenimg_dist.files import write_json

HELPERS = Path(__file__).parents[2] / "helpers"
WRITER = """
import sys
sys.path[:0] = [sys.argv[2]]
from pathlib import Path
from fake_dataset import FakeProducer, make_rows
producer = FakeProducer(Path(sys.argv[1]), unit_size=4, max_shard_bytes=5000)
producer.add(make_rows(16, captions=2))
with producer.dataset.lock():
    producer.dataset.clean()
    producer.produce(complete=True)
"""


def table(rows: list[int], value: str = "a") -> pa.Table:
    return pa.table({"row": pa.array(rows, pa.int64()), "key": [f"{value}{row}" for row in rows]})


def tree(root: Path) -> dict[str, str]:
    files = sorted(file for file in root.rglob("*") if file.is_file() and file.name != ".produce.lock")
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def logical(dataset: Dataset) -> dict[str, list[tuple[object, ...]]]:
    """What the data set says, without the names of tars, which differ between attempts."""
    seen: dict[str, list[tuple[object, ...]]] = {}
    for facet in dataset.facets():
        for unit in dataset.units(facet):
            merged = dataset.read_unit(facet, unit)
            assert merged is not None
            rows = merged.drop_columns([name for name in ("tar", "offset") if name in merged.column_names])
            seen[f"{facet}/{unit}"] = [tuple(map(str, row.values())) for row in rows.to_pylist()]
    return seen


def run_writer(root: Path, tokens: Path) -> int:
    environment = {**os.environ, "QWENIMG_DIST_FAULT_DIR": str(tokens), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WRITER, str(root), str(HELPERS)]
    return subprocess.run(command, env=environment, check=False, stderr=subprocess.PIPE).returncode


def test_a_writer_killed_at_many_points_leaves_nothing_half_and_a_retry_gives_the_same(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    assert run_writer(tmp_path / "calm", tokens) == 0
    expected = logical(Dataset.open(tmp_path / "calm"))
    for point in ("tar_write@1", "tar_write@30", "part_commit@1", "part_commit@4", "part_commit@5"):
        (tokens / point).touch()
        assert run_writer(tmp_path / "killed", tokens) == -9, point
        dataset = Dataset.open(tmp_path / "killed")
        before = tree(dataset.root)
        for facet in dataset.facets():
            for part in dataset.parts(facet):
                # What is visible is whole.
                assert dataset.meta(part)["schema_version"] == 1
                dataset.read(part)
                for tar in dataset.tars(part):
                    raw = dataset.tar(facet, tar.name).read_bytes()
                    assert (len(raw), hashlib.sha256(raw).hexdigest()) == (tar.size_bytes, tar.sha256)
        dataset.clean()
        assert not dataset.strays()
        after = tree(dataset.root)
        assert after.items() <= before.items()
        assert all(".tmp-" not in name for name in after)
    assert run_writer(tmp_path / "killed", tokens) == 0
    assert logical(Dataset.open(tmp_path / "killed")) == expected
    done = tree(tmp_path / "killed")
    assert run_writer(tmp_path / "killed", tokens) == 0
    assert tree(tmp_path / "killed") == done


def test_committing_twice_changes_nothing(tmp_path: Path) -> None:
    dataset = Dataset.create(tmp_path, 4)
    part = dataset.next_part("rows", 0)
    assert dataset.commit(part, table([0, 1]), config_hash="one", extra={"inputs": {"scan": 1}})
    before = tree(tmp_path)
    assert not dataset.commit(part, table([5, 6]), config_hash="two")
    assert tree(tmp_path) == before
    assert dataset.meta(part) == {"inputs": {"scan": 1}, "schema_version": 1, "config_hash": "one", "tars": []}
    assert dataset.next_part("rows", 0) == Part(facet="rows", unit=0, part=1)


def test_the_cost_of_a_unit_does_not_grow_with_the_number_of_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Dataset.create(tmp_path / "data", 4)
    for unit in range(3):
        dataset.commit(dataset.next_part("rows", unit), table([unit]), config_hash="")
    dataset.commit(dataset.next_part("rows", 1), table([9]), config_hash="")
    listed = []
    real = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: listed.append(folder) or real(folder))
    assert dataset.next_part("rows", 1).part == 2
    assert dataset.next_part("rows", 7).part == 0
    assert [part.part for part in dataset.unit_parts("rows", 1)] == [0, 1]
    assert len(dataset.read_unit("rows", 1) or []) == 2
    assert listed == []
    assert dataset.parts_by_unit("rows") == {unit: dataset.unit_parts("rows", unit) for unit in range(3)}
    assert len(listed) == 1


def test_two_writers_at_once_and_only_one_wins(tmp_path: Path) -> None:
    dataset = Dataset.create(tmp_path, 4)
    part = dataset.next_part("rows", 0)
    won: list[int] = []
    start = threading.Barrier(8)

    def commit(number: int) -> None:
        start.wait()
        if dataset.commit(part, table([number]), config_hash=str(number)):
            won.append(number)

    threads = [threading.Thread(target=commit, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert dataset.read(part)["row"].to_pylist() == won
    assert not dataset.strays()


def test_later_parts_supersede_earlier_rows(tmp_path: Path) -> None:
    dataset = Dataset.create(tmp_path, 4)
    dataset.commit(dataset.next_part("rows", 0), table([2, 0, 1], "old"), config_hash="")
    dataset.commit(dataset.next_part("rows", 0), table([3, 1], "new"), config_hash="")
    merged = dataset.read_unit("rows", 0)
    assert merged is not None
    assert merged["key"].to_pylist() == ["old0", "new1", "old2", "new3"]
    assert dataset.read_unit("rows", 1) is None
    assert dataset.units("rows") == [0]
    assert dataset.units("scan") == []


def test_strays_are_temporaries_and_unnamed_tars_only(tmp_path: Path) -> None:
    dataset = Dataset.create(tmp_path, 4)
    part = dataset.next_part("text-x", 0)
    with ShardWriter(dataset, part, max_shard_bytes=1000) as writer:
        writer.write("a", {}, {"features": RawTensor(data=np.zeros((2, 2), np.float32), dtype="float32")})
        tars = writer.close()
    assert dataset.strays() == [tmp_path / "text-x" / tars[0].name]
    dataset.commit(part, table([0]), config_hash="", tars=tars)
    assert dataset.strays() == []
    (tmp_path / "text-x" / ".tmp-b").write_bytes(b"")
    (tmp_path / "text-x" / "unit-000000.001-00000000-000.tar").write_bytes(b"")
    (tmp_path / "text-x" / "notes.txt").write_bytes(b"")
    before = tree(tmp_path)
    assert len(dataset.clean()) == 2
    assert set(before) - set(tree(tmp_path)) == {"text-x/.tmp-b", "text-x/unit-000000.001-00000000-000.tar"}


def test_only_one_producer_at_a_time(tmp_path: Path) -> None:
    dataset = Dataset.create(tmp_path, 4)
    with dataset.lock(), pytest.raises(DataError, match="another `produce`"), dataset.lock():
        pass
    with dataset.lock():
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_other_producer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    dataset = Dataset.create(tmp_path, 4)
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(DataError, match=r"gives no locks \(.*: mount it with them") as told, dataset.lock():
        pass
    assert not isinstance(told.value, LockedError)
    assert "another `produce`" not in str(told.value)


def test_open_and_create_refuse_what_is_not_theirs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not a data set.*qwenimg-dist produce"):
        Dataset.open(tmp_path / "nothing")
    Dataset.create(tmp_path / "data", 4)
    assert Dataset.create(tmp_path / "data", 4).unit_size == 4
    with pytest.raises(DataError, match=r"data\.unit_size=4"):
        Dataset.create(tmp_path / "data", 8)
    write_json(tmp_path / "data" / "dataset.json", {"schema_version": 99, "unit_size": 4})
    with pytest.raises(DataError, match="schema version 99"):
        Dataset.open(tmp_path / "data")
    (tmp_path / "data" / "dataset.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        Dataset.open(tmp_path / "data")


def test_a_damaged_parquet_is_named(tmp_path: Path) -> None:
    dataset = Dataset.create(tmp_path, 4)
    part = dataset.next_part("rows", 0)
    dataset.commit(part, table([0]), config_hash="")
    dataset.parquet(part).write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError, match=r"unit-000000\.000\.parquet.*data verify"):
        dataset.read(part)
    with pytest.raises(DataError, match=r"unit-000000\.000\.parquet"):
        dataset.meta(part)


def test_a_full_disk_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Dataset.create(tmp_path, 4)
    part = dataset.next_part("rows", 0)
    before = tree(tmp_path)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        dataset.commit(part, table([0]), config_hash="")
    assert tree(tmp_path) == before
    assert dataset.parts("rows") == []


def test_another_resolution_touches_nothing_else(tmp_path: Path) -> None:
    producer = FakeProducer(tmp_path, unit_size=4)
    producer.add(make_rows(8))
    producer.produce()
    before = tree(tmp_path)
    wider = FakeProducer(tmp_path, unit_size=4, resolutions=(32, 64))
    wider.rows = producer.rows
    wider.produce()
    after = tree(tmp_path)
    assert before.items() <= after.items()
    new = {name.split("/")[0] for name in set(after) - set(before)}
    assert new == {"latents-64-0123456789ab", "rows"}
    wider.produce()
    assert tree(tmp_path) == after


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1})
    write_json(tmp_path / "a.json", {"b": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
