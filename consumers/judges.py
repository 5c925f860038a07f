"""What judges a run's pictures: the same rewards, of the same weights, at every start, wherever their models lie.

Place in the flow: `train` asks before it starts anything, the session on rank 0 once the run directory is its own.
`rewards.json` there holds what the run was begun with: weights and settings, and of a reward with a model the
fingerprint of that. Refuses to go on with another judge, naming what differs. Rewards that a caller injects without
giving them a weight in the config are the caller's own affair.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from qwenimg_dist.config import Config, GrpoConfig, flatten
from qwenimg_dist.files import write_json
from qwenimg_dist.patience import patiently
from qwenimg_dist.rewards import what_counts

FILE: Final = "rewards.json"


def check_judges(config: Config, run_dir: Path) -> dict[str, Any]:
    """What judges this run; empty of a stage without rewards. Writes nothing.

    Raises ValueError if the run was begun with other rewards, or one of them cannot be found, and `StorageAwayError`
    where that cannot be told now.
    """
    if not isinstance(config.objective, GrpoConfig) or not config.reward.active:
        return {}
    here = what_counts(config.reward)
    file = run_dir / FILE
    if config.train.fresh:
        return here
    try:
        there = flatten(json.loads(patiently(lambda: file.read_text(encoding="utf-8"), str(file))))
    except FileNotFoundError:
        return here
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read ({error}): restore it, or choose another run.path") from error
    now = flatten(here)
    if differing := [key for key in sorted({*there, *now}) if there.get(key) != now.get(key)]:
        listed = "; ".join(f"{key} is {there.get(key)!r} there, {now.get(key)!r} here" for key in differing)
        raise ValueError(
            f"{run_dir} was begun with another judge: {listed}. A `model` is the fingerprint of the weights that "
            "reward.settings.NAME.path names, wherever they lie: give those again to go on, choose another run.path, "
            "or start anew here with train.fresh=true"
        )
    return here


def hold_to_judges(config: Config, run_dir: Path) -> dict[str, Any]:
    """The same, kept for the starts to come. For rank 0, in a run directory that `train.fresh` has been seen to."""
    settled = config.model_copy(update={"train": config.train.model_copy(update={"fresh": False})})
    here = check_judges(settled, run_dir)
    if here and not (run_dir / FILE).is_file():
        write_json(run_dir / FILE, here)
    return here
