"""The run directory and everything that is checked before a run may touch it.

Place in the flow: the trainer's rank 0 prepares it, the `train` command calls `preflight` first, so that unusable
input is named before any process or GPU is started. `preflight` writes nothing. Refuses: a directory that was made
with other settings that change the numbers, data of another model, a disk without room for one checkpoint.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
import yaml

from consumers.checkpoint_files import (
    CheckpointError,
    list_checkpoints,
    no_valid_checkpoint,
    read_state,
    space_fault,
    sweep,
)
from consumers.curriculum import plan
from consumers.data_sets import check_ready, data_dirs, kinds_of, ledger_config
from consumers.judges import FILE as JUDGES
from consumers.parameter_groups import FROZEN, parameter_groups
from consumers.remote_checkpoints import RUN_ID
from consumers.start_from import START_FROM, StartWeights, find_start, read_record
from qwenimg_dist.compose import validate
from qwenimg_dist.config import Config, training_identity
from qwenimg_dist.data.catalog import RunFacets
from qwenimg_dist.data.errors import LockedError
from qwenimg_dist.data.facets import hold_lock
from qwenimg_dist.data.ledger_config import LedgerConfig
from qwenimg_dist.data.replay import read_replay
from qwenimg_dist.files import write_json
from qwenimg_dist.models.identity import latents_facet_names, text_facet_name
from qwenimg_dist.models.pipeline import fingerprint_component, pipeline_dir
from qwenimg_dist.models.safetensors_directory import SafetensorsDirectory
from qwenimg_dist.models.transformer import load_transformer_config
from qwenimg_dist.schema import EDIT, IMAGE, PREFERENCE, PROMPT, Kind
from qwenimg_dist.versions import git_commit, package_versions
from qwenimg_dist.wandb_key import check_key

STARTS: Final = "starts.jsonl"
"""One line per start of the gang, for `report.html`."""
_LOCK_WAIT_S: Final = 150.0
"""Ranks on other machines outlive a Ray head that was killed by the minute that Ray looks for it."""
_EXTEND: Final = (
    ". The number of steps is fixed per run, since the schedule follows it: to train its result further, give it as "
    "start_from of a new run"
)
FURTHER_OF_KIND: Final[dict[Kind, tuple[str, ...]]] = {IMAGE: (), EDIT: (), PREFERENCE: ("rejected",), PROMPT: ()}
"""Tensors of a sample that are read besides its latents, and besides an edit's conditions."""
_MOVED_BY_FRESH: Final = (
    "checkpoints",
    "metrics.jsonl",
    "tables.jsonl",
    "samples.jsonl",
    "bad_samples.jsonl",
    "faults",
    "generations.jsonl",
    "progress.json",
    "index",
    "takedown",
    "validation",
    "samples",
    "start_loss.json",
    START_FROM,
    "config.yaml",
    STARTS,
    "report.html",
    "plan.json",
    "parameter_groups.json",
    "environment.json",
    RUN_ID,
    JUDGES,
)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a run works with, found and checked."""

    run_dir: Path
    data_dirs: dict[str, Path]
    """Directory of each data set, see `data_sets.py`."""
    pipeline: Path
    facets: RunFacets
    ledger: LedgerConfig
    model_fingerprint: str
    """12 hex digits of the transformer that the run starts from."""
    start: StartWeights | None = None
    """What it starts from, if not the pipeline's own transformer."""
    judges: Mapping[str, Any] = field(default_factory=dict)
    """What judges the run's pictures, see `judges.py`."""


def preflight(config: Config) -> Prepared:
    """Find model and data, and check all that can be checked without writing. Raises ValueError with the way out."""
    run_dir = Path(_required(config.run.path, "run.path"))
    dirs = data_dirs(config)
    phases = plan(config)
    if not config.train.fresh:
        check_identity(config, run_dir)
        check_checkpoints(run_dir)
    pipeline = pipeline_dir(config.model)
    facets = facets_of(config, pipeline)
    if not config.follow:
        check_ready(dirs, facets)
    if config.train.replay_generations:
        read_replay(Path(config.train.replay_generations))
    weights = SafetensorsDirectory(pipeline / "transformer")
    num_layers = int(load_transformer_config(pipeline / "transformer")["num_layers"])
    groups = parameter_groups({name: weights.shape(name) for name in weights.names}, config.optim, num_layers)
    sizes = {group.name: group.num_elements for group in groups}
    frozen = sizes.get(FROZEN, 0)
    ema = config.optim.ema_decay > 0
    # A killed save lies on the disk until the next one begins, and must not keep the run from coming to it.
    if fault := space_fault(run_dir, sum(sizes.values()), ema=ema, num_frozen=frozen, swept=False):
        raise ValueError(fault)
    start = find_start(config, run_dir, pipeline, recorded=None if config.train.fresh else read_record(run_dir))
    return Prepared(
        run_dir=run_dir,
        data_dirs=dirs,
        pipeline=pipeline,
        facets=facets,
        ledger=ledger_config(config, phases),
        model_fingerprint=start.fingerprint if start else fingerprint_component(pipeline / "transformer"),
        start=start,
    )


