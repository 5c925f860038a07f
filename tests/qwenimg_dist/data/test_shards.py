"""Tars are plain WebDataset: stock readers read them, and the recorded places point at the tensors' bytes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from fake_dataset import FakeProducer, bucket_of, fake_features, fake_latents, make_rows, to_bf16
from safetensors.numpy import load

from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.data.shards import RawTensor, ShardWriter, encode_safetensors
from qwenimg_dist.schema import caption_key

READ_STOCK = """
import json, sys
import safetensors.torch
import webdataset
out = {}
for url in sys.argv[1:]:
    for sample in webdataset.WebDataset(url, shardshuffle=False):
        assert {name for name in sample if not name.startswith("__")} == {"json", "safetensors"}, set(sample)
        assert sample["__key__"] not in out
        tensors = safetensors.torch.load(sample["safetensors"])
        out[sample["__key__"]] = {
            "json": json.loads(sample["json"]),
            "tensors": {
                name: {"shape": list(t.shape), "dtype": str(t.dtype), "sum": float(t.double().sum())}
                for name, t in tensors.items()
            },
        }
assert not any(name.split(".")[0] in ("qwenimg_dist", "producers", "consumers") for name in sys.modules)
print(json.dumps(out))
"""


def stock_read(tars: list[Path], cwd: Path) -> dict[str, dict[str, dict[str, dict[str, object]]]]:
    """Read with webdataset and safetensors in a process where nothing of this project is imported."""
    command = [sys.executable, "-c", READ_STOCK, *map(str, tars)]
    done = subprocess.run(command, capture_output=True, check=False, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_stock_webdataset_reads_every_tar(tmp_path: Path) -> None:
    producer = FakeProducer(tmp_path / "data", unit_size=6, resolutions=(32, 64), max_shard_bytes=10_000)
    rows = make_rows(14, captions=2, sizes=((256, 256), (64, 130)))
    producer.add(rows)
    producer.produce()
    dataset, facets = producer.dataset, producer.facets
    folder = dataset.root / facets.latents[32]
    assert len(list(folder.glob("*.tar"))) > 3  # several tars per unit
    latents_tars, text_tars = folder.glob("*.tar"), (dataset.root / facets.text).glob("unit-000000*.tar")
    read = stock_read([*sorted(latents_tars), *sorted(text_tars)], tmp_path)
    assert {key for key in read if not key.startswith("t")} == {row.key for row in rows}
    for number, row in enumerate(rows):
        bucket = bucket_of(row, 32)
        assert bucket is not None
        expected = fake_latents(row.key, bucket)
        assert read[row.key]["tensors"] == {
            "mean": {"shape": list(expected.shape), "dtype": "torch.bfloat16", "sum": float(expected.sum())}
        }
        assert read[row.key]["json"]["row"] == number
    caption = rows[0].captions[1]
    features = read[caption_key(caption)]
    assert features["json"]["caption"] == caption
    assert features["tensors"]["features"]["sum"] == float(fake_features(caption).sum())
    assert caption_key("") in read


def test_places_point_at_the_first_tensor(tmp_path: Path) -> None:
    dataset = Dataset.create(tmp_path, 4)
    part = dataset.next_part("latents-32-x", 0)
    rng = np.random.default_rng(0)
    samples = {f"key{n}": rng.normal(size=(2, n + 1, 3)).astype(np.float32) for n in range(9)}
    places = {}
    with ShardWriter(dataset, part, max_shard_bytes=6000) as writer:
        for key, mean in samples.items():
            tensors = {"mean": RawTensor(data=mean, dtype="float32"), "logvar": RawTensor(data=-mean, dtype="float32")}
            places[key] = writer.write(key, {"é": key}, tensors)
        tars = writer.close()
    assert len(tars) > 1
    for key, mean in samples.items():
        place = places[key]
        raw = dataset.tar(part.facet, place.tar).read_bytes()[place.offset : place.offset + place.nbytes]
        assert np.array_equal(np.frombuffer(raw, np.float32).reshape(place.shape), mean)
        assert place.dtype == "float32"
    for tar in tars:
        raw = dataset.tar(part.facet, tar.name).read_bytes()
        assert (len(raw), hashlib.sha256(raw).hexdigest()) == (tar.size_bytes, tar.sha256)
        with tarfile.open(dataset.tar(part.facet, tar.name)) as members:
            names = [member.name for member in members]
            assert all((m.mtime, m.uid, m.gid, m.mode) == (0, 0, 0, 0o644) for m in members.getmembers())
        assert names[0::2] == [name.replace(".safetensors", ".json") for name in names[1::2]]


def test_a_tar_depends_on_its_samples_alone(tmp_path: Path) -> None:
    digests = []
    for attempt in range(2):
        dataset = Dataset.create(tmp_path / str(attempt), 4)
        with ShardWriter(dataset, dataset.next_part("f", 0), max_shard_bytes=10_000) as writer:
            writer.write("a", {"b": 1, "a": 2}, {"x": RawTensor(data=to_bf16(np.ones(5)), dtype="bfloat16")})
            digests.append(writer.close()[0].sha256)
    assert digests[0] == digests[1]


def test_safetensors_are_aligned_and_read_by_the_library() -> None:
    tensors = {
        "mean": RawTensor(data=np.arange(7, dtype=np.float16), dtype="float16"),
        "mask": RawTensor(data=np.arange(3, dtype=np.uint8), dtype="uint8"),
        "not_contiguous": RawTensor(data=np.arange(6, dtype=np.float32).reshape(2, 3).T, dtype="float32"),
    }
    header, body = encode_safetensors(tensors)
    assert len(header) % 8 == 0
    loaded = load(header + body)
    for name, tensor in tensors.items():
        assert np.array_equal(loaded[name], tensor.data)


def test_what_stock_readers_would_split_is_refused(tmp_path: Path) -> None:
    dataset = Dataset.create(tmp_path, 4)
    tensors = {"x": RawTensor(data=np.ones(1, np.float32), dtype="float32")}
    with ShardWriter(dataset, dataset.next_part("f", 0), max_shard_bytes=1000) as writer:
        for key in ("a.b", "a/b", "", "ä", "a b", "a\n"):
            with pytest.raises(ValueError, match="must match"):
                writer.write(key, {}, tensors)
        writer.write("a", {}, tensors)
        with pytest.raises(ValueError, match="already written"):
            writer.write("a", {}, tensors)
    assert list((tmp_path / "f").iterdir()) == []  # left without close: nothing stays
    with pytest.raises(ValueError, match="is carried as"):
        RawTensor(data=np.ones(1, np.float32), dtype="bfloat16")


def test_nothing_is_visible_before_close_and_an_empty_part_has_no_tar(tmp_path: Path) -> None:
    dataset = Dataset.create(tmp_path, 4)
    with ShardWriter(dataset, dataset.next_part("f", 0), max_shard_bytes=600) as writer:
        for key in "abc":
            writer.write(key, {}, {"x": RawTensor(data=np.ones(200, np.float32), dtype="float32")})
        assert not list((tmp_path / "f").glob("[!.]*"))
        assert len(writer.close()) == 3
        assert len(list((tmp_path / "f").glob("[!.]*.tar"))) == 3
    with ShardWriter(dataset, dataset.next_part("g", 0), max_shard_bytes=600) as writer:
        assert writer.close() == []


def test_a_full_disk_is_the_error_that_arrives_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Dataset.create(tmp_path, 4)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with ShardWriter(dataset, dataset.next_part("f", 0), max_shard_bytes=600) as writer:
        writer.write("a", {}, {"x": RawTensor(data=np.ones(9, np.float32), dtype="float32")})
        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            writer.close()
    assert list((tmp_path / "f").iterdir()) == []
