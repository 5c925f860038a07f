"""An early 64 px checkpoint of the demo's world, for tests of what comes after pretraining.

Early, because preference learning and RL need spread: of this model's pictures about half are right, and from one
prompt some are and some are not. Made by the real commands: pictures -> produce -> train on two ranks, killed by
nothing. Take it through the session's fixture `early_demo` of `tests/e2e/conftest.py`, so that it is made once.

    early.words()            overrides of every stage on it: tiny model, 64 px alone, the demo's data
    early.rewards(path)      the rule's verdict over pictures that a run or an export draws, (prompts, seeds)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from produce_command import produce
from small_run import run_gang

from qwenimg_dist.commands.sample import draw
from qwenimg_dist.config_of_run import config_for_drawing
from qwenimg_dist.demo.shapes import HELD_OUT_PAIRS, all_captions, parse, write_folder
from qwenimg_dist.rewards.shapes import score

STEPS = 440
"""At 260 nothing can be made out yet, at 500 all colours are right and a third of the shapes."""
NUM_IMAGES = 700
PX = 64


@dataclass(frozen=True, kw_only=True)
class EarlyDemo:
    """Where everything lies."""

    root: Path

    @property
    def data(self) -> Path:
        """The demo's pictures as a data set, latents of 64 px only."""
        return self.root / "data"

    @property
    def run(self) -> Path:
        """The run directory, with the checkpoint of step `STEPS` alone."""
        return self.root / "run"

    def words(self, *extra: str) -> list[str]:
        """Overrides for a stage that goes on from here, at 64 px alone; `stage=...` must come first in them."""
        return [
            *extra[:1],
            "model=tiny",
            "~curriculum.phases.high",
            "encode.resolutions=[64]",
            "data.held_out=0.15",
            "engine.precision=fp32",
            "train.report=off",
            "train.log_every=1",
            "checkpoint.certify=off",
            *extra[1:],
        ]

    def rewards(self, path: Path, prompts: Sequence[str], seeds: Sequence[int], *words: str) -> npt.NDArray[np.float64]:
        """(prompts, seeds): the share of colour and shape that is right, of pictures drawn with these seeds."""
        where = f"run.path={path}" if (path / "checkpoints").is_dir() else f"sample.path={path}"
        args = [where, f"sample.height={PX}", f"sample.width={PX}", "sample.num_steps=12", *words]
        args.append(f"sample.seeds={list(seeds)}".replace(" ", ""))
        pictures = draw(config_for_drawing(args), list(prompts))
        scenes = [parse(prompt) for prompt in prompts for _ in seeds]
        found = [float(np.mean(score(picture, scene))) for picture, scene in zip(pictures, scenes, strict=True)]
        return np.array(found).reshape(len(prompts), len(seeds))


def prompts_for_pairs() -> list[str]:
    """Every wording of every scene that training has shown, 180: what pairs and rollouts are drawn for."""
    return [text for text in all_captions() if _seen(text)]


def prompts_for_tests() -> list[str]:
    """Two wordings of every scene, those never shown in training too: 144. Draw them with seeds of their own."""
    return [text for index, text in enumerate(all_captions()) if index % 3]


def make_early_demo(root: Path) -> EarlyDemo:
    """Three minutes on quiet cores."""
    write_folder(root / "pictures", num_images=NUM_IMAGES, seed=0)
    made = EarlyDemo(root=root)
    done = produce(*made.words("stage=demo"), f"source.path={root / 'pictures'}", f"data.path={made.data}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    words = made.words(
        "stage=demo",
        f"data.path={made.data}",
        f"run.path={made.run}",
        f"curriculum.phases.low.steps={STEPS}",
        f"train.steps={STEPS}",
        f"checkpoint.every={STEPS}",
        "optim.cooldown_steps=0",
        "evaluate.every=0",
        "evaluate.grid_every=0",
    )
    ended = run_gang(["-m", "consumers", *words], 2, root / "logs-early", timeout_s=900)
    assert [end.code for end in ended] == [0, 0], ended[0].output[-3000:]
    return made


def _seen(text: str) -> bool:
    scene = parse(text)
    return (scene.colour, scene.shape) not in HELD_OUT_PAIRS
