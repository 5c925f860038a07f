"""What every benchmark shares: repeats that are interleaved, figures with their spread, a table, JSON, machine facts.

Place in the flow: `python tests/bench/NAME.py [--quick] [--repeats N] [--out FILE]` builds a `Report` with this file,
prints it and writes it. Variants run A B A B, so that a slow minute of a shared machine hits all of them, and ratios
are taken within a round. Deliberately left out: thresholds. A benchmark says what is; targets are printed beside it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
_PACKAGES: Final = ("torch", "deepspeed", "ray", "diffusers", "transformers", "webdataset", "safetensors", "numpy")
_RANK_TIMEOUT_S: Final = 1800

Figures = dict[str, float]
"""What one repeat of one variant gives: name with unit -> value."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A figure over the repeats."""

    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        low, high = min(self.values), max(self.values)
        if low == high:
            return _short(self.median)
        return f"{_short(self.median)} ({_short(low)}-{_short(high)})"

    def as_json(self) -> dict[str, Any]:
        return {
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "num": len(self.values),
            "values": self.values,
        }


@dataclass(kw_only=True)
class Report:
    """One benchmark's result. `rows` keeps the order in which variants were added."""

    name: str
    what: str
    """One sentence: what is measured against what."""
    settings: dict[str, Any] = field(default_factory=dict)
    targets: list[str] = field(default_factory=list)
    """What the project aims at, in words; nothing is asserted."""
    rows: dict[str, dict[str, Spread]] = field(default_factory=dict)
    ratios: dict[str, Spread] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    load_before: float = field(default_factory=lambda: os.getloadavg()[0])

    def add(self, variant: str, repeats: Sequence[Figures]) -> None:
        """The repeats of one variant; all of them have the same figures."""
        self.rows[variant] = {name: Spread(values=[r[name] for r in repeats]) for name in repeats[0]}

    def add_ratio(self, label: str, figure: str, above: str, below: str) -> None:
        """`figure` of variant `above` divided by that of `below`, round by round."""
        pairs = zip(self.rows[above][figure].values, self.rows[below][figure].values, strict=True)
        self.ratios[label] = Spread(values=[a / b for a, b in pairs])

    def table(self) -> str:
        """Plain text: one line per variant, one column per figure, medians with (min-max)."""
        columns = list(dict.fromkeys(name for row in self.rows.values() for name in row))
        lines = [["", *columns]]
        lines += [[variant, *(str(row.get(name, "")) for name in columns)] for variant, row in self.rows.items()]
        text = [f"{self.name}: {self.what}", _settings_line(self.settings), "", *_aligned(lines)]
        if self.ratios:
            text += ["", *_aligned([["ratio", "median (min-max)"], *([k, str(v)] for k, v in self.ratios.items())])]
        text += ["", *(f"target: {target}" for target in self.targets), *(f"note: {note}" for note in self.notes)]
        text.append(f"load average {self.load_before:.1f} before, {os.getloadavg()[0]:.1f} after")
        return "\n".join(text)

    def as_json(self) -> dict[str, Any]:
        return {
            "benchmark": self.name,
            "what": self.what,
            "machine": machine_facts(),
            "load_average": {"before": self.load_before, "after": os.getloadavg()[0]},
            "settings": self.settings,
            "targets": self.targets,
            "rows": {v: {name: s.as_json() for name, s in row.items()} for v, row in self.rows.items()},
            "ratios": {label: s.as_json() for label, s in self.ratios.items()},
            "notes": self.notes,
        }

    def finish(self, args: argparse.Namespace) -> int:
        """Print the table, write `--out`; returns the exit code."""
        print(self.table(), flush=True)
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")
        return 0


def parser(doc: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="small sizes and few repeats: shows that it runs")
    options.add_argument("--repeats", type=int, default=None, help=f"rounds (default {repeats}, 3 with --quick)")
    options.add_argument("--out", type=Path, default=None, help="write the figures as JSON")
    options.add_argument("--worker", type=json.loads, default=None, help=argparse.SUPPRESS)
    options.set_defaults(default_repeats=repeats)
    return options


