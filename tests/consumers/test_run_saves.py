"""A save that is written beside training is committed as soon as it is written, whatever the run does meanwhile."""

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
from consumers.checkpoint_files import list_checkpoints
from consumers.hooks import Hooks
from consumers.ranks import Ranks
from consumers.saver import Saver
from consumers.session import Progress
from consumers.trainer import _loop
from qwenimg_dist.compose import load_config

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
