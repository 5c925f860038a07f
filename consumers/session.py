"""Everything a run needs before its first step, built in the one order that works.

Place in the flow: `trainer.train` opens a session and runs the loop on it. Order: checks on rank 0 -> lock -> prompts
of the grids (frozen models, before `zero.Init`) -> engine and EMA -> newest valid checkpoint -> logs cut back to it ->
generations of the data. Whatever rank 0 refuses is raised on every rank. Refuses to go on from a directory without a
valid checkpoint when there are invalid ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from consumers.baseline import baseline
from consumers.certificate import Certifier
from consumers.checkpoint import Loaded, load_newest, share_of_faults
from consumers.data_sets import kinds_of
from consumers.ema import Ema
from consumers.engine import build_engine
from consumers.evaluate import HeldOut
from consumers.guard import Guard
from consumers.held_out import Start
from consumers.hooks import Hooks, Stopped, say_once
from consumers.judges import hold_to_judges
from consumers.objectives import build_objective
from consumers.objectives.base import Objective
from consumers.parameter_groups import describe, to_json
from consumers.planning.plan import check_device
from consumers.ranks import Ranks
from consumers.reference_pass import Watch, open_reference
from consumers.remote_checkpoints import RemoteCheckpoints
from consumers.reporting import ReportWriter
from consumers.rollout import Rollouts, open_rollouts
from consumers.run_data import open_data, tell_plan
from consumers.run_directory import Prepared, check_tracking, move_aside, preflight, run_lock, write_descriptions
from consumers.saver import Saver
from consumers.start_from import StartWeights, agree
from consumers.stream import Stream
from consumers.throughput import Throughput
from consumers.zero_engine import Engine
from qwenimg_dist.config import Config, GrpoConfig, training_identity
from qwenimg_dist.data.generations import Generations
from qwenimg_dist.files import write_json
from qwenimg_dist.metrics import RunLog, truncate_logs
from qwenimg_dist.models.safetensors_directory import SafetensorsDirectory
from qwenimg_dist.models.transformer import load_transformer_config
from qwenimg_dist.schema import EDIT

if TYPE_CHECKING:
    from consumers.grids import Grids

GROUPS_FILE: Final = "parameter_groups.json"
_Result = TypeVar("_Result")


@dataclass(kw_only=True)
class Progress:
    """What changes from step to step besides the weights; saved with them."""

    step: int = 0
    """Optimiser steps done, skipped ones included: the ledger's next step."""
    images: int = 0
    skipped_steps: int = 0
    consecutive_skips: int = 0
    bad_keys: set[str] = field(default_factory=set)
    """Samples that could not be read and were left out (`bad_samples.py`); at most `data.max_bad_samples`."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """A run at work on this rank."""

    config: Config
    hooks: Hooks
    ranks: Ranks
    prepared: Prepared
    engine: Engine
    ema: Ema | None
    objective: Objective
    generations: Generations
    stream: Stream
    held_out: HeldOut
    start: Start | None
    guard: Guard
    grids: Grids | None
    rollouts: Rollouts | None
    """Of an objective that trains on pictures of the model's own."""
    throughput: Throughput
    certifier: Certifier
    saver: Saver
    remote: RemoteCheckpoints | None
    """Where copies of the checkpoints go, besides."""
    log: RunLog | None
    """Rank 0's."""
    report: ReportWriter | None
    """Rank 0's."""
    progress: Progress
    resolutions: dict[int, list[int]] = field(default_factory=dict)
    """Phase -> its resolution classes."""

    @property
    def run_dir(self) -> Path:
        return self.prepared.run_dir

    def state(self) -> dict[str, Any]:
        """What `state.json` of a checkpoint holds besides the engine's own."""
        return {
            "images": self.progress.images,
            "skipped_steps": self.progress.skipped_steps,
            "consecutive_skips": self.progress.consecutive_skips,
            "bad_samples": sorted(self.progress.bad_keys),
            "generations": self.generations.count,
            "guard": self.guard.state(),
            "wandb_id": self.log.wandb_id if self.log else None,
            "num_ranks": self.ranks.world_size,
            "model": self.prepared.model_fingerprint,
            "identity": training_identity(self.config),
        }


