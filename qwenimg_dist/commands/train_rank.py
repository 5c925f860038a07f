"""What one rank of a gang runs in its Ray Train worker: the consumers, with all that ties them to Ray handed in.

Place in the flow: `train.py` starts gangs of these and reads what they answer. What a new start would meet again is
answered, not raised: Ray would restart the gang for it, as it does for storage that was away (`StorageAwayError`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from qwenimg_dist.commands.inputs import required
from qwenimg_dist.config import Config
from qwenimg_dist.patience import is_seen
from qwenimg_dist.rewards.base import Score

STOP_FILE: Final = ".stop"
LOG_FILE: Final = "train.log"


def rank(job: dict[str, Any]) -> dict[str, Any]:
    """`config`, `cwd`, `command_id`, `work`, `reward_actors` -> the outcome, or `error` with an exit code.

    `leaves` says that it ended, saved, because a machine of the gang is about to be taken away.
    """
    from consumers.errors import TrainingError
    from consumers.hooks import Hooks
    from qwenimg_dist.commands.train_notice import machine_leaves
    from qwenimg_dist.compose import validate

    trains = job["work"] == "training"
    if trains:
        from consumers.trainer import train as work
    else:
        from consumers.compare import compare as work

    with suppress(OSError):  # relative paths mean what they mean to the command; on another node they may not exist
        os.chdir(job["cwd"])
    config = validate(job["config"])
    run_dir = Path(required(config.run.path, "run.path"))
    is_first = os.environ.get("RANK", "0") == "0"
    stop_file = run_dir / f"{STOP_FILE}-{job['command_id']}"

    def say(line: str) -> None:
        # A disk without room for a line must not take the place of what the line says, nor start the gang anew.
        with suppress(OSError), open(run_dir / LOG_FILE, "a", encoding="utf-8") as sink:
            sink.write(line + "\n")

    if is_first:
        say(f"{os.environ.get('WORLD_SIZE', '1')} ranks are there")
    try:
        hooks = Hooks(
            stop_requested=lambda: is_first and stop_asked(stop_file, machine_leaves if trains else None),
            say=say,
            log_file=str((run_dir / LOG_FILE).absolute()),
            command_id=str(job["command_id"]),
            score=_score(config, job["reward_actors"]),
            observe=_observer(run_dir) if is_first and trains else _unseen,
        )
        outcome = work(config, hooks)
    except ValueError as error:
        return {"error": str(error), "code": 2}
    except TrainingError as error:
        return {"error": str(error), "code": 1}
    return {"outcome": outcome, "leaves": trains and outcome == "stopped" and machine_leaves()}


def stop_asked(stop_file: Path, leaves: Callable[[], bool] | None) -> bool:
    """Before each step: by the command, or because this machine `leaves`. Storage that does not answer is asked again
    at the next one."""
    return is_seen(stop_file) or (leaves is not None and leaves())


def _observer(run_dir: Path) -> Callable[[Mapping[str, float]], None]:
    from qwenimg_dist.commands.train_metrics import TrainGauges

    return TrainGauges(run_dir.name).set


def _unseen(_: Mapping[str, float]) -> None:
    return None


def _score(config: Config, actors: Sequence[Any]) -> Score | None:
    """By the reward actors; None where there are none, and the rank judges itself."""
    if not actors:
        return None
    from qwenimg_dist.commands.reward_actors import RewardClient

    return RewardClient(actors, config.reward, rank=int(os.environ.get("RANK", "0"))).score
