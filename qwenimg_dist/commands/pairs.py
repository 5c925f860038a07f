"""Prompts in, preference pairs out: draws each prompt with several seeds and keeps the best and the worst picture.

    qwenimg-dist pairs sample.prompts_file=prompts.jsonl pairs.path=PAIRS sample.path=PIPELINE reward.weights.ocr=1
    qwenimg-dist pairs ... run.path=RUN reward.weights.shapes=1 pairs.num_seeds=16 cluster.producers=8
    qwenimg-dist produce source=pairs source.path=PAIRS data.path=DATA

Prompts are lines of a .txt, or rows of a .jsonl with `prompt` and what a reward needs to know besides. Pictures are
drawn by a pipeline directory, an export, or a run's newest checkpoint (then held to), as `sample` does. A prompt whose
best picture is not better than its worst by `pairs.margin` gives no pair. Ended in any way, the same command goes on
with the next prompt; prompts that could not be judged are tried again, and new ones in the file are added.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qwenimg_dist.commands.inputs import required
from qwenimg_dist.commands.pairs_actor import Job, PromptTask, Reply
from qwenimg_dist.commands.pairs_book import Book, key_of, read_settings
from qwenimg_dist.commands.stopping import catch_signals, stop_signals
from qwenimg_dist.config import Config
from qwenimg_dist.config_of_run import config_for_drawing
from qwenimg_dist.prompts_file import prompts_of
from qwenimg_dist.report.table import Table
from qwenimg_dist.rewards import refusals, what_counts
from qwenimg_dist.rewards.base import Prompt

SUMMARY: Final = "prompts -> preference pairs: several seeds each, the best and the worst by the rewards; resumable"

_MAX_FAILED: Final = 20
"""Prompts in a row that no picture of could be judged: then the rewards are at fault, and drawing goes to waste."""
_POLL_S: Final = 1.0
_LINE_EVERY_S: Final = 10.0
_STEP: Final = "checkpoint_step"


def run(args: list[str]) -> int:
    """Make the pairs that are missing. Returns 1 if that failed or was stopped halfway."""
    config = config_for_drawing(args)
    folder = Path(required(config.pairs.path, "pairs.path"))
    prompts = _prompts(config)
    config, settings = _settled(config, read_settings(folder))
    console = Console(soft_wrap=True)
    with ExitStack() as stack:
        book = stack.enter_context(Book(folder, settings))
        todo = [task for key, task in prompts.items() if key not in book]
        console.print(f"{len(prompts)} prompts, {len(todo)} to do", highlight=False)
        making = _Making(book, console, len(todo))
        failure = _make(config, folder, todo, making, stack) if todo else None
        _sheet(config, book)
        table = making.table(len(prompts))
        console.print(table.rich() if console.is_terminal else table.text(), highlight=False)
        for note in making.notes:
            console.print(f"warning: {note}", highlight=False, markup=False)
    if failure is not None:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    if book.num_kept:
        console.print(f"next: qwenimg-dist produce source=pairs source.path={folder} data.path=...", highlight=False)
    return 0


def _prompts(config: Config) -> dict[str, PromptTask]:
    """By key, in the file's order; the same prompt twice is one. Raises ValueError for prompts that the rewards cannot
    judge, before anything is drawn."""
    prompts = prompts_of(config)
    if not prompts:
        raise ValueError("nothing to draw: set sample.prompts_file=FILE or sample.prompts=[...]")
    if refused := refusals(config.reward, prompts):
        told = "; ".join(f"prompt {number + 1}: {why}" for number, why in refused)
        raise ValueError(f"there are prompts of which no picture can be judged: {told}. Remove or correct them")
    return {key: _task(key, prompt) for prompt in prompts for key in (key_of(prompt),)}


def _task(key: str, prompt: Prompt) -> PromptTask:
    return PromptTask(key=key, text=prompt.text, metadata=dict(prompt.metadata))


def _settled(config: Config, before: Mapping[str, Any] | None) -> tuple[Config, dict[str, Any]]:
    """The config with the checkpoint of `run.path` named, the one that an earlier command took if there was one; and
    what the folder is held to."""
    from qwenimg_dist.commands.painter import newest_step, what_draws  # bring torch: after the cheap refusals

    step = before.get(_STEP) if before is not None and config.export.step is None else None
    if step is None:
        step = newest_step(config)
    if step is not None:
        config = config.model_copy(update={"export": config.export.model_copy(update={"step": step})})
    settings = {
        "pictures": what_draws(config, step),
        _STEP: step,
        "rewards": what_counts(config.reward),
        "num_seeds": config.pairs.num_seeds,
        "seed": config.pairs.seed,
        "margin": config.pairs.margin,
    }
    return config, settings


def _make(
    config: Config,
    folder: Path,
    todo: Sequence[PromptTask],
    making: _Making,
    stack: ExitStack,
) -> str | None:
    """Do the prompts; returns why not all of them, if so."""
    from producers.ray_cluster import ray_session
    from qwenimg_dist.commands.pairs_pool import PairsError, open_pool

    stop = threading.Event()
    stack.enter_context(stop_signals(stop))
    stack.enter_context(ray_session(config.cluster))
    catch_signals(stop)  # Ray has put its own handlers there
    pool = open_pool(_job(config, folder), config.cluster, len(todo))
    stack.callback(pool.close)
    waiting = deque(todo)
    with making:
        try:
            while not stop.is_set():
                while waiting and pool.num_idle():
                    pool.submit(waiting.popleft())
                if not waiting and not pool.num_busy:
                    return making.unfinished
                for task, reply in pool.wait(_POLL_S):
                    making.take(task, reply)
                    if making.hopeless:
                        return making.hopeless
        except PairsError as error:
            return str(error)
    return "stopped before the end; the same command goes on from here"


def _job(config: Config, folder: Path) -> Job:
    return Job(
        config_json=config.model_dump_json(),
        folder=str(folder.resolve()),
        cwd=str(Path.cwd()),
        num_threads=max(1, int(config.cluster.cpus_per_producer)),
    )


class _Making:
    """What has become of this command's prompts, shown as they come: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, book: Book, console: Console, total: int) -> None:
        self._book = book
        self._console = console
        self._total = total
        self._done: Counter[str] = Counter()
        self._failed_in_a_row = 0
        self._unjudged = 0
        self._last_line = time.monotonic()
        self.hopeless: str | None = None
        """Why it is of no use to go on."""
        self.notes: list[str] = []
        self._bar = Progress(
            TextColumn("prompts"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("loading the models", total=total)

    def __enter__(self) -> _Making:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    @property
    def unfinished(self) -> str | None:
        """At the end: whether some prompts are left."""
        failed = self._done["failed"]
        return f"{failed} prompts could not be judged; the same command tries them again" if failed else None

    def take(self, task: PromptTask, reply: Reply) -> None:
        """A prompt's end: into the book, onto the screen."""
        self._done[reply.outcome] += 1
        self._unjudged += reply.num_unjudged
        for note in reply.notes:
            if note not in self.notes and len(self.notes) < 5:
                self.notes.append(note)
        self._failed_in_a_row = self._failed_in_a_row + 1 if reply.outcome == "failed" else 0
        if reply.outcome == "fatal":
            self.notes = []
            self.hopeless = f"prompt {task.text!r}: {reply.notes[0]}"
        elif self._failed_in_a_row >= _MAX_FAILED:
            self.hopeless = (
                f"{_MAX_FAILED} prompts in a row could not be judged ({'; '.join(reply.notes) or 'NaN'}): mend the "
                "reward, or raise reward.timeout_s; the same command goes on"
            )
        if reply.outcome in ("kept", "tie"):
            self._book.write("kept" if reply.outcome == "kept" else "tie", reply.record)
        self._show()

    def table(self, num_prompts: int) -> Table:
        """The folder as it is now."""
        gaps = self._book.gaps
        rows: list[tuple[str, int | float | None]] = [
            ("prompts", num_prompts),
            ("pairs kept", len(gaps)),
            ("ties", self._book.num_ties),
            ("failed", self._done["failed"]),
            ("left", num_prompts - len(gaps) - self._book.num_ties - self._done["failed"]),
            ("mean gap", sum(gaps) / len(gaps) if gaps else None),
            ("pictures without a reward", self._unjudged),
        ]
        return Table(title="pairs", columns=("", "number"), rows=tuple(rows))

    def _show(self) -> None:
        done = self._done.total()
        told = f"{self._done['kept']} kept, {self._done['tie']} ties, {self._done['failed']} failed"
        self._bar.update(self._task, completed=done, description=told)
        if not self._console.is_terminal and time.monotonic() - self._last_line >= _LINE_EVERY_S:
            self._last_line = time.monotonic()
            self._console.print(f"{done}/{self._total} prompts: {told}", highlight=False)


def _sheet(config: Config, book: Book) -> None:
    """`sheet.html`: the newest pairs beside each other."""
    if not config.pairs.sheet or not book.num_kept:
        return
    from qwenimg_dist.report.page import Picture, Pictures, Section, write_report

    sections = tuple(
        Section(title=record["prompt"], pieces=(Pictures(pictures=tuple(_two(book.folder, record, Picture))),))
        for record in book.newest(config.pairs.sheet)
        if all((book.folder / record[name]).is_file() for name in ("chosen", "rejected"))
    )
    write_report(book.folder / "sheet.html", title="Preference pairs", sections=sections)


def _two(folder: Path, record: Mapping[str, Any], picture: Any) -> Iterator[Any]:
    for name in ("chosen", "rejected"):
        told = ", ".join(f"{key} {value:.3g}" for key, value in record["rewards"][name].items())
        yield picture.read(folder / record[name], f"{name}: {told}")
