"""Grids of held-out edits: what some rank cannot read is left out on all of them, and the others' rows stay as they
were."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from fake_dataset import FakeProducer, make_rows
from held_out_run import held_out_run
from PIL import Image
from small_run import TRANSFORMER

from consumers.batch import MicroBatch
from consumers.edit_grids import chosen_edits, draw_edits, readable
from consumers.hooks import Hooks
from consumers.ranks import Ranks
from consumers.stream import Stream
from qwenimg_dist.compose import load_config
from qwenimg_dist.data.facets import DataError
from qwenimg_dist.data.generations import Generations
from qwenimg_dist.data.held_out import HeldOutBucket
from qwenimg_dist.models.transformer import build_transformer

EDITS = 6
ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
SCHEDULER = {"use_dynamic_shifting": False, "shift": 1.0, "num_train_timesteps": 1000}
_Result = TypeVar("_Result")


@pytest.fixture
def run(tmp_path: Path) -> Generations:
    producer = FakeProducer(tmp_path / "edits", unit_size=4, resolutions=(64,), edits=True)
    producer.add(make_rows(40, captions=2, sizes=((256, 256), (128, 256))))
    producer.produce(complete=True)
    return held_out_run(tmp_path / "run", producer, held_out=0.4, max_held_out=16)


class Codec:
    """Shows the latents themselves."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(latents[:, :3].tanh(), scale_factor=8)


def session(run: Generations, stream: Any, ranks: Any, said: list[str]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = build_transformer(TRANSFORMER)
    return SimpleNamespace(
        config=load_config(["stage=edit", f"evaluate.edits={EDITS}", "evaluate.num_steps=2"]),
        run_dir=run.run,
        ranks=ranks,
        generations=run,
        stream=stream,
        hooks=Hooks(say=said.append),
        grids=SimpleNamespace(scheduler=SCHEDULER, codec=Codec()),
        engine=SimpleNamespace(transformer=transformer, train=lambda mode=True: None),
        progress=SimpleNamespace(step=3),
    )


def rows_of(file: Path | None, num: int) -> list[np.ndarray]:
    assert file is not None
    pixels = np.array(Image.open(file))
    height = (len(pixels) - len(pixels) % num) // num
    return [pixels[index * height : (index + 1) * height] for index in range(num)]


def test_an_edit_that_cannot_be_read_costs_its_row_alone(run: Generations) -> None:
    said: list[str] = []
    stream = Stream(run.ledger, rank=0, world=1, compute_dtype=torch.float32)
    at_work = session(run, stream, ALONE, said)
    whole = rows_of(draw_edits(at_work, None, resolution=64), EDITS)
    assert said == []
    chosen = chosen_edits(run, 64, EDITS)
    catalog = run.catalogs[0]
    tars = [int(catalog.latents[64].tar[one.rows[0]]) for one in chosen]
    torn = catalog.tars[tars[1]].path
    torn.write_bytes(torn.read_bytes()[:-1])
    left = [at for at, tar in enumerate(tars) if tar != tars[1]]
    assert 0 < len(left) < EDITS
    rest = rows_of(draw_edits(at_work, None, resolution=64), len(left))
    assert len(said) == 1
    assert f"goes without {EDITS - len(left)} of {EDITS} edits" in said[0]
    assert f"evaluate.edits=0 draws none): {torn}" in said[0]
    for row, at in zip(rest, left, strict=True):  # with the seeds that they had
        assert np.array_equal(row, whole[at])
    for tar in set(tars):
        catalog.tars[tar].path.unlink(missing_ok=True)
    stream.close()
    at_work.stream = Stream(run.ledger, rank=0, world=1, compute_dtype=torch.float32)
    assert draw_edits(at_work, None, resolution=64) is None
    at_work.stream.close()


class Thread:
    """One of two ranks that are threads."""

    world_size = 2

    def __init__(self, rank: int, barrier: threading.Barrier, told: list[str]) -> None:
        self.rank = rank
        self._barrier, self._told = barrier, told

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def together(self, action: Callable[[], _Result]) -> _Result:
        return action()

    def gather_json(self, value: Any) -> list[Any]:
        self._told[self.rank] = json.dumps(value)
        self._barrier.wait(timeout=30)
        found = [json.loads(one) for one in self._told]
        self._barrier.wait(timeout=30)
        return found


class Blind:
    """A stream on a machine that lacks some edits."""

    def __init__(self, stream: Stream, lacks: set[int]) -> None:
        self._stream, self._lacks = stream, lacks

    def whole(self, groups: Sequence[HeldOutBucket]) -> list[MicroBatch]:
        if int(groups[0].slots[0]) in self._lacks:
            raise DataError(f"{groups[0].slots[0]} is not here")
        return self._stream.whole(groups)


@pytest.mark.parametrize(
    ("lacks", "there"),
    [
        # Rank 1 draws the later half; what it loses moves both shares, and it may meet the next one that it lacks.
        (set(), [0, 1, 2, 3, 4, 5]),
        ({4}, [0, 1, 2, 3, 5]),
        ({2, 4, 5}, [0, 1, 3]),
        ({0, 1, 2, 3, 4, 5}, []),
    ],
)
def test_ranks_agree_on_what_is_left(run: Generations, lacks: set[int], there: list[int]) -> None:
    chosen = chosen_edits(run, 64, EDITS)
    slots = [int(one.slots[0]) for one in chosen]
    barrier, told = threading.Barrier(2), ["", ""]
    said: list[list[str]] = [[], []]

    def rank(number: int) -> tuple[list[int], list[int]]:
        stream = Stream(run.ledger, rank=number, world=2, compute_dtype=torch.float32)
        blind = Blind(stream, {slots[at] for at in lacks} if number == 1 else set())
        made = SimpleNamespace(
            ranks=Thread(number, barrier, told), generations=run, stream=blind, hooks=Hooks(say=said[number].append)
        )
        found, read = readable(made, chosen)  # type: ignore[arg-type]
        stream.close()
        return found, sorted(read)

    with ThreadPoolExecutor(2) as pool:
        (first, read), (second, mine) = pool.map(rank, range(2))
    assert first == second == there
    assert set(there) <= set(read)  # rank 0 lays them out
    assert not lacks & set(mine)
    assert bool(said[0]) == bool(lacks)
    assert said[1] == []
