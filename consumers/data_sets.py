"""Which data sets a run trains on: one (`data.path`), or several that mix (`data.mix`).

Place in the flow: `run_directory.preflight` asks here before anything is started, the session opens what is found. A
mix of one is as if its path were `data.path`. They may be of different kinds, as far as the objective trains on them.
Refuses, naming the data set: a directory that is none, holds another kind or was made for another model, one directory
under two names, `follow=true` with a mix.
"""

from __future__ import annotations

from pathlib import Path

from consumers.objectives import sample_kind
from qwenimg_dist.config import Config
from qwenimg_dist.data.catalog import RunFacets
from qwenimg_dist.data.catalog_build import wrong_kind
from qwenimg_dist.data.facets import DataError, Dataset
from qwenimg_dist.data.ledger_config import DatasetConfig, LedgerConfig
from qwenimg_dist.data.mirror import data_root
from qwenimg_dist.data.mix import Mix
from qwenimg_dist.data.phases import PlannedPhase
from qwenimg_dist.data.pins import ready_units, why_not_ready
from qwenimg_dist.schema import Kind


def data_dirs(config: Config) -> dict[str, Path]:
    """Name -> directory of each data set, of one on s3:// its mirror; the name is empty where there is one.

    Raises ValueError with the way out.
    """
    path, mix = config.data.path, config.data.mix
    if not mix:
        if not path:
            raise ValueError("data.path is not set: add data.path=... to the command, or several with data.mix={...}")
        return {"": data_root(path, config.data)}
    dirs = {name: data_root(one.path, config.data) for name, one in mix.items()}
    real = {name: folder.resolve() for name, folder in dirs.items()}
    for name, folder in real.items():
        same = [other for other in real if real[other] == folder and other != name]
        if same:
            raise ValueError(f"data.mix.{name} and data.mix.{same[0]} are the same directory {folder}: name it once")
    if path and data_root(path, config.data).resolve() not in real.values():
        raise ValueError(
            f"data.path={path} is not among data.mix ({', '.join(map(str, dirs.values()))}), and training reads "
            "data.mix alone: leave data.path out, or add it to data.mix"
        )
    if len(dirs) == 1:
        return {"": next(iter(dirs.values()))}
    if config.follow:
        raise ValueError(
            "follow=true trains on one data set while it grows, data.mix names several, whose shares are settled once: "
            "let `produce` finish and train without follow, or train on one of them with data.path"
        )
    return dirs


def kinds_of(config: Config) -> dict[str, Kind]:
    """Name -> kind of the samples of each data set, named as by `data_dirs`."""
    data = config.data
    if len(data.mix) < 2:
        alone = next(iter(data.mix.values())).kind if data.mix else None
        return {"": sample_kind(config, alone or data.kind)}
    return {name: sample_kind(config, one.kind or data.kind) for name, one in data.mix.items()}


def check_ready(dirs: dict[str, Path], facets: RunFacets) -> None:
    """Raise `DataError` naming the first data set that cannot be trained on."""
    for name, folder in dirs.items():
        try:
            dataset = Dataset.open(folder)
            dataset.refresh()
            mine = facets.of(name)
            if (there := dataset.kind()) not in (None, mine.kind):
                raise DataError(f"{folder} {wrong_kind([there], mine.kind)}")
            if not ready_units(dataset, mine):
                raise DataError(why_not_ready(dataset, mine))
        except DataError as error:
            raise DataError(f"data.mix.{name}: {error}" if name else str(error)) from error


def ledger_config(config: Config, phases: tuple[PlannedPhase, ...]) -> LedgerConfig:
    """What the order of samples depends on besides the data."""
    data, several = config.data, len(config.data.mix) > 1
    alone = next(iter(data.mix.values())) if len(data.mix) == 1 else None
    by_weight = all(one.weight is not None for one in data.mix.values())
    return LedgerConfig(
        phases=phases,
        seed=config.train.seed,
        caption_dropout=config.objective.caption_dropout,
        where=data.where,
        held_out=data.held_out,
        max_held_out=data.max_held_out,
        weights=data.weights,
        caption_weights=data.caption_weights,
        takedown=data.takedown,
        mix=Mix(
            unit="weight" if by_weight else "repeats",
            amounts={name: one.amount for name, one in data.mix.items()},
        )
        if several
        else None,
        of_dataset={
            "" if alone else name: DatasetConfig(where=one.where, caption_weights=one.caption_weights)
            for name, one in data.mix.items()
        },
    )
