"""Workers of `pairs`: what the moment brought costs a try on a fresh process, what meets every prompt ends the rest."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from producers.actor_slots import Answer, Slot
from qwenimg_dist import patience
from qwenimg_dist.commands import pairs_actor, pairs_pool
from qwenimg_dist.commands.pairs_actor import Job, PairActor, PromptTask, Reply
from qwenimg_dist.commands.pairs_pool import PairsError, Pool
from qwenimg_dist.compose import load_config
from qwenimg_dist.rewards.base import Prompt, Scores

TASK = PromptTask(key="abcd", text="a red circle", metadata={})
STALE = OSError(errno.ESTALE, "Stale file handle", "/shared/pictures")


class Painter:
    """Draws grey pictures, and meets the troubles that are left first."""

    def __init__(self, troubles: list[Exception]) -> None:
        self._troubles = troubles

    def draw(self, prompt: str, seeds: list[int]) -> list[Image.Image]:
        if self._troubles:
            raise self._troubles.pop(0)
        return [Image.new("RGB", (16, 16), (level, level, level)) for level in range(len(seeds))]


class Service:
    """The later picture is the better one."""

    def score(self, images: list[Image.Image], prompts: list[Prompt]) -> Scores:
        total = np.arange(len(images), dtype=np.float64)
        return Scores(components={"order": total}, total=total, failures={"order": 0}, timeouts={"order": 0})


class LocalSlots:
    """`ActorSlots` with one real actor, in this process."""

    def __init__(self, make: Callable[[], PairActor]) -> None:
        self._make = make
        self._slot: Slot[PromptTask, None] = Slot(place=None, actor=make(), pending=None, since=0.0)
        self._tasks: list[PromptTask] = []
        self.num_renewed = 0

    @property
    def num_idle(self) -> int:
        return 1 - len(self._tasks)

    @property
    def num_busy(self) -> int:
        return len(self._tasks)

    def submit(self, task: PromptTask) -> None:
        self._tasks.append(task)

    def wait(self, timeout_s: float) -> list[Any]:
        tasks, self._tasks = self._tasks, []
        return [Answer(slot=self._slot, task=task, reply=self._slot.actor.run(task)) for task in tasks]

    def renew(self, slot: Slot[PromptTask, None]) -> None:
        assert slot is self._slot
        self._slot.actor = self._make()
        self.num_renewed += 1


@pytest.fixture
def made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[Exception]], tuple[Pool, LocalSlots, list[Exception]]]:
    """A pool whose actors meet these troubles one after the other."""
    monkeypatch.setattr(patience, "PAUSES_S", (0.0,) * 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # an actor sets it
    config = load_config(["pairs.num_seeds=3", "cluster.producers=1", "cluster.unit_retries=2"])
    job = Job(config_json=config.model_dump_json(), folder=str(tmp_path), cwd=str(tmp_path), num_threads=1)

    def pool_of(troubles: list[Exception]) -> tuple[Pool, LocalSlots, list[Exception]]:
        def actor() -> PairActor:
            one = PairActor(job)
            one._loaded = Painter(troubles), Service()  # type: ignore[assignment]
            return one

        slots = LocalSlots(actor)
        monkeypatch.setattr(pairs_pool, "ActorSlots", {(PromptTask, None): lambda *a, **o: slots})
        monkeypatch.setattr(pairs_pool, "check_room", lambda cluster: None)
        monkeypatch.chdir(tmp_path)
        return Pool(job, config.cluster), slots, troubles

    return pool_of


def replies_of(pool: Pool) -> list[tuple[PromptTask, Reply]]:
    pool.submit(TASK)
    for _ in range(10):
        if replies := pool.wait(0.0):
            return replies
    raise AssertionError("no reply")


@pytest.mark.parametrize(
    "trouble",
    [
        STALE,
        patience.StorageAwayError("/shared: Input/output error"),
        OSError("Unable to load weights from checkpoint file"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    ],
)
def test_what_the_moment_brought_costs_a_process_and_no_prompt(made: Any, tmp_path: Path, trouble: Exception) -> None:
    pool, slots, troubles = made([trouble, trouble])
    ((task, reply),) = replies_of(pool)
    assert (task, reply.outcome, troubles, slots.num_renewed) == (TASK, "kept", [], 2)
    assert reply.record["gap"] == 2.0
    assert (tmp_path / reply.record["chosen"]).is_file()
    assert pool.num_busy == 0


def test_a_prompt_that_fails_again_and_again_ends_it_with_the_cause_and_the_way_out(made: Any) -> None:
    pool, _, _ = made([torch.OutOfMemoryError("CUDA out of memory")] * 3)
    with pytest.raises(PairsError, match=r"'a red circle' failed 3 times, last: OutOfMemoryError: CUDA out") as raised:
        replies_of(pool)
    for words in ("lower pairs.batch_size", "cluster.unit_retries", "in draw"):  # the last is where
        assert words in str(raised.value)


@pytest.mark.parametrize(
    "trouble", [ValueError("no such directory"), OSError(errno.ENOSPC, "No space left on device", "/shared/a.png")]
)
def test_what_meets_every_prompt_is_tried_once(made: Any, trouble: Exception) -> None:
    pool, slots, _ = made([trouble])
    ((_, reply),) = replies_of(pool)
    assert (reply.outcome, slots.num_renewed) == ("fatal", 0)
    assert str(trouble) in reply.notes[0]


def test_storage_that_is_away_for_a_moment_is_waited_for_over_a_drawn_picture(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = pairs_actor.write_bytes, [2]

    def write(file: Path, data: bytes) -> None:
        if left[0]:
            left[0] -= 1
            raise STALE
        real(file, data)

    monkeypatch.setattr(pairs_actor, "write_bytes", write)
    pool, slots, _ = made([])
    ((_, reply),) = replies_of(pool)
    assert (reply.outcome, slots.num_renewed, left) == ("kept", 0, [0])