def num_repeats(args: argparse.Namespace) -> int:
    """Rounds to run."""
    if args.repeats is not None:
        return max(1, int(args.repeats))
    return min(3, args.default_repeats) if args.quick else int(args.default_repeats)


def interleaved(
    variants: Mapping[str, Callable[[], Figures]], *, repeats: int, warmup: int = 1
) -> dict[str, list[Figures]]:
    """Run every variant once per round; `warmup` rounds are thrown away."""
    found: dict[str, list[Figures]] = {name: [] for name in variants}
    for number in range(-warmup, repeats):
        for name, run in variants.items():
            figures = run()
            if number >= 0:
                found[name].append(figures)
    return found


@dataclass
class Clock:
    """What `timed` measured; filled when its block ends."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    """User and system time of this process and of the children that ended within the block."""
    kernel_s: float = 0.0
    """The system time of it: what the kernel copies and waits for."""


@contextmanager
def timed() -> Iterator[Clock]:
    """Wall and CPU time of a block."""
    clock = Clock()
    wall, (user, kernel) = time.perf_counter(), _cpu_s()
    yield clock
    user_after, kernel_after = _cpu_s()
    clock.wall_s, clock.kernel_s = time.perf_counter() - wall, kernel_after - kernel
    clock.cpu_s = user_after - user + clock.kernel_s


@contextmanager
def scratch(name: str) -> Iterator[Path]:
    """A folder for the benchmark's files, removed at the end. `TMPDIR` says where."""
    folder = Path(tempfile.mkdtemp(prefix=f"bench-{name}-"))
    # So that the ranks and the folder go too when the benchmark is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_ranks(script: str, num_ranks: int, job: Mapping[str, Any], folder: Path, *, on_gpu: bool = False) -> list[Any]:
    """Run `script --worker JOB` on ranks with torchrun's environment; returns what each rank wrote with `answer`.

    Raises RuntimeError with the end of a rank's output if it failed; the other ranks are ended then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    started: list[tuple[subprocess.Popen[bytes], Path]] = []
    for rank in range(num_ranks):
        log, answers = folder / f"rank-{rank}.log", folder / f"rank-{rank}.json"
        answers.unlink(missing_ok=True)
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            **({} if on_gpu else {"DS_ACCELERATOR": "cpu"}),
        }
        command = [sys.executable, script, "--worker", json.dumps({**job, "answer": str(answers)})]
        with log.open("wb") as sink:
            process = subprocess.Popen(command, env=environment, stdout=sink, stderr=subprocess.STDOUT, cwd=ROOT)
        started.append((process, log))
    try:
        _wait_all(started)
    finally:
        for process, _ in started:
            if process.poll() is None:
                process.kill()
            process.wait()
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(num_ranks)]


def answer(job: Mapping[str, Any], value: Any) -> None:
    """In a rank: leave `value` for `run_ranks`."""
    Path(job["answer"]).write_text(json.dumps(value))


def machine_facts() -> dict[str, Any]:
    """Where and with what the figures were taken."""
    return {
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "cpu": _cpu_model(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": {name: _version(name) for name in _PACKAGES},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_clean": _git("status", "--porcelain", "--untracked-files=no") == "",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _wait_all(started: Sequence[tuple[subprocess.Popen[bytes], Path]]) -> None:
    deadline = time.monotonic() + _RANK_TIMEOUT_S
    while any(process.poll() is None for process, _ in started):
        failed = [log for process, log in started if process.poll() not in (None, 0)]
        if failed or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    for process, log in started:
        if process.poll() not in (None, 0):
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
            raise RuntimeError(f"{log.stem} ended with {process.returncode}:\n{tail}")
    if any(process.poll() is None for process, _ in started):
        raise RuntimeError(f"the ranks did not end within {_RANK_TIMEOUT_S} s")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _cpu_s() -> tuple[float, float]:
    """(user, system)."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime for usage in usages), sum(usage.ru_stime for usage in usages)


def _short(value: float) -> str:
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _settings_line(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]).rstrip()
        for line in lines
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