@contextlib.contextmanager
def open_session(config: Config, ranks: Ranks, hooks: Hooks) -> Iterator[Session]:
    """Build everything and take it down again. Collective. Raises ValueError for unusable input, on every rank."""
    with contextlib.ExitStack() as stack:
        remote = RemoteCheckpoints.of(config.checkpoint.remote, Path(config.run.path or "."))
        fresh = bool(_on_first(ranks, lambda: _is_fresh(config, hooks.command_id)))
        if remote and (ahead := _on_first(ranks, lambda: remote.join(fresh=fresh))):
            say_once(ranks, hooks, ahead)
        prepared = preflight(config) if ranks.world_size == 1 else _on_all(ranks, lambda: preflight(config))
        _on_first(ranks, lambda: stack.enter_context(run_lock(prepared.run_dir)))
        if remote and not fresh:
            hooks.stage("fetching a checkpoint")
            remote.fetch(ranks, lambda line: say_once(ranks, hooks, line))
        _on_first(ranks, lambda: check_tracking(config, prepared.run_dir, fresh=fresh))
        if fresh and (aside := _on_first(ranks, lambda: _moved(prepared.run_dir, hooks.command_id))):
            say_once(ranks, hooks, f"train.fresh: earlier results were moved to {aside}")
        if weights := agree(config, prepared.run_dir, prepared.pipeline, prepared.start, ranks):
            prepared = replace(prepared, start=weights, model_fingerprint=weights.fingerprint)
        judges = _on_first(ranks, lambda: hold_to_judges(config, prepared.run_dir))
        prepared = replace(prepared, judges=judges)
        grids = _grids(config, prepared, ranks, hooks)
        rollouts = open_rollouts(config, prepared.pipeline, ranks, hooks, stack)

        check_device(config, ranks)
        hooks.stage("loading the weights")
        transformer = prepared.pipeline / "transformer"
        model = load_transformer_config(transformer)
        source = weights.source if weights else None
        engine = build_engine(model, config, ranks, source or SafetensorsDirectory(transformer))
        stack.callback(engine.close)
        for line in describe(engine.groups):
            say_once(ranks, hooks, line)
        _on_first(ranks, lambda: write_json(prepared.run_dir / GROUPS_FILE, to_json(engine.groups)))
        ema = Ema(engine, config.optim.ema_decay) if config.optim.ema_decay else None
        hooks.stage("loading a checkpoint")
        loaded = load_newest(engine, ema, prepared.run_dir)
        if loaded is None and weights:
            _check_start(weights, ranks)
        progress = _progress(loaded, prepared, ranks, hooks)
        saver = Saver(engine, ema, prepared.run_dir, config.checkpoint)
        stack.callback(saver.close)
        if config.checkpoint.background:
            say_once(
                ranks,
                hooks,
                f"each rank keeps {saver.copy_bytes / 1e9:.3f} GB of host memory for saving beside training",
            )
        certifier = Certifier(engine, config, model, prepared, loaded.step if loaded else None)
        if config.checkpoint.certify != "off" and (note := certifier.measure(progress.step)):
            say_once(ranks, hooks, f"warning: {note}")

        _on_first(ranks, lambda: truncate_logs(prepared.run_dir, progress.step))
        _on_first(ranks, lambda: _describe(prepared.run_dir, config, ranks, loaded))
        log = ranks.together(lambda: _open_log(config, prepared, loaded, hooks) if ranks.is_first else None)
        stack.callback(lambda: log.close() if log else None)

        known = int(loaded.state["generations"]) if loaded else 0
        hooks.stage("opening the data")
        generations, stream = open_data(config, prepared, ranks, hooks, progress.step, known, stack)
        _on_first(ranks, lambda: tell_plan(config, generations, ranks, hooks, progress.step))
        batches = {phase.index: sorted(phase.weights) for phase in prepared.ledger.phases}
        held_out, start = baseline(
            config,
            prepared,
            generations,
            stream,
            engine,
            progress.step,
            say=lambda line: say_once(ranks, hooks, line),
            stage=hooks.stage,
        )
        hooks.stage("the reference")
        reference = open_reference(
            config,
            prepared,
            model,
            engine,
            generations,
            stream,
            step=progress.step,
            stack=stack,
            watch=_watch(ranks, hooks),
        )
        objective = build_objective(config, reference)
        if rollouts:
            rollouts.bind(engine, reference, generations)
            ranks.on_first(rollouts.check_prompts)
        yield Session(
            config=config,
            hooks=hooks,
            ranks=ranks,
            prepared=prepared,
            engine=engine,
            ema=ema,
            objective=objective,
            generations=generations,
            stream=stream,
            held_out=held_out,
            start=start,
            guard=_guard(config, start, loaded),
            grids=grids,
            rollouts=rollouts,
            throughput=Throughput(
                model,
                ranks,
                forwards_per_batch=objective.forwards_per_batch,
                forwards_without_gradient=_forwards_of_rollouts(config),
                peak_tflops=config.cluster.peak_tflops,
            ),
            certifier=certifier,
            saver=saver,
            remote=remote,
            log=log,
            report=ReportWriter(prepared.run_dir, hooks.say)
            if ranks.is_first and config.train.report != "off"
            else None,
            progress=progress,
            resolutions=batches,
        )


