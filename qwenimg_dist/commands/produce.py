"""Pictures and captions in, a data set out: lists the source, then filters and encodes what is missing.

    qwenimg-dist produce source.path=PICTURES data.path=DATA [model=... encode.resolutions=[64,128] cluster.producers=4]

Run again, it does only what is missing: new files, changed captions, another resolution, other thresholds. With
`follow=true` it keeps watching the source until SIGTERM or Ctrl-C (exit code 0). Ended in any way, the same command
goes on; what is committed is kept. Bad input is refused before anything is written.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console

from producers import fence
from producers.actor import Job
from producers.commit import UnitConflictError
from producers.driver import Driver
from producers.hold import Hold
from producers.listing import check_kind
from producers.one_source import check_same_source
from producers.plan import Plan, make_plan
from producers.progress import ProduceProgress
from producers.sources import open_source, sample_kind
from producers.sources.base import Found, Source
from producers.tracking import WandbGauges, start_tracking
from producers.workers import ProduceError, Workers
from qwenimg_dist.commands.data import look_closer
from qwenimg_dist.commands.inputs import required
from qwenimg_dist.commands.produce_rounds import SETTLED_S, rounds
from qwenimg_dist.commands.stopping import catch_signals, stop_signals
from qwenimg_dist.compose import load_config
from qwenimg_dist.config import Config, EditsSource, ManifestSource, PairsSource, SourceConfig, WebdatasetSource
from qwenimg_dist.data.facets import DataError, Dataset
from qwenimg_dist.data.mirror import data_root
from qwenimg_dist.data.origin import Origin, known_origin, remember_origin
from qwenimg_dist.report.funnel import funnel
from qwenimg_dist.wandb_key import check_key

SUMMARY: Final = "a source of pictures and captions -> filtered, encoded shards and their index; resumable"

_WORKERS_GONE_S: Final = 150.0
"""Those on other machines outlive a Ray head that was killed by the minute that Ray looks for it."""
_NO_AGE_S: Final = 1e-9
_TRACKING: Final = ".tracking"
"""Of W&B, in the data set: hidden, since every other folder is a facet."""


def run(args: list[str]) -> int:
    """Bring the data set up to date with source and config. Returns 1 if that failed or was stopped halfway."""
    config = load_config(args)
    production = prepare(config, args)
    console = Console(soft_wrap=True)
    stop = threading.Event()
    try:
        finished = drive(production, ProduceProgress(console), stop)
    except ProduceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show_funnel(production, console)
    if not finished and not config.follow:
        print("error: stopped before the end; the same command goes on from here", file=sys.stderr)
        return 1
    return 0


@dataclass(frozen=True, kw_only=True)
class Production:
    """A `produce` that may begin: what can be refused without writing was not."""

    config: Config
    source: Source
    found: Found
    """The first look at the source."""
    pipeline_dir: Path
    plan: Plan
    told: tuple[str, ...] = ()
    """What it is about to do, in lines for the user."""

    @property
    def data_path(self) -> Path:
        return data_root(required(self.config.data.path, "data.path"), self.config.data)


def prepare(config: Config, args: Sequence[str] = ()) -> Production:
    """Look at source and config. Raises ValueError for anything unusable in either. `args` are the command's own words:
    what they do not say may have been forgotten."""
    required(config.data.path, "data.path")
    check_key(config.logger)
    source = open_source(config.source)
    # Of a source that is followed, a last line half written is left for the next look; young pictures are listed, and
    # the scan leaves them for later.
    found = source.find(min_age_s=_NO_AGE_S if config.follow else 0.0)
    pipeline_dir, plan = _plan(config)
    told = tuple(_intent(config, args))
    return Production(config=config, source=source, found=found, pipeline_dir=pipeline_dir, plan=plan, told=told)


def _intent(config: Config, args: Sequence[str]) -> Iterator[str]:
    model, cluster = config.model, config.cluster
    is_toy = model.name == "tiny" and model.path is None
    classes = " and ".join(str(resolution) for resolution in config.resolutions)
    device = cluster.device if cluster.gpus_per_producer > 0 else "cpu"
    producers = f"{cluster.producers} producer{'s' if cluster.producers != 1 else ''}"
    yield f"model {model.name}{' (a toy, for demos)' if is_toy else ''}, {classes} px, {producers} on {device}"
    is_meant = config.stage == "demo" or any(word.lstrip("+").startswith(("model=", "model.")) for word in args)
    if is_toy and not is_meant:
        yield (
            "warning: no model=... was given, so the features are made by the toy model, and are of use to no other: "
            "add model=qwen_image_2512 (or model=tiny, if the toy is meant)"
        )


def drive(
    production: Production,
    progress: ProduceProgress,
    stop: threading.Event,
    *,
    on_listed: Callable[[int], None] = lambda num_pending: None,
) -> bool:
    """Produce until the source is done, with `follow` until `stop`; producers and locks are given back at the end.

    `on_listed` hears once how many units there are to do. Returns False if stopped before the end. Raises ValueError
    (nothing was written) and `ProduceError`.
    """
    config, source = production.config, production.source
    with ExitStack() as stack:
        ray_is_up = False

        def join_ray() -> None:
            """Before anything is written that only producers can finish. Raises ValueError if there is no room."""
            nonlocal ray_is_up
            if not ray_is_up:
                from producers.ray_cluster import check_room, ray_session  # Ray takes seconds: only when there is work

                stack.enter_context(ray_session(config.cluster))
                ray_is_up = True
                check_room(config.cluster)

        def before_writing() -> None:
            join_ray()
            catch_signals(stop)  # Ray has put its own handlers there

        if not Dataset.is_there(production.data_path):
            join_ray()
        dataset = Dataset.create(production.data_path, config.data.unit_size)
        dataset.refresh()
        check_kind(dataset, sample_kind(config.source))
        stack.enter_context(dataset.lock())
        fence.sweep(dataset, timeout_s=_WORKERS_GONE_S)
        if dataset.mirror is not None:
            dataset.mirror.clean()
        origin = Origin(kind=config.source.kind, root=_absolute(source.root))
        found = check_same_source(dataset, known_origin(dataset), origin, production.found)
        remember_origin(dataset, origin)
        stack.callback(_sweep_after, dataset)  # runs after the workers' end
        stack.enter_context(progress)
        for line in production.told:
            progress.say(line)

        def make_workers() -> Workers:
            from producers.pool import RayWorkers
            from producers.ray_metrics import RayGauges

            join_ray()
            progress.gauges = [RayGauges(), *_tracked(production, dataset, stack, progress.say)]
            workers = RayWorkers(_job(production), config.cluster)
            stack.callback(workers.close)
            catch_signals(stop)
            return workers

        driver = Driver(
            dataset=dataset,
            plan=production.plan,
            root=source.root,
            make_workers=make_workers,
            before_writing=before_writing,
            observer=progress,
            stopping=stop.is_set,
            hold=_hold(production, dataset, progress),
            retry_missing=_retries_missing(config.source),
            min_age_s=SETTLED_S if config.follow else 0.0,
        )
        with stop_signals(stop):
            try:
                return rounds(driver, source, found, progress, stop, config.follow, on_listed)
            except UnitConflictError as error:  # workers try again; what the driver commits is the driver's alone
                raise ProduceError(f"another `produce` works on this data set: {error}; end one of them") from error


def _retries_missing(source: SourceConfig) -> bool:
    remote = ManifestSource | WebdatasetSource | PairsSource | EditsSource
    return isinstance(source, remote) and source.retry_missing


def _tracked(
    production: Production, dataset: Dataset, stack: ExitStack, say: Callable[[str], None]
) -> list[WandbGauges]:
    """W&B, where the logger asks for it; it gets the funnel at the end of the stack."""
    config = production.config
    if config.logger.wandb == "off":
        return []
    run_or_data = Path(config.run.path) if config.run.path else production.data_path
    group = run_or_data.resolve().name
    gauges = start_tracking(config.logger, production.data_path / _TRACKING, group=group, say=say)
    if gauges is None:
        return []
    stack.callback(lambda: gauges.finish(funnel(dataset).tables()))
    return [gauges]


def _hold(production: Production, dataset: Dataset, progress: ProduceProgress) -> Hold | None:
    config = production.config
    if config.cluster.max_ahead_bytes is None or config.run.path is None:
        return None
    facets = production.plan.facets
    return Hold(dataset, facets, Path(config.run.path), config.cluster.max_ahead_bytes, say=progress.say)


def show_funnel(production: Production, console: Console) -> None:
    """What became of the rows, on a terminal or as text."""
    counted = funnel(Dataset.open(production.data_path))
    for table in counted.tables():
        console.print(table.rich() if console.is_terminal else table.text(), highlight=False)
    if counted.reasons:
        console.print(look_closer(production.config.data.path, counted), highlight=False, markup=False)


def _plan(config: Config) -> tuple[Path, Plan]:
    """The pipeline's directory and what to make by it. Raises ValueError for anything unusable in either."""
    from qwenimg_dist.models.identity import latents_facet_names, text_facet_name
    from qwenimg_dist.models.pipeline import pipeline_dir

    plan = make_plan(
        config, text_facet="", latents_facets=dict.fromkeys(config.resolutions, "")
    )  # cheap refusals first
    for one in plan.filters:
        one.check()
    folder = pipeline_dir(config.model, components=("vae", "text_encoder", "tokenizer"))
    kind = sample_kind(config.source)
    plan = make_plan(
        config,
        text_facet=text_facet_name(folder, config, kind),
        latents_facets=latents_facet_names(folder, config, kind),
    )
    return folder, plan


def _job(production: Production) -> Job:
    config = production.config
    return Job(
        config_json=config.model_dump_json(),
        data_path=str(production.data_path.resolve()),
        pipeline_dir=str(production.pipeline_dir.resolve()),
        text_facet=production.plan.text_facet,
        latents_facets=dict(production.plan.latents_facets),
        root=_absolute(production.source.root),
        num_threads=max(1, int(config.cluster.cpus_per_producer)),
    )


def _absolute(root: str) -> str:
    return root if "://" in root else str(Path(root).resolve())


def _sweep_after(dataset: Dataset) -> None:
    """What cannot be removed now is left to the next run: nothing is wrong with a stray."""
    with suppress(DataError, OSError):
        fence.sweep(dataset, timeout_s=_WORKERS_GONE_S)
