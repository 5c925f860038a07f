"""What the next steps read is fetched before they ask, within its share of the cache; two ranks on one cache read what
is read from a disk."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cache_size import tar_bytes
from fake_dataset import FakeProducer, make_rows
from s3_server import BUCKET, Server, s3_server

from consumers.batch import RankBatch
from consumers.stream import Stream
from qwenimg_dist import storage
from qwenimg_dist.config.data import DataConfig
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.data.generations import Generations
from qwenimg_dist.data.ledger_config import LedgerConfig
from qwenimg_dist.data.mirror import data_root
from qwenimg_dist.data.phases import PlannedPhase
from qwenimg_dist.data.reader import _MAX_HELD
from qwenimg_dist.storage import Patience

STEPS = 12
PHASE = PlannedPhase(
    index=0,
    first_step=0,
    last_step=STEPS,
    weights={32: 1.0},
    global_batch=6,
    micro_batch_tokens=30,
    lr_scale=1.0,
    where=None,
)
LEDGER = LedgerConfig(phases=(PHASE,), seed=1, caption_dropout=0.2, where=None, held_out=0.0, max_held_out=0)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_server() as running:
        yield running


def filled(root: Path, num: int = 40) -> FakeProducer:
    producer = FakeProducer(root, unit_size=8, max_shard_bytes=8000)
    producer.add(make_rows(num, captions=2))
    producer.produce(complete=True)
    return producer


def streams(dataset: Dataset, producer: FakeProducer, run: Path, world: int) -> list[Stream]:
    made = []
    for rank in range(world):
        generations = Generations(run, dataset, producer.facets, LEDGER, follow=False)
        generations.advance(0)
        made.append(Stream(generations.ledger, rank=rank, world=world, compute_dtype=torch.float32))
    return made


def content(batch: RankBatch) -> list[torch.Tensor]:
    return [tensor for micro in batch.micro_batches for tensor in (micro.latents, micro.text, micro.weights)]


@pytest.mark.slow
def test_two_ranks_on_a_cache_smaller_than_the_data_read_the_same_as_from_a_disk(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PATIENCE", Patience(attempts=4, first_s=0.02))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    url = f"s3://{BUCKET}/data"
    producer = filled(data_root(url, DataConfig(cache=str(tmp_path / "a"))), 96)
    local = filled(tmp_path / "local", 96)
    sizes = sorted(file.stat().st_size for file in local.dataset.root.rglob("*.tar"))
    limit = sum(sizes[-6:])
    bound = limit + sum(sizes[-2 * _MAX_HELD :])  # and what both ranks read at one moment
    assert bound < sum(sizes) * 0.6

    server.faults.late_s = 0.005
    root = data_root(url, DataConfig(cache=str(tmp_path / "b"), cache_bytes=limit))
    dataset = Dataset.open(root)
    dataset.refresh()
    ranks = streams(dataset, producer, tmp_path / "run-b", 2)
    alone = streams(local.dataset, local, tmp_path / "run-local", 2)
    for step in range(STEPS):
        for mine, theirs in zip(ranks, alone, strict=True):
            got, wanted = mine.get(step), theirs.get(step)
            assert got.keys == wanted.keys
            assert all(torch.equal(a, b) for a, b in zip(content(got), content(wanted), strict=True))
        assert 0 < tar_bytes(root) <= bound
    for stream in (*ranks, *alone):
        stream.close()


def test_tars_of_steps_that_nobody_asked_for_yet_are_here(server: Server, tmp_path: Path) -> None:
    url = f"s3://{BUCKET}/ahead"
    producer = filled(data_root(url, DataConfig(cache=str(tmp_path / "a"))))
    dataset = Dataset.open(data_root(url, DataConfig(cache=str(tmp_path / "b"))))
    dataset.refresh()
    (stream,) = streams(dataset, producer, tmp_path / "run", 1)
    stream.get(0)
    facet = producer.facets.latents[32]  # every row has latents, not every caption is drawn
    wanted = {file.name for file in (producer.dataset.root / facet).glob("*.tar")}
    deadline = time.monotonic() + 60
    while wanted - {file.name for file in (dataset.root / facet).glob("*.tar")} and time.monotonic() < deadline:
        time.sleep(0.05)
    assert wanted == {file.name for file in (dataset.root / facet).glob("*.tar")}
    stream._ahead.close()  # waits for what is under way
    server.faults.paths.clear()
    for step in range(1, 5):
        stream.get(step)
    stream.close()
    assert not [path for _, path in server.faults.paths if path.endswith(".tar")]
