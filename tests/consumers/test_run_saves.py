"""A save that is written beside training is committed as soon as it is written, whatever the run does meanwhile, and
where all ranks end together."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_dataset import FakeProducer
from growing_run import make_config, open_run, produce_units

from consumers import checkpoint_files, run_data
from consumers.bad_samples import _note, next_batch
from consumers.checkpoint_files import list_checkpoints
from consumers.hooks import Hooks
from consumers.ranks import Ranks
from consumers.run_saves import settled
from consumers.saver import Saver
from consumers.session import Progress
from consumers.trainer import _loop
from qwenimg_dist.compose import load_config
from qwenimg_dist.data.errors import DataError

WAITING = "waiting for producers"


def session(run_dir: Path, hooks: Hooks, step: int) -> Any:
    """A run of one rank after `step` steps, whose model is one tensor; what it saves is a real checkpoint."""
    ranks = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
    share = SimpleNamespace(name="weight", start=0, stop=8, shape=(8,), group="decay")
    engine = SimpleNamespace(
        ranks=ranks,
        shares=[share],
        frozen=[],
        state=lambda kind, share: torch.ones(8),
        num_parameters=8,
        num_frozen=0,
        optimizer_steps=step,
    )
    config = load_config(["checkpoint.background=true", "train.steps=100", "train.report=off"])
    return SimpleNamespace(
        config=config,
        ranks=ranks,
        hooks=hooks,
        engine=engine,
        saver=Saver(engine, None, run_dir, config.checkpoint),  # type: ignore[arg-type]
        progress=Progress(step=step),
        guard=SimpleNamespace(verdict=""),
        prepared=SimpleNamespace(ledger=SimpleNamespace(phases=())),
        remote=None,
        report=None,
    )


def begin(run: Any) -> None:
    run.saver.begin(step=run.progress.step, state={}, certificate=dict, wait=False)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """What a writer waits for in the middle of its file."""
    event = threading.Event()
    monkeypatch.setattr(checkpoint_files, "fault_point", lambda _: event.wait(20))
    monkeypatch.setattr(run_data, "_POLL_S", 0.01)
    return event


def steps(run_dir: Path) -> list[int]:
    return [info.step for info in list_checkpoints(run_dir) if info.fault is None]


def test_it_is_committed_while_the_run_waits_for_producers(tmp_path: Path, gate: threading.Event) -> None:
    """Producers may take hours: a machine that is lost meanwhile must not cost what was written before."""
    producer = FakeProducer(tmp_path / "data")
    produce_units(producer, 4)
    run_dir = tmp_path / "run"
    stages: list[str] = []
    said: list[str] = []

    def stage(name: str) -> None:
        stages.append(name)
        if name == WAITING:
            gate.set()

    generations = open_run(run_dir, producer, make_config(), follow=True)
    step = 0
    while generations.advance(step) == "ready":
        step += 1
    assert step
    deadline = time.monotonic() + 10
    seen: list[list[int]] = []

    def stop() -> bool:
        seen.append(steps(run_dir))
        return seen[-1] == [step] or time.monotonic() > deadline

    run = session(run_dir, Hooks(stage=stage, say=said.append, stop_requested=stop), step)
    run.generations = generations
    begin(run)
    assert _loop(run) == "stopped"
    generations.close()
    run.saver.close()
    assert (seen[0], seen[-1]) == ([], [step])
    assert said[-1] == f"saved step {step}"
    assert stages.index(WAITING) < stages.index("finishing a save")


class Stream:
    """Gives no batch: a tar is cut off."""

    def get(self, step: int) -> Any:
        raise DataError(f"a.tar ends amid the batch of step {step}")


def test_what_all_ranks_refuse_together_costs_no_save(tmp_path: Path, gate: threading.Event) -> None:
    run = session(tmp_path, Hooks(), 4)
    run.stream = Stream()
    begin(run)
    threading.Timer(0.1, gate.set).start()
    with pytest.raises(ValueError, match=r"a\.tar ends amid the batch of step 4"), settled(run):
        next_batch(run)
    assert steps(tmp_path) == [4]
    run.progress.step = 8
    begin(run)
    run.run_dir, run.progress.bad_keys = tmp_path, {"a"}
    with (
        pytest.raises(ValueError, match=r"2 samples could not be read up to step 9, data\.max_bad_samples=0"),
        settled(run),
    ):
        _note(run, [{"key": "b", "slot": 0, "problem": "b cannot be read"}])
    run.saver.close()
    assert steps(tmp_path) == [4, 8]


def test_what_one_rank_meets_alone_is_no_time_to_agree_on_a_save(tmp_path: Path, gate: threading.Event) -> None:
    """The others are elsewhere, and would be waited for until a time-out."""
    run = session(tmp_path, Hooks(), 4)
    begin(run)
    with pytest.raises(ValueError, match="this rank's own"), settled(run):
        raise ValueError("this rank's own")
    assert run.saver.under_way
    gate.set()
    run.saver.close()
    assert steps(tmp_path) == []
