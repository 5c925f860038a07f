"""The frozen held-out set: which samples, at which resolution classes, and this rank's share of them.

Place in the flow: the session makes it once, after the first generation is there; `evaluate.py` measures on it. The
classes that the curriculum trains come from the run's catalog, the others that the data set has latents of from
`other_classes.py`. What was measured at step 0 is written down (`start_loss.json`: keys, quantiles, seed, which model
the run starts from and that model's error of every sample), and a resumed run takes its set from there, whatever the
config or the data set say since. Refuses a resolution that the data set has no latents of, and a set that has lost
samples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from consumers.batch import MicroBatch
from consumers.stream import Stream
from qwenimg_dist.config import Config
from qwenimg_dist.data.catalogs import Catalogs
from qwenimg_dist.data.facets import DataError
from qwenimg_dist.data.generations import Generations
from qwenimg_dist.data.held_out import HeldOutBucket
from qwenimg_dist.data.other_classes import OtherClass

START_LOSS: Final = "start_loss.json"
_VERSION: Final = 2

Errors = dict[int, npt.NDArray[np.float64]]
"""Resolution class -> (samples, quantiles), by slot."""


@dataclass(frozen=True, kw_only=True)
class HeldOutClass:
    """The held-out samples at one resolution class, by slot; the same on every rank but for `batches`."""

    resolution: int
    keys: tuple[str, ...]
    buckets: tuple[str, ...]
    tokens: tuple[int, ...]
    """Valid text tokens."""
    datasets: tuple[str, ...]
    """Which of several data sets each is of; empty words in a run with one."""
    batches: tuple[MicroBatch, ...]
    """This rank's share; as many forwards on every rank."""
    pairs: bool = False
    """Whether its samples have a rejected picture besides."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a run measures by, and what its starting model gave: fixed at step 0."""

    num_samples: int
    quantiles: tuple[float, ...]
    seed: int
    keys: dict[int, tuple[str, ...]]
    errors: Errors
    rejected: Errors = field(default_factory=dict)
    """Errors of the rejected pictures, of classes that hold pairs; runs from before they were measured have none."""
    model: str = ""
    """Fingerprint of the starting model; runs from before it was written down have none."""

    @property
    def losses(self) -> dict[int, float]:
        """Resolution class -> mean error, what the guard goes by."""
        return {resolution: float(errors.mean()) for resolution, errors in self.errors.items()}

    def to_json(self) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "num_samples": self.num_samples,
            "sigma_quantiles": list(self.quantiles),
            "seed": self.seed,
            "model": self.model,
            "classes": {
                str(resolution): {
                    "keys": list(self.keys[resolution]),
                    "errors": errors.tolist(),
                    **({"rejected": self.rejected[resolution].tolist()} if resolution in self.rejected else {}),
                }
                for resolution, errors in self.errors.items()
            },
        }


def read_start(run_dir: Path) -> dict[str, Any] | None:
    """What step 0 wrote, for `start_from_json`; None if nothing was measured there."""
    file = run_dir / START_LOSS
    try:
        kept: dict[str, Any] = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{file} cannot be read ({error}): restore it, or choose another run.path") from error
    return kept if kept.get("version") == _VERSION else None


def start_from_json(kept: Mapping[str, Any] | None) -> Start | None:
    """The inverse of `Start.to_json`."""
    if kept is None:
        return None
    classes = {int(resolution): entry for resolution, entry in kept["classes"].items()}
    quantiles = tuple(kept["sigma_quantiles"])
    return Start(
        num_samples=kept["num_samples"],
        quantiles=quantiles,
        seed=kept["seed"],
        keys={resolution: tuple(entry["keys"]) for resolution, entry in classes.items()},
        errors=_arrays(classes, "errors", len(quantiles)),
        rejected=_arrays(classes, "rejected", len(quantiles)),
        model=kept.get("model", ""),
    )


def _arrays(classes: Mapping[int, Mapping[str, Any]], name: str, num: int) -> Errors:
    return {
        resolution: np.array(entry[name], dtype=np.float64).reshape(-1, num)
        for resolution, entry in classes.items()
        if name in entry
    }


def differences(config: Config, start: Start) -> str:
    """Settings of the config that a run which has begun does not follow; empty if there are none."""
    evaluate = config.evaluate
    there: dict[str, tuple[Any, Any]] = {
        "num_samples": (start.num_samples, evaluate.num_samples),
        "sigma_quantiles": (list(start.quantiles), list(evaluate.sigma_quantiles)),
        "seed": (start.seed, evaluate.seed),
    }
    return ", ".join(f"evaluate.{name}={was}" for name, (was, now) in there.items() if was != now)


