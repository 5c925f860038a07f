"""What step 0 measured belongs to the model that the run starts from, and is measured again for another one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from fake_dataset import FakeProducer, make_rows
from held_out_run import held_out_run

from consumers.baseline import baseline
from consumers.held_out import START_LOSS, Start
from consumers.ranks import Ranks
from consumers.stream import Stream
from qwenimg_dist.compose import load_config


class Model:
    """Predicts a constant."""

    def __init__(self, value: float) -> None:
        self.ranks = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
        self._value = value

    def train(self, mode: bool = True) -> None:
        return None

    def predict(self, noisy: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor, mask: Any) -> torch.Tensor:
        return torch.full_like(noisy, self._value)


class Run:
    """A run directory that is begun again and again."""

    def __init__(self, root: Path) -> None:
        producer = FakeProducer(root / "data", unit_size=8, resolutions=(64,))
        producer.add(make_rows(30, sizes=((256, 256), (128, 256))))
        producer.produce(complete=True)
        self.folder = root / "run"
        self.generations = held_out_run(self.folder, producer, held_out=0.5, max_held_out=9)
        self.ledger = self.generations.config
        self.said: list[str] = []

    def begin(self, model: Model, fingerprint: str, step: int = 0, *words: str) -> Start:
        prepared = SimpleNamespace(
            run_dir=self.folder, facets=self.generations.facets, ledger=self.ledger, model_fingerprint=fingerprint
        )
        self.said.clear()
        stream = Stream(self.generations.ledger, rank=0, world=1, compute_dtype=torch.float32)
        try:
            _, start = baseline(
                load_config(["evaluate.num_samples=4", *words]),
                cast(Any, prepared),
                self.generations,
                stream,
                cast(Any, model),
                step,
                say=self.said.append,
                stage=lambda name: None,
            )
        finally:
            stream.close()
        assert start is not None
        return start


def test_another_starting_model_is_measured_on_the_same_samples(tmp_path: Path) -> None:
    run, one, other = Run(tmp_path), Model(0.0), Model(10.0)
    first = run.begin(one, "a" * 12)
    assert first.model == "a" * 12
    assert run.begin(other, "a" * 12).losses == first.losses  # read back, not measured
    assert run.said == []
    # Stopped before its first checkpoint, and begun again with start_from: the guard goes by that model from now on.
    second = run.begin(other, "b" * 12, 0, "evaluate.num_samples=2")
    assert (second.model, second.keys) == ("b" * 12, first.keys)
    assert second.losses[64] > first.losses[64] + 50
    assert any("of another model, this one's are measured instead" in line for line in run.said)
    assert run.begin(one, "b" * 12, 3).losses == second.losses


def test_a_file_from_before_the_model_was_written_down(tmp_path: Path) -> None:
    run = Run(tmp_path)
    first = run.begin(Model(0.0), "a" * 12)
    file = run.folder / START_LOSS
    tree = json.loads(file.read_text())
    del tree["model"]
    file.write_text(json.dumps(tree))
    assert run.begin(Model(10.0), "a" * 12, 3).losses == first.losses  # a run that goes on has no other
    assert run.begin(Model(10.0), "a" * 12).losses[64] > first.losses[64] + 50
    assert json.loads(file.read_text())["model"] == "a" * 12
