"""One worker of `pairs`: draws a prompt's pictures, has them judged, writes the best and the worst.

Place in the flow: `pairs_pool.py` makes these as Ray actors and hands each one prompt at a time. Pictures go from here
to the folder, only the record travels. Models are loaded at the first prompt. What waiting or a fresh process may mend
is told apart from what would meet every prompt.
"""

from __future__ import annotations

import io
import os
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from producers.messages import Seat, own_seat
from qwenimg_dist.commands.pairs_book import PICTURES, seeds_of
from qwenimg_dist.config import Config
from qwenimg_dist.debug import fault_point
from qwenimg_dist.files import write_bytes
from qwenimg_dist.patience import is_away, patiently
from qwenimg_dist.rewards.base import Prompt, Scores, Values

if TYPE_CHECKING:
    from PIL import Image

    from qwenimg_dist.commands.painter import Painter
    from qwenimg_dist.rewards.service import RewardService


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that an actor is told, once."""

    config_json: str
    folder: str
    """Absolute."""
    cwd: str
    num_threads: int


@dataclass(frozen=True, kw_only=True)
class PromptTask:
    key: str
    text: str
    metadata: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What became of one prompt."""

    outcome: Literal["kept", "tie", "failed", "lost", "fatal"]
    """`failed`: fewer than two pictures could be judged. `lost`: storage or this process failed, another process may
    fare better with the same prompt. `fatal`: no other prompt would fare better."""
    record: Mapping[str, Any]
    num_unjudged: int = 0
    """Pictures without a total."""
    notes: tuple[str, ...] = ()
    trace: str = ""
    """Of `lost`, for whoever looks for the cause."""


class PairActor:
    """One process with a pipeline and rewards."""

    def __init__(self, job: Job) -> None:
        # Before torch is imported: it reads the variable once, and a wrong thread count costs up to 40x.
        os.environ["OMP_NUM_THREADS"] = str(job.num_threads)
        with suppress(OSError):  # relative paths mean what they mean to the command; elsewhere they may not exist
            os.chdir(job.cwd)
        self._job = job
        self._config = Config.model_validate_json(job.config_json)
        self._loaded: tuple[Painter, RewardService] | None = None

    def ready(self) -> Seat:
        """Answers once the actor is placed and made."""
        return own_seat()

    def run(self, task: PromptTask) -> Reply:
        """Make the prompt's pair. Never raises for what it meets."""
        try:
            painter, service = self._load()
            return make_pair(painter, service, self._config, Path(self._job.folder), task)
        except ValueError as error:
            return Reply(outcome="fatal", record={}, notes=(str(error),))
        except Exception as error:
            told, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
            # A full disk, a missing file. Libraries that wrap an error leave its number out, and may hide anything.
            if isinstance(error, OSError) and error.errno is not None and not is_away(error):
                return Reply(outcome="fatal", record={}, notes=(f"{told}\n{trace}",))
            return Reply(outcome="lost", record={}, notes=(told,), trace=trace)

    def _load(self) -> tuple[Painter, RewardService]:
        if self._loaded is None:
            import torch

            from qwenimg_dist.commands.painter import Painter
            from qwenimg_dist.rewards.service import RewardService

            torch.set_num_threads(self._job.num_threads)
            painter = patiently(lambda: Painter.load(self._config), "loading the pipeline")
            self._loaded = painter, RewardService(self._config.reward)
        return self._loaded


def make_pair(painter: Painter, service: RewardService, config: Config, folder: Path, task: PromptTask) -> Reply:
    """Draw, judge, choose, write the pictures."""
    seeds = seeds_of(task.key, config.pairs.seed, config.pairs.num_seeds)
    pictures = painter.draw(task.text, seeds)
    prompt = Prompt(text=task.text, metadata=task.metadata)
    scores = service.score(pictures, [prompt] * len(pictures))
    chosen = choose(scores.total, config.pairs.margin)
    fault_point("pairs_drawn")
    files = [f"{PICTURES}/{task.key[:2]}/{task.key}-{seed}.png" for seed in seeds]
    if chosen is None:
        outcome: Literal["tie", "failed"] = "failed" if scores.num_failed > len(seeds) - 2 else "tie"
        if config.pairs.keep_all:
            _save(folder, files, pictures, range(len(files)))
        gap = float(np.nanmax(scores.total) - np.nanmin(scores.total)) if outcome == "tie" else 0.0
        record = {"key": task.key, "prompt": task.text, "gap": gap}
        return Reply(outcome=outcome, record=record, num_unjudged=scores.num_failed, notes=scores.notes)
    best, worst = chosen
    _save(folder, files, pictures, range(len(files)) if config.pairs.keep_all else chosen)
    record = {
        "prompt": task.text,
        "chosen": files[best],
        "rejected": files[worst],
        "gap": float(scores.total[best] - scores.total[worst]),
        "rewards": {"chosen": _of(scores, best), "rejected": _of(scores, worst)},
        "seeds": {"chosen": seeds[best], "rejected": seeds[worst]},
        "metadata": dict(task.metadata),
        "key": task.key,
    }
    return Reply(outcome="kept", record=record, num_unjudged=scores.num_failed, notes=scores.notes)


def choose(total: Values, margin: float) -> tuple[int, int] | None:
    """(best, worst) of the pictures that could be judged, the first of equals; None if their gap is below the margin or
    there is none."""
    judged = np.flatnonzero(np.isfinite(total))
    if len(judged) < 2:
        return None
    best, worst = int(judged[total[judged].argmax()]), int(judged[total[judged].argmin()])
    gap = total[best] - total[worst]
    return (best, worst) if gap >= margin and gap > 0 else None


def _of(scores: Scores, index: int) -> dict[str, float]:
    return {"total": float(scores.total[index])} | {
        name: float(values[index]) for name, values in scores.components.items()
    }


def _save(folder: Path, files: Sequence[str], pictures: Sequence[Image.Image], which: Sequence[int]) -> None:
    for index in which:
        file, sink = folder / files[index], io.BytesIO()
        pictures[index].save(sink, format="PNG")
        patiently(lambda: _replace(file, sink.getvalue()), str(file))  # noqa: B023 - called at once
        fault_point("pairs_picture")


def _replace(file: Path, data: bytes) -> None:
    for stray in file.parent.glob(f".tmp-{file.name}-*"):
        stray.unlink(missing_ok=True)  # of a worker that was killed over it
    write_bytes(file, data)