def find_other_classes(
    config: Config, generations: Generations, start: Start | None, trained: set[int]
) -> dict[str, dict[str, OtherClass]]:
    """For rank 0: where the held-out samples lie at the classes that the curriculum does not train: class -> data set
    -> places. JSON."""
    there = generations.other_facets()
    if missing := sorted(set(config.evaluate.resolutions or ()) - trained - set(there)):
        raise ValueError(
            f"evaluate.resolutions names {missing} px, the data set has latents at {sorted(trained | set(there))}: "
            "add them to encode.resolutions and produce again, or leave them out"
        )
    frozen = {r: set(keys) for r, keys in start.keys.items()} if start else None
    chosen = [r for r in sorted(there) if _wanted(config, r) and (frozen is None or r in frozen)]
    return {str(r): generations.find_other_class(there[r], frozen[r] if frozen else None) for r in chosen}


def make_held_out(
    config: Config,
    generations: Generations,
    stream: Stream,
    start: Start | None,
    budgets: Mapping[int, int],
    others: Mapping[str, Mapping[str, OtherClass]],
) -> dict[int, HeldOutClass]:
    """Every class that is evaluated, ascending; those without a held-out sample are left out.

    `budgets`: trained class -> tokens of a micro-batch; the other classes take the smallest. Raises ValueError if a
    class is not what the starting model was measured on.
    """
    limit = start.num_samples if start else config.evaluate.num_samples
    groups = {r: (generations.catalogs, generations.held_out(r, limit)) for r in budgets if _wanted(config, r)}
    if others:
        catalogs, elsewhere = generations.held_out_elsewhere({int(r): other for r, other in others.items()}, limit)
        groups |= {r: (catalogs, found) for r, found in elsewhere.items()}
    made: dict[int, HeldOutClass] = {}
    for resolution, (catalogs, found) in sorted(groups.items()):
        if not found:
            continue
        budget = budgets.get(resolution, min(budgets.values()))
        try:
            # The other classes' latents are looked up by one place each, which is the chosen picture's.
            pairs = resolution in budgets and "rejected" in generations.facets.further
            batches = stream.held_out_batches(found, micro_batch_tokens=budget, catalogs=catalogs, pairs=pairs)
        except DataError as error:
            raise DataError(
                f"{error}. This one is held out, and the held-out set of a run is fixed: data.max_bad_samples does not "
                "help; evaluate.every=0 trains without validation until the file is back"
            ) from error
        made[resolution] = _described(resolution, catalogs, found, batches, pairs=pairs)
    if start is not None:
        _check_frozen(config, made, start)
    return made


def not_validated(datasets: Sequence[str], classes: Mapping[int, HeldOutClass]) -> str:
    """What to warn of: nothing is held out, or nothing of one of the data sets of a mix; else empty."""
    held_out = {name for one in classes.values() for name in one.datasets}
    if not held_out:
        return (
            "none of the selected rows is held out, so nothing is validated and nothing guards against degradation: "
            "raise data.held_out, or give a data set as evaluate.data_path"
        )
    if missing := sorted(set(datasets) - held_out):
        return (
            f"no row of data.mix.{', data.mix.'.join(missing)} is held out, so nothing is validated on it: raise "
            "data.held_out, of which each data set holds out its own share"
        )
    return ""


def _check_frozen(config: Config, made: Mapping[int, HeldOutClass], start: Start) -> None:
    for resolution, keys in start.keys.items():
        if not _wanted(config, resolution):
            continue
        now = made[resolution].keys if resolution in made else ()
        if now != keys:
            lost = sorted(set(keys) - set(now))
            what = f"{len(lost)} of {len(keys)} samples are gone (first {lost[0]})" if lost else "it has others"
            raise ValueError(
                f"the held-out set at {resolution} px is not what the starting model was measured on: {what}. Produce "
                "again with the same encode settings, or list the other classes in evaluate.resolutions"
            )


def _wanted(config: Config, resolution: int) -> bool:
    return config.evaluate.resolutions is None or resolution in config.evaluate.resolutions


def _described(
    resolution: int,
    catalogs: Catalogs,
    groups: Sequence[HeldOutBucket],
    batches: Sequence[MicroBatch],
    *,
    pairs: bool,
) -> HeldOutClass:
    by_slot: dict[int, tuple[str, str, int, str]] = {}
    for group in groups:
        columns = (group.slots.tolist(), catalogs.keys(group.rows), catalogs.text_tokens(group.texts).tolist())
        for slot, key, tokens in zip(*columns, strict=True):
            by_slot[slot] = (key, str(group.bucket), tokens, group.dataset)
    entries = [by_slot[slot] for slot in sorted(by_slot)]
    return HeldOutClass(
        resolution=resolution,
        keys=tuple(key for key, _, _, _ in entries),
        buckets=tuple(bucket for _, bucket, _, _ in entries),
        tokens=tuple(tokens for _, _, tokens, _ in entries),
        datasets=tuple(dataset for _, _, _, dataset in entries),
        batches=tuple(batches),
        pairs=pairs,
    )
