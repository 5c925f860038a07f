"""The config that a run directory was made with, with a command's overrides put on top of it.

Place in the flow: `eval`, `sample`, `pairs` and `ckpt export` look at a run that was trained by some stage and model,
which nobody should have to type again. What the overrides name is taken from them (a key, or a whole group), all else
from the run's `config.yaml`; sections that the run is too old to know are this version's defaults. Refuses overrides of
what the run is: its stage, curriculum and optimiser would be other ones than it was trained with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from qwenimg_dist.compose import ConfigError, compose_tree, load_config, validate
from qwenimg_dist.config import Config

_FIXED: Final = ("stage", "curriculum", "optim", "train", "start_from", "source", "filters", "filter_set", "captions")


def config_of_run(run_dir: Path, overrides: Sequence[str], *, trains: bool = True) -> Config:
    """See the module's docstring. `trains=False`: phases have no `mix` of their own, which names data sets that an
    override may take away. Raises `ConfigError` for an override that it refuses, ValueError for a directory without a
    config that can be read."""
    file = run_dir / "config.yaml"
    try:
        kept = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{run_dir} is not a run directory (no config.yaml)") from None
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read ({error}): restore it") from error
    if not isinstance(kept, dict):
        raise ValueError(f"{file} is not a mapping: restore it")
    given = compose_tree(overrides)
    tree: dict[str, Any] = {**{name: value for name, value in given.items() if name not in kept}, **kept}
    for override in overrides:
        keys = override.partition("=")[0].lstrip("+~").split(".")
        if keys[0] in _FIXED:
            raise ConfigError(f"{override}: {keys[0]} is that of the run in {run_dir}: leave it out")
        if keys == ["model"]:
            # The group again, and not where the run found the model.
            if given["model"]["name"] != tree["model"]["name"]:
                raise ConfigError(f"{override}: the run in {run_dir} has model={tree['model']['name']}: leave it out")
            continue
        _take(tree, given, keys)
    if not trains:
        tree["curriculum"] = _without_mix(tree["curriculum"])
    return validate(tree)


def config_for_eval(overrides: Sequence[str]) -> Config:
    """That of the run whose checkpoint or export is judged, where it can be found; else of the overrides alone. It may
    be judged on other data sets than it was trained on: how its phases mixed those is left out."""
    given = load_config(overrides)
    place = given.eval.path or given.run.path
    run_dir = _run_of(Path(place)) if place else None
    return given if run_dir is None else config_of_run(run_dir, overrides, trains=False)


def config_for_drawing(overrides: Sequence[str]) -> Config:
    """Of a command that draws from `run.path`: the run's model, sizes and sampler. Where it draws and what it writes
    are this command's. The overrides alone, where it draws from a pipeline directory."""
    given = load_config(overrides)
    if given.sample.path or given.export.path or given.run.path is None:
        return given
    mine = ("cluster", "export", "pairs")
    return config_of_run(Path(given.run.path), overrides).model_copy(
        update={"run": given.run, **{name: getattr(given, name) for name in mine}}
    )


def _run_of(path: Path) -> Path | None:
    if (path / "manifest.json").is_file():  # a checkpoint
        path = path.absolute().parents[1]
    elif (path / "model_index.json").is_file():
        try:
            path = Path(json.loads((path / "certificate.json").read_text(encoding="utf-8"))["run"]["path"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
    return path if (path / "config.yaml").is_file() else None


def _without_mix(curriculum: Any) -> Any:
    """Whatever else is there is for the validation to judge."""
    phases = curriculum.get("phases") if isinstance(curriculum, dict) else None
    if not isinstance(phases, list):
        return curriculum
    return {**curriculum, "phases": [{**one, "mix": None} if isinstance(one, dict) else one for one in phases]}


def _take(tree: dict[str, Any], given: dict[str, Any], keys: Sequence[str]) -> None:
    """Put what stands under `keys` in `given` into `tree`, or remove it there where it is not."""
    for key in keys[:-1]:
        if not isinstance(tree.get(key), dict) or not isinstance(given.get(key), dict):
            tree[key] = given.get(key)
            return
        tree, given = tree[key], given[key]
    if keys[-1] in given:
        tree[keys[-1]] = given[keys[-1]]
    else:
        tree.pop(keys[-1], None)
