"""The process beside a rank that notices when the rank is stopped, stalled or gone, says so, and ends it.

    python -I -S watchdog_process.py RANK HEARTBEAT_TIMEOUT_S STALL_TIMEOUT_S NOTE_FILE LOG_FILE    (signs on stdin)

Place in the flow: `watchdog.py` starts it as a child of the rank, in a session of its own, and writes a JSON line per
second into its stdin. A rank that is ended here makes the gang start anew, as any dead rank does: by Ray Train's
failure policy, or by torchrun. Standard library only: it must start in milliseconds and hold next to no memory.

Silence is counted in looks at the pipe and not by the clock, so that a machine that was frozen as a whole, this process
included, has all its ranks alive when it thaws. Refuses to blame: when a whole gang is torn down after one death, only
the first of them is reported (`NOTE_FILE` says when that was: a rank that began before belongs to the same gang).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

BYE = b"bye\n"
_LOOK_S = 1.0
_OOM_COUNTERS = ("/proc/vmstat", "/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")
_MEMINFO = Path("/proc/meminfo")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")
_CGROUP_FILES = (
    ("memory.max", "memory.current", ("active_file", "inactive_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
)
"""Limit, use and what of the use is files' (in `memory.stat`), of cgroup v2 and v1."""
_LITTLE_MEMORY = 0.08
"""Of the machine or container: Ray's memory monitor ends processes from 5 % on."""
_STATES = {"T": "stopped", "t": "stopped by a debugger", "D": "waiting for a disk or driver", "Z": "dead"}


@dataclass
class Seen:
    """What the rank told last, and what the machine looked like around then."""

    begin: float = field(default_factory=time.time)
    told: dict[str, object] = field(default_factory=dict)
    silent_s: float = 0.0
    said_bye: bool = False
    oom_kills: list[int] = field(default_factory=list)
    """At the last looks, the newest last."""
    available: list[float] = field(default_factory=list)
    """Share of the memory, likewise."""

    looked_at: float = 0.0

    def look(self) -> None:
        """At the machine, at most once per second."""
        if time.monotonic() - self.looked_at < _LOOK_S:
            return
        self.looked_at = time.monotonic()
        self.oom_kills = [*self.oom_kills[-9:], oom_kills()]
        self.available = [*self.available[-9:], available_memory()]

    def where(self) -> str:
        step, stage = self.told.get("step"), self.told.get("stage", "starting")
        done = "before its first step" if step is None else f"with {step} steps done"
        return f"{done}, stage '{stage}'"


def main(arguments: list[str]) -> int:
    """Watch the parent until it says goodbye (0), dies (1) or is ended (2)."""
    rank, timeout_s, stall_s = int(arguments[0]), float(arguments[1]), float(arguments[2])
    note, log = Path(arguments[3]), arguments[4]
    for number in (signal.SIGINT, signal.SIGTERM):  # a scheduler tells every process; the rank's end is this one's
        signal.signal(number, signal.SIG_IGN)
    pid = os.getppid()
    process = os.pidfd_open(pid)  # from here on no other process can be meant, whatever becomes of the number
    name = f"rank {rank} (pid {pid} on {socket.gethostname()})"
    seen, look_s = Seen(), min(_LOOK_S, timeout_s / 10)
    while True:
        alive = _listen(seen, process, look_s)
        if seen.said_bye:
            return 0
        if not alive:
            _report_death(seen, name, note, log)
            return 1
        if reason := _overdue(seen, pid, timeout_s, stall_s):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, signal.SIGKILL)
            _first_of_its_gang(note, seen.begin)
            say(f"watchdog: {name} {reason}. Ended it, so that the gang starts anew from the last checkpoint", log)
            return 2


def _listen(seen: Seen, process: int, look_s: float) -> bool:
    """Wait for signs, at most one look long; False once the rank is gone."""
    begin = time.monotonic()
    ready, _, _ = select.select([0, process], [], [], look_s)
    data = os.read(0, 1 << 16) if 0 in ready else None
    if data:
        seen.silent_s = 0.0
        seen.said_bye = data.endswith(BYE)
        with contextlib.suppress(ValueError, IndexError):  # a sign cut in two is told again in a second
            seen.told = json.loads(data.removesuffix(BYE).splitlines()[-1])
    else:
        seen.silent_s += min(time.monotonic() - begin, 2 * look_s)
    if data == b"" or process in ready:
        return data != b"" and process not in ready
    seen.look()
    return True


