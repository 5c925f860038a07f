"""Where a run's numbers go: `metrics.jsonl` always, W&B besides; and the peak FLOPs that utilisation is measured by.

Place in the flow: the trainer's rank 0 writes one line per logged step. After a kill, a resume cuts the files back to
the checkpoint's step, so no step stands there twice. Refuses to fail a run because of W&B: what goes wrong there is
said once. Deliberately left out: TensorBoard, and any config value in W&B beyond what changes the numbers (a resolved
config may hold secrets).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from qwenimg_dist.config import LoggerConfig
from qwenimg_dist.patience import is_away

if TYPE_CHECKING:
    from PIL.Image import Image

STEP_KEY: Final = "train/global_step"
PRODUCE_STEP_KEY: Final = "produce/units"
_KINDS: Final = {STEP_KEY: ("train/*", "eval/*", "norms/*", "reward/*"), PRODUCE_STEP_KEY: ("produce/*",)}
"""The x-axis of a run -> the metrics that are drawn over it."""
_BLOCK_BYTES: Final = 1 << 18

# Dense bf16 tensor FLOP/s from the vendors' data sheets, by a part of the device's name; longest match wins.
PEAK_FLOPS: Final[Mapping[str, float]] = {
    "A100": 312e12,
    "A800": 312e12,
    "H100": 989.4e12,
    "H100 PCIe": 756e12,
    "H800": 989.4e12,
    "H200": 989.4e12,
    "H20": 148e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "L40S": 362e12,
    "RTX 4090": 165.2e12,
    "RTX 5090": 209.5e12,
}


def peak_flops(device_name: str) -> float | None:
    """Peak dense bf16 FLOP/s of a GPU by its name; None where it is not known (a CPU among others)."""
    words = f" {device_name} ".replace("-", " ")
    known = [name for name in PEAK_FLOPS if f" {name} " in words]
    return PEAK_FLOPS[max(known, key=len)] if known else None


class JsonLines:
    """An append-only file of JSON objects with a `step`, at most one line per step."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._sink = open(file, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the run

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line. NaN and infinities become null, which every JSON reader takes."""
        line = {"step": step, **{key: _plain(value) for key, value in values.items()}}
        self._sink.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._sink.flush()

    def sync(self) -> None:
        """Make everything written so far durable; called before a checkpoint is committed."""
        self._sink.flush()
        os.fsync(self._sink.fileno())

    def close(self) -> None:
        self.sync()
        self._sink.close()


def truncate_after(file: Path, step: int) -> int:
    """Drop lines of later steps, and what is torn or damaged after the last one kept. Returns how many were dropped.

    Steps ascend, so the file is read from its end: that costs what is dropped, however long the run has been.
    """
    if not file.is_file():
        return 0
    with open(file, "r+b") as log:
        end = keep = log.seek(0, os.SEEK_END)
        dropped = 0
        for start, line in lines_from_the_end(log, end):
            found = _step_of(line) if line.endswith(b"\n") else None
            if found is not None and found <= step:
                break
            keep, dropped = start, dropped + bool(line.strip())
        if keep < end:
            log.truncate(keep)
            os.fsync(log.fileno())
    return dropped


def lines_from_the_end(log: BinaryIO, end: int) -> Iterator[tuple[int, bytes]]:
    """(offset, line with its newline where it has one), the last line first."""
    held, at = b"", end  # bytes from `at` on that were not given yet
    while at > 0 or held:
        newline = held.rfind(b"\n", 0, max(0, len(held) - 1))
        if newline >= 0 or at == 0:
            yield at + newline + 1, held[newline + 1 :]
            held = held[: newline + 1]
        else:
            begin = max(0, at - _BLOCK_BYTES)
            log.seek(begin)
            held, at = log.read(at - begin) + held, begin


def last_entries(file: Path, num: int) -> list[dict[str, Any]]:
    """The last `num` whole objects of a JSON-lines file, oldest first; damaged lines do not count."""
    found: list[dict[str, Any]] = []
    if not file.is_file():
        return found
    with open(file, "rb") as log:
        for _, line in lines_from_the_end(log, log.seek(0, os.SEEK_END)):
            if len(found) == num:
                break
            if line.endswith(b"\n"):
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                    found += [entry] if isinstance(entry, dict) else []
    return found[::-1]


def _step_of(line: bytes) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Wandb:
    """One W&B run. Its own step is never set: the x-axis is `train/global_step`, so a resume may repeat steps."""

    def __init__(
        self,
        config: LoggerConfig,
        run_dir: Path,
        *,
        run_id: str | None,
        values: Mapping[str, Any],
        step_key: str = STEP_KEY,
        group: str | None = None,
    ) -> None:
        """`run_id` is the checkpoint's, to continue that run; `values` is what W&B shows as config (no secrets).
        Files of an offline run go to `run_dir`, which also names the group where neither `group` nor the config does.
        """
        import wandb

        self._step_key = step_key

        online = config.wandb == "online"
        self._run = wandb.init(
            project=config.project,
            # An offline attempt cannot continue an earlier one; the group holds them together.
            group=config.group or group or run_dir.resolve().name,
            job_type=step_key.partition("/")[0],
            name=config.name,
            mode="online" if online else "offline",
            id=run_id if online else None,
            resume="must" if online and run_id else None,
            dir=str(run_dir),
            config=dict(values),
            # No command line, environment or address of a remote: each may hold a token.
            settings=wandb.Settings(x_disable_meta=True, disable_git=True, console="off", silent=True),
        )
        self._run.define_metric(step_key)
        for kind in _KINDS[step_key]:
            self._run.define_metric(kind, step_metric=step_key)
        self._image, self._table, self._teardown = wandb.Image, wandb.Table, wandb.teardown
        self.run_id: str | None = self._run.id if online else None

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({**values, self._step_key: step})

    def log_picture(self, step: int, name: str, file: Path) -> None:
        self._run.log({f"eval/{name}": self._image(str(file)), self._step_key: step})

    def log_prompts(self, step: int, name: str, prompts: Sequence[str], pictures: Sequence[Image]) -> None:
        rows = [[prompt, self._image(picture)] for prompt, picture in zip(prompts, pictures, strict=True)]
        self._run.log({f"eval/{name}": self._table(columns=["prompt", "picture"], data=rows), self._step_key: step})

    def log_table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        table = self._table(columns=list(columns), data=[[_plain(value) for value in row] for row in rows])
        self._run.log({name: table, self._step_key: step})

    def close(self) -> None:
        """End the run, and W&B's process beside this one: left to the end of this process, it may be gone by then (a
        stopped job signals all of its processes), and the last words would be a traceback."""
        try:
            self._run.finish()
        finally:
            self._teardown()


class RunLog:
    """`metrics.jsonl`, `tables.jsonl`, `samples.jsonl` and W&B of one run; only rank 0 has one."""

    def __init__(
        self,
        config: LoggerConfig,
        run_dir: Path,
        *,
        samples: bool,
        wandb_id: str | None,
        values: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        """`say` hears once what becomes of W&B: a rank's own stderr is shown to nobody under Ray."""
        self._say = say
        self._metrics = JsonLines(run_dir / "metrics.jsonl")
        self._tables = JsonLines(run_dir / "tables.jsonl")
        self._samples = JsonLines(run_dir / "samples.jsonl") if samples else None
        self._files = [file for file in (self._metrics, self._tables, self._samples) if file]
        self.problem = ""
        """Why a line could not be written (a full disk), the first time; nothing is written after it. For the trainer
        to raise on all ranks: raised here, it would be rank 0's alone."""
        self.is_away = False
        """Whether that was storage that did not answer: a new start of the gang may find it back."""
        self._wandb: Wandb | None = None
        self._wandb_id = wandb_id
        if config.wandb != "off":
            self._wandb = _start_wandb(config, run_dir, wandb_id, values, say)
        if self._wandb and self._wandb.run_id:
            self._wandb_id = self._wandb.run_id

    @property
    def wandb_id(self) -> str | None:
        """Of the run on the server, for the checkpoint: kept through attempts without it, and when W&B fails."""
        return self._wandb_id

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._keep(self._metrics, lambda: self._metrics.write(step, values))
        if self._wandb:
            self._guard(lambda wandb: wandb.log(step, values))

    def samples(self, step: int, bucket: str, keys: list[str]) -> None:
        if samples := self._samples:
            self._keep(samples, lambda: samples.write(step, {"bucket": bucket, "keys": keys}))

    def picture(self, step: int, name: str, file: Path) -> None:
        self._guard(lambda wandb: wandb.log_picture(step, name, file))

    def prompts(self, step: int, name: str, prompts: Sequence[str], pictures: Sequence[Image]) -> None:
        """A table of W&B with one row per prompt, which may be searched and followed by prompt; not in the files."""
        self._guard(lambda wandb: wandb.log_prompts(step, name, prompts, pictures))

    def table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, group: str = "eval"
    ) -> None:
        """One line of `tables.jsonl` with all rows, and the table `GROUP/NAME` of W&B."""
        plain = [dict(zip(columns, map(_plain, row), strict=True)) for row in rows]
        self._keep(self._tables, lambda: self._tables.write(step, {"table": name, "rows": plain}))
        self._guard(lambda wandb: wandb.log_table(step, f"{group}/{name}", columns, rows))

    def sync(self) -> None:
        """Make everything written so far durable; see `problem`."""
        for file in self._files:
            self._keep(file, file.sync)

    def close(self) -> None:
        """Close the files, whatever became of them, and end W&B's run."""
        for file in self._files:
            with contextlib.suppress(OSError):
                file.close()
        self._guard(lambda wandb: wandb.close())

    def _keep(self, file: JsonLines, action: Callable[[], None]) -> None:
        if self.problem:
            return
        try:
            action()
        except OSError as error:
            self.problem, self.is_away = f"{file.file}: {error.strerror or error}", is_away(error)

    def _guard(self, action: Any) -> None:
        if self._wandb is None:
            return
        try:
            action(self._wandb)
        except Exception as error:  # a lost tracker must not cost a training run
            self._say(f"warning: W&B failed and is off from here on ({type(error).__name__}: {error})")
            self._wandb = None


def _start_wandb(
    config: LoggerConfig,
    run_dir: Path,
    wandb_id: str | None,
    values: Mapping[str, Any],
    say: Callable[[str], None],
) -> Wandb | None:
    """A first start says what is wrong (ValueError); a run that was tracked before goes on without."""
    try:
        return Wandb(config, run_dir, run_id=wandb_id, values=values)
    except Exception as error:
        what = f"W&B does not start ({type(error).__name__}: {error})"
        if wandb_id is None:
            raise ValueError(f"{what}: log in, or choose logger=offline or logger=off") from error
        say(f"warning: {what}; the run goes on without it")
        return None


def truncate_logs(run_dir: Path, step: int) -> None:
    """Cut the run's files of lines per step back to what a run at `step` had written."""
    for name in ("metrics.jsonl", "tables.jsonl", "samples.jsonl", "bad_samples.jsonl"):
        truncate_after(run_dir / name, step)