def facets_of(config: Config, pipeline: Path) -> RunFacets:
    """The facets that the curriculum reads, for this model."""
    kinds = kinds_of(config)
    own, *others = dict.fromkeys(kinds.values())
    facets = {kind: _facets_of_kind(config, pipeline, kind) for kind in (own, *others)}
    return replace(facets[own], of_dataset={name: facets[kind] for name, kind in kinds.items() if kind != own})


def _facets_of_kind(config: Config, pipeline: Path, kind: Kind) -> RunFacets:
    wanted = {resolution for phase in config.curriculum.phases for resolution in phase.resolutions}
    if kind == PROMPT:
        return RunFacets(
            text=text_facet_name(pipeline, config, PROMPT), latents={}, kind=PROMPT, drawn=tuple(sorted(wanted))
        )
    latents = latents_facet_names(pipeline, config, kind)
    missing = sorted(wanted - set(latents))
    if missing:
        raise ValueError(
            f"the curriculum trains at {missing} px, encode.resolutions lacks it: add it and produce again"
        )
    return RunFacets(
        text=text_facet_name(pipeline, config, kind),
        latents={r: latents[r] for r in sorted(wanted)},
        further=FURTHER_OF_KIND[kind] + (("logvar",) if config.objective.posterior == "sample" else ()),
        kind=kind,
    )


def check_identity(config: Config, run_dir: Path) -> None:
    """Raise ValueError listing the keys in which an existing run differs in a way that changes its numbers."""
    file = run_dir / "config.yaml"
    if not file.is_file():
        return
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        there = training_identity(validate(tree))
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"{file} cannot be read ({error}): restore it, or choose another run.path") from error
    here = training_identity(config)
    differing = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]
    if differing:
        listed = "; ".join(f"{key} is {there.get(key)!r} there, {here.get(key)!r} here" for key in differing)
        raise ValueError(
            f"{run_dir} is the run directory of another config: {listed}. Give the same settings to go on, choose "
            "another run.path, or start anew here with train.fresh=true" + _EXTEND * ("train.steps" in differing)
        )


def check_checkpoints(run_dir: Path) -> None:
    """Raise ValueError if there are checkpoints and each is visibly damaged, before anything is started or written."""
    found = list_checkpoints(run_dir)
    if found and all(info.fault for info in found):
        raise no_valid_checkpoint(run_dir, [f"step {info.step}: {info.fault}" for info in found])


def check_tracking(config: Config, run_dir: Path, *, fresh: bool) -> None:
    """Raise ValueError if this machine has no key for the tracker that is asked for, before weights are loaded for it.

    A run that was tracked before goes on without: its log says so when it opens."""
    if config.logger.wandb == "online" and (fresh or not _was_tracked(run_dir)):
        check_key(config.logger)


def _was_tracked(run_dir: Path) -> bool:
    """By the checkpoint that the run will go on from, as far as one can tell before the bytes are hashed."""
    for info in reversed(list_checkpoints(run_dir)):
        if info.fault is None:
            with contextlib.suppress(CheckpointError):  # of the right size, and damaged: the resume passes it over too
                return read_state(info.path).get("wandb_id") is not None
    return False


@contextlib.contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the run directory. Waits a while for who holds it: a rank of a killed gang may live some seconds longer."""
    deadline = time.monotonic() + _LOCK_WAIT_S
    run_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(hold_lock(run_dir / ".train.lock", f"another `train` is working on {run_dir}"))
                break
            except LockedError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
        yield


def move_aside(run_dir: Path) -> Path | None:
    """Move an earlier run's results to `previous-NNN`, for `train.fresh=true`. None if there was nothing."""
    present = [name for name in _MOVED_BY_FRESH if (run_dir / name).exists()]
    if not present:
        return None
    sweep(run_dir)  # aside, nothing would remove what a killed save has left
    number = next(n for n in range(1, 10_000) if not (run_dir / f"previous-{n:03d}").exists())
    aside = run_dir / f"previous-{number:03d}"
    aside.mkdir()
    for name in present:
        os.rename(run_dir / name, aside / name)
    return aside


def write_descriptions(
    run_dir: Path, config: Config, world_size: int, *, step: int, skipped_checkpoints: Sequence[str]
) -> None:
    """`config.yaml` and `environment.json` of this start, and a line of `starts.jsonl`."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    temporary = run_dir / ".tmp-config.yaml"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, run_dir / "config.yaml")
    write_json(run_dir / "environment.json", _environment(world_size))
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    start = {"time": now, "step": step, "ranks": world_size, "skipped_checkpoints": list(skipped_checkpoints)}
    with open(run_dir / STARTS, "a", encoding="utf-8") as sink:
        sink.write(json.dumps(start, ensure_ascii=False) + "\n")


def _environment(world_size: int) -> dict[str, Any]:
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "ranks": world_size,
        "gpus_of_this_node": [torch.cuda.get_device_name(i) for i in range(num_gpus)],
        "cpus_of_this_node": os.cpu_count(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": package_versions(),
        "git_commit": git_commit(),
    }


def _required(value: str | None, key: str) -> str:
    if not value:
        raise ValueError(f"{key} is not set: add {key}=... to the command")
    return value