def _overdue(seen: Seen, pid: int, timeout_s: float, stall_s: float) -> str:
    stage_s = seen.told.get("stage_s", 0.0)
    if seen.silent_s > timeout_s:
        return (
            f"gave no sign of life for {seen.silent_s:.0f} s (train.heartbeat_timeout_s={timeout_s:g}); the last one "
            f"came {seen.where()}; its process is {process_state(pid)}"
        )
    if isinstance(stage_s, float) and stage_s > stall_s:
        return (
            f"lives, but has been in one place for {stage_s:.0f} s (train.stall_timeout_s={stall_s:g}): "
            f"{seen.where()}; its process is {process_state(pid)}"
        )
    return ""


def _report_death(seen: Seen, name: str, note: Path, log: str) -> None:
    if _first_of_its_gang(note, seen.begin):
        say(f"watchdog: {name} died without a word, {seen.where()}: {cause_of_death(seen)}", log)


def cause_of_death(seen: Seen) -> str:
    """What ended a process that could not say it: out of memory, as far as the machine's counters tell, or not."""
    held = seen.told.get("memory_gb")
    size = f" (it held {held:.2f} GB)" if isinstance(held, float) else ""
    if seen.oom_kills and oom_kills() > seen.oom_kills[0]:
        return (
            f"SIGKILL by the kernel, which ran out of host memory{size}. Fewer ranks per machine, "
            "more host memory, or smaller batches keep it alive"
        )
    least = min(seen.available, default=1.0)
    if least < _LITTLE_MEMORY:
        return (
            f"host memory had run low, {least:.1%} of it was left{size}: SIGKILL by Ray's memory monitor or the "
            "kernel, most likely. Fewer ranks per machine, more host memory, or smaller batches keep it alive"
        )
    return f"SIGKILL, or a crash in native code; {least:.0%} of the host memory were free{size}"


def process_state(pid: int) -> str:
    """`T (stopped)`, `R`, ... of a process; `gone` if there is none."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"
    return f"in state {letter} ({_STATES[letter]})" if letter in _STATES else f"in state {letter}"


def oom_kills() -> int:
    """Processes that the kernel has ended for lack of memory, by the machine and by this container's limit."""
    total = 0
    for file in _OOM_COUNTERS:
        with contextlib.suppress(OSError, ValueError):
            lines = Path(file).read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return total


def available_memory() -> float:
    """Share of the memory of machine or container that is available, 0..1; 1 where that cannot be read."""
    free, whole = host_memory() or (1, 1)
    return free / whole


def host_memory() -> tuple[int, int] | None:
    """(available, all) bytes of the machine, or of the control group around this process that has less to give: a
    container's limit lies below its machine's memory. None where nothing can be read."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
        sizes = _sizes(_MEMINFO)
        found.append((1024 * sizes["MemAvailable:"], 1024 * sizes["MemTotal:"]))
    for folder in _control_groups():
        for limit, taken, files in _CGROUP_FILES:
            with contextlib.suppress(OSError, ValueError, IndexError, KeyError):  # `max`: no limit here
                whole, sizes = int((folder / limit).read_text()), _sizes(folder / "memory.stat")
                # As the machine's figure does: what files have left in memory is given up when it is asked for.
                used = int((folder / taken).read_text()) - sum(sizes[name] for name in files)
                found.append((max(0, whole - used), whole))
    return min((pair for pair in found if pair[1]), default=None)


def _sizes(file: Path) -> dict[str, int]:
    words = [line.split() for line in file.read_text().splitlines()]
    return {word[0]: int(word[1]) for word in words}


def _control_groups() -> Iterator[Path]:
    """Those that this process is in, up to the root, which is the container's own where it sees no further."""
    with contextlib.suppress(OSError, ValueError):
        for line in _OWN_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            root = _CGROUPS / "memory" if controllers else _CGROUPS
            if not controllers or "memory" in controllers.split(","):
                parts = [part for part in path.split("/") if part]
                yield from (root.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1))


def _first_of_its_gang(note: Path, begin: float) -> bool:
    """Whether no rank has died since this one began; remembers that one has."""
    last = 0.0
    with contextlib.suppress(OSError, ValueError):
        last = float(note.read_text())
    with contextlib.suppress(OSError):
        note.write_text(str(time.time()))
    return last < begin


def say(line: str, log: str) -> None:
    """To standard error, and to the log that the command shows."""
    with contextlib.suppress(OSError):
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
    if log:
        with contextlib.suppress(OSError), open(log, "a", encoding="utf-8") as sink:
            sink.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
