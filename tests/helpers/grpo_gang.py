"""Runs of GRPO by one gang: `python grpo_gang.py OUT RUNS.json` in torchrun's environment.

Each entry of RUNS has a `name`, `overrides`, and what goes wrong on rank 1 (`fault`): of the reward, or of the first
step's second update (`second`: its loss is no number, `gradient`: only its gradient is not finite). Starting a gang
costs more than a run. How it ended, and after how long, is written to `OUT/NAME.json` by rank 0.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageStat

from consumers.engine import start_distributed, stop_distributed
from consumers.errors import TrainingError
from consumers.hooks import Hooks
from consumers.objectives.base import LossOutput
from consumers.session import Session, open_session
from consumers.trainer import _loop
from qwenimg_dist.compose import load_config
from qwenimg_dist.rewards.base import Prompt, Scores, WeightedRewards

SCRIPT = str(Path(__file__).resolve())


class Brightness:
    """A smooth reward: what rounding differs by, it differs by."""

    name = "brightness"

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[float]:
        return [ImageStat.Stat(image.convert("L")).mean[0] / 255 for image in images]


class Parity:
    """Another component: whether the prompt's number is odd, the same for a group."""

    name = "odd"

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[float]:
        return [float(prompt.metadata.get("number", 0) % 2) for prompt in prompts]


class Faulty:
    """The reward of one rank: at its later calls it hangs, raises, ends its thread, or says NaN."""

    def __init__(self, fault: str) -> None:
        self._fault = fault
        self._calls = 0
        self._rewards = WeightedRewards([Brightness(), Parity()], {"brightness": 1.0, "odd": 0.5})

    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        self._calls += 1
        if self._calls > 4:
            if self._fault == "hang":
                time.sleep(1e6)
            if self._fault == "raise":
                raise RuntimeError("the judge has left")
            if self._fault == "exit":
                raise SystemExit(3)
        scores = self._rewards.score(images, prompts)
        if self._fault == "nan":
            scores.total[0] = float("nan")
        if self._fault == "all":
            scores.total[:] = float("nan")
        return scores


def break_second_update(session: Session, fault: str) -> None:
    """Let this rank's losses of the first step's second update be NaN, or finite with an infinite gradient."""
    objective: Any = session.objective
    right = objective.loss

    def loss(predict: Any, micro: Any, *, step: int) -> LossOutput:
        output: LossOutput = right(predict, micro, step=step)
        if step > 0 or session.engine.optimizer_steps != 1:
            return output
        nothing = output.loss - output.loss.detach()
        broken = output.loss * float("nan") if fault == "second" else output.loss + nothing * 1e38 * 1e38
        return replace(output, loss=broken)

    objective.loss = loss


def main(out: Path, runs: Path) -> None:
    torch.set_num_threads(1)
    ranks = start_distributed("cpu", timeout_s=120)
    for run in json.loads(runs.read_text()):
        fault = run["fault"] if ranks.rank == 1 or run["fault"] == "all" else ""
        hooks = Hooks(score=Faulty(fault).score, say=lambda line: print(line, file=sys.stderr, flush=True))
        begin = time.perf_counter()
        ended: dict[str, str | float] = {}
        try:
            with open_session(load_config(run["overrides"]), ranks, hooks) as session:
                if fault in ("second", "gradient"):
                    break_second_update(session, fault)
                ended["outcome"] = _loop(session)
        except TrainingError as error:
            ended["error"] = str(error)
        ended["seconds"] = time.perf_counter() - begin
        told = ranks.gather_json(ended)
        if ranks.is_first:
            (out / f"{run['name']}.json").write_text(json.dumps(told))
    stop_distributed()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