def _watch(ranks: Ranks, hooks: Hooks) -> Watch:
    def stop() -> None:
        if ranks.any(hooks.stop_requested()):
            raise Stopped

    return Watch(stage=hooks.stage, say=lambda line: say_once(ranks, hooks, line), stop=stop)


def _check_start(start: StartWeights, ranks: Ranks) -> None:
    """Before the first step: whether the weights are the bytes that were committed. Each file is hashed by one rank."""
    if start.checkpoint is not None and (fault := share_of_faults(start.checkpoint, ranks)):
        raise ValueError(f"start_from: {start.checkpoint}: {fault}; start_from.step takes an earlier checkpoint")


def _grids(config: Config, prepared: Prepared, ranks: Ranks, hooks: Hooks) -> Grids | None:
    edits = config.evaluate.edits and EDIT in kinds_of(config).values()
    if not config.evaluate.grid_every or not (config.evaluate.prompts or edits):
        return None
    from consumers.grids import Grids  # brings text encoder and VAE, which most starts do not need

    return Grids(config, prepared.pipeline, ranks, hooks.say)


def _forwards_of_rollouts(config: Config) -> int:
    objective = config.objective
    if not isinstance(objective, GrpoConfig):
        return 0
    return objective.num_steps + (objective.window if objective.kl_weight else 0)


def _guard(config: Config, start: Start | None, loaded: Loaded | None) -> Guard:
    return Guard(config.evaluate, start.losses if start else {}, loaded.state.get("guard") if loaded else None)


def _describe(run_dir: Path, config: Config, ranks: Ranks, loaded: Loaded | None) -> None:
    step, skipped = (loaded.step, loaded.skipped) if loaded else (0, [])
    write_descriptions(run_dir, config, ranks.world_size, step=step, skipped_checkpoints=skipped)


def _progress(loaded: Loaded | None, prepared: Prepared, ranks: Ranks, hooks: Hooks) -> Progress:
    if loaded is None:
        begun = f"{prepared.run_dir} has no checkpoint: starting fresh from "
        say_once(ranks, hooks, begun + (prepared.start.told if prepared.start else str(prepared.pipeline)))
        return Progress()
    for line in loaded.skipped:
        say_once(ranks, hooks, f"warning: skipped an invalid checkpoint, {line}")
    if loaded.state.get("model") != prepared.model_fingerprint:
        raise ValueError(
            f"the checkpoints in {prepared.run_dir} belong to a run that started from another transformer than "
            f"{prepared.start.told if prepared.start else prepared.pipeline}: restore model.path or start_from, or "
            "choose another run.path"
        )
    say_once(ranks, hooks, f"resuming from step {loaded.step} ({loaded.state['num_ranks']} ranks wrote it)")
    return Progress(
        step=loaded.step,
        images=int(loaded.state["images"]),
        skipped_steps=int(loaded.state["skipped_steps"]),
        consecutive_skips=int(loaded.state["consecutive_skips"]),
        bad_keys=set(loaded.state.get("bad_samples", [])),
    )


def _open_log(config: Config, prepared: Prepared, loaded: Loaded | None, hooks: Hooks) -> RunLog:
    return RunLog(
        config.logger,
        prepared.run_dir,
        samples=config.train.log_samples,
        wandb_id=loaded.state.get("wandb_id") if loaded else None,
        values=training_identity(config),
        say=hooks.say,
    )


def _is_fresh(config: Config, command_id: str) -> bool:
    """False for a restart of the gang by the same command: it goes on from its own checkpoints."""
    mark = Path(config.run.path or ".") / ".fresh"
    return config.train.fresh and not (command_id and mark.is_file() and mark.read_text() == command_id)


def _moved(run_dir: Path, command_id: str) -> str | None:
    aside = move_aside(run_dir)
    (run_dir / ".fresh").write_text(command_id)
    return str(aside) if aside else None


def _on_first(ranks: Ranks, action: Callable[[], Any]) -> Any:
    return ranks.on_first(action)


def _on_all(ranks: Ranks, action: Callable[[], _Result]) -> _Result:
    """Run on every rank, rank 0 first (it may have to build or download what the others then find)."""
    made: list[_Result] = []
    _on_first(ranks, lambda: made.append(action()))
    return ranks.together(lambda: made[0] if made else action())
