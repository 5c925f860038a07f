"""Pictures and captions in, a data set out: lists the source, then filters and encodes what is missing.

    qwenimg-dist produce source.path=PICTURES data.path=DATA [model=... encode.resolutions=[64,128] cluster.producers=4]

Run again, it does only what is missing: new files, changed captions, another resolution, other thresholds. With
`follow=true` it keeps watching the source until SIGTERM or Ctrl-C (exit code 0). Ended in any way, the same command
goes on; what is committed is kept. Bad input is refused before anything is written.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Final

from rich.console import Console

from producers import fence
from producers.actor import Job
from producers.driver import Driver
from producers.listing import ListingChange, check_kind
from producers.plan import Plan, make_plan
from producers.progress import ProduceProgress
from producers.sources import open_source, sample_kind
from producers.sources.base import Found, Source
from producers.sources.folder import describe
from producers.workers import ProduceError, Workers
from qwenimg_dist.commands.data import look_closer
from qwenimg_dist.commands.inputs import required
from qwenimg_dist.compose import load_config
from qwenimg_dist.config import Config
from qwenimg_dist.data.facets import DataError, Dataset
from qwenimg_dist.data.origin import Origin, remember_origin
from qwenimg_dist.report.funnel import funnel

SUMMARY: Final = "a source of pictures and captions -> filtered, encoded shards and their index; resumable"

_WORKERS_GONE_S: Final = 60.0
_FOLLOW_POLL_S: Final = 2.0
_SETTLED_S: Final = 2.0
"""While following, a file counts as written once it was not touched for this long."""
_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


def run(args: list[str]) -> int:
    """Bring the data set up to date with source and config. Returns 1 if that failed or was stopped halfway."""
    config = load_config(args)
    data_path = Path(required(config.data.path, "data.path"))
    source = open_source(config.source)
    found = source.find()
    pipeline_dir, plan = _plan(config)
    console = Console(soft_wrap=True)
    with ExitStack() as stack:
        stop = threading.Event()
        ray_is_up = False

        def join_ray() -> None:
            """Before anything is written that only producers can finish. Raises ValueError if there is no room."""
            nonlocal ray_is_up
            if not ray_is_up:
                from producers.pool import check_room, ray_session  # Ray takes seconds: only when there is work

                stack.enter_context(ray_session(config.cluster))
                ray_is_up = True
                check_room(config.cluster)

        def before_writing() -> None:
            join_ray()
            _catch_signals(stop)  # Ray has put its own handlers there

        if not (data_path / "dataset.json").exists():
            join_ray()
        dataset = Dataset.create(data_path, config.data.unit_size)
        check_kind(dataset, sample_kind(config.source))
        stack.enter_context(dataset.lock())
        fence.sweep(dataset, timeout_s=_WORKERS_GONE_S)
        remember_origin(dataset, Origin(kind=config.source.kind, root=_absolute(source.root)))
        stack.callback(_sweep_after, dataset)  # runs after the workers' end
        progress = stack.enter_context(ProduceProgress(console))

        def make_workers() -> Workers:
            from producers.pool import RayWorkers
            from producers.ray_metrics import RayGauges

            join_ray()
            progress.gauges = RayGauges()
            workers = RayWorkers(_job(config, pipeline_dir, plan, source), config.cluster)
            stack.callback(workers.close)
            _catch_signals(stop)  # Ray has put its own handlers there
            return workers

        driver = Driver(
            dataset=dataset,
            plan=plan,
            root=source.root,
            make_workers=make_workers,
            before_writing=before_writing,
            observer=progress,
            stopping=stop.is_set,
        )
        with _signals(stop):
            try:
                finished = _rounds(driver, source, found, config.follow, stop, progress)
            except ProduceError as error:
                print(f"error: {error}", file=sys.stderr)
                return 1
    counted = funnel(dataset)
    for table in counted.tables():
        console.print(table.rich() if console.is_terminal else table.text(), highlight=False)
    if counted.reasons:
        console.print(look_closer(config.data.path, counted), highlight=False, markup=False)
    if not finished and not config.follow:
        print("error: stopped before the end; the same command goes on from here", file=sys.stderr)
        return 1
    return 0


def _rounds(
    driver: Driver, source: Source, found: Found, follow: bool, stop: threading.Event, progress: ProduceProgress
) -> bool:
    """One round, or with `follow` rounds until a stop; False if the last one did not reach its end."""
    said: set[str] = set()
    finished = _round(driver, found, progress, said, every_unit=True)
    for what, number in sorted(found.dropped.items()):
        progress.say(f"dropped {number} {what}")
    while follow and not stop.is_set():
        began = time.monotonic()
        try:
            found = source.find(min_age_s=_SETTLED_S)
            finished = _round(driver, found, progress, said, every_unit=False)
        except ValueError as error:  # a line half written, a folder emptied: what is there next time counts
            progress.say(f"looking again: {error}")
        stop.wait(max(_FOLLOW_POLL_S, 5 * (time.monotonic() - began)))
    return finished


def _round(driver: Driver, found: Found, progress: ProduceProgress, said: set[str], *, every_unit: bool) -> bool:
    change = driver.list_source(found)
    if every_unit and found.ignored.total():
        progress.say(f"no rows for {describe(found.ignored)}")
    for problem in found.problems:
        if problem not in said:  # once, though `follow` meets it again and again
            said.add(problem)
            progress.say(f"warning: {problem}")
    pending = driver.pending(None if every_unit else change.units)
    if pending or every_unit:
        progress.say(_announce(change, len(pending)))
    return driver.produce(pending, change.num_rows)


def _announce(change: ListingChange, num_pending: int) -> str:
    listed = f"{change.num_rows} rows listed ({change.added} new, {change.recaptioned} with other captions)"
    return f"{listed}; {num_pending} units to do" if num_pending else f"{listed}; nothing to do"


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


def _job(config: Config, pipeline_dir: Path, plan: Plan, source: Source) -> Job:
    return Job(
        config_json=config.model_dump_json(),
        data_path=str(Path(required(config.data.path, "data.path")).resolve()),
        pipeline_dir=str(pipeline_dir.resolve()),
        text_facet=plan.text_facet,
        latents_facets=dict(plan.latents_facets),
        root=_absolute(source.root),
        num_threads=max(1, int(config.cluster.cpus_per_producer)),
    )


def _absolute(root: str) -> str:
    return root if "://" in root else str(Path(root).resolve())


def _sweep_after(dataset: Dataset) -> None:
    """What cannot be removed now is left to the next run: nothing is wrong with a stray."""
    with suppress(DataError, OSError):
        fence.sweep(dataset, timeout_s=_WORKERS_GONE_S)


@contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    """SIGTERM and SIGINT ask for a stop; what was there before comes back afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
    _catch_signals(stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _catch_signals(stop: threading.Event) -> None:
    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice
        stop.set()

    if threading.current_thread() is threading.main_thread():
        for number in _STOP_SIGNALS:
            signal.signal(number, ask)
