"""Shared storage: what one node writes every node reads, a rename is atomic, there is room, and it is fast enough.

Looked at where `run.path`, `data.path`, the paths of `data.mix` and `objective.reference_path` are or will be. A nonce
is written by the first node and read on each (network file systems may show it late: the delay is told), after each has
asked for its name while it was not there, as producers do: NFS remembers that for up to a minute. Each node then
replaces a file of its own by rename, and tries a lock that the first one holds (`locks.py`). Everything is removed
again. Of a bucket every node lists a name; paths that are only read are looked for (`inputs.py`). Without any path
there is nothing to look at.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from qwenimg_dist.commands.doctor import locks
from qwenimg_dist.commands.doctor.findings import Context, Finding, failure, ok, warning
from qwenimg_dist.commands.doctor.inputs import check_inputs, source_paths
from qwenimg_dist.config import Config, DpoConfig
from qwenimg_dist.storage import Patience, Storage

_PREFIX: Final = ".qwenimg-dist-doctor-"
_VISIBLE_S: Final = 65.0
"""An NFS client asks a directory anew after 60 s at the latest, by default."""
_LATE_S: Final = 2.0
_SLOW_MB_S: Final = 200.0
_BRIEF: Final = Patience(attempts=7)
"""A cause that is told beats a doctor who waits."""
_MOUNT: Final = "mount the same file system at the same path on every node"


def check(context: Context) -> Sequence[Finding]:
    found: list[Finding] = []
    places = paths(context.config)
    for key, path in places.items():
        found += _check_path(context, key, path)
    remote = urls(context.config)
    for key, url in remote.items():
        found += _check_url(context, key, url)
    found += check_inputs(context)
    if not places and not remote:
        found.append(warning("storage", "neither run.path nor data.path is given", "add them, and they are tried"))
    return found


def paths(config: Config) -> dict[str, str]:
    """Config key -> directory."""
    given = {"run.path": config.run.path, "data.path": config.data.path}
    given |= {f"data.mix.{name}.path": one.path for name, one in config.data.mix.items()}
    if isinstance(config.objective, DpoConfig):
        given["objective.reference_path"] = config.objective.reference_path
    return {key: str(Path(path).absolute()) for key, path in given.items() if path and "://" not in path}


def urls(config: Config) -> dict[str, str]:
    """Config key -> URL of what lies in a bucket."""
    given = {
        "data.path": config.data.path,
        **{f"source.path {path}": path for path in source_paths(config)},
        "checkpoint.remote": config.checkpoint.remote,
        "evaluate.data_path": config.evaluate.data_path,
        **{f"data.mix.{name}.path": one.path for name, one in config.data.mix.items()},
    }
    return {key: path for key, path in given.items() if path and "://" in path}


def _check_url(context: Context, key: str, url: str) -> list[Finding]:
    name = f"{key}={url}"
    asked = context.nodes.ask(reach, url, timeout_s=context.timeout_s)
    fix = "look at the URL, the keys (AWS_*, or the machine's role), and that the extra `s3` is installed"
    found = [failure(f"{name} on {node}", told, fix) for node, told in asked.faults.items()]
    refused = {node: told for node, told in asked.values.items() if told}
    found += [failure(f"{name} on {node}", told, fix) for node, told in refused.items()]
    return found or [ok(name, f"can be listed on all {len(asked.values)} nodes; writing was not tried")]


def reach(url: str) -> str:
    """Why a folder of a bucket cannot be listed from here; empty if it can."""
    try:
        Storage(url, patience=_BRIEF).list(prefix=f"{_PREFIX}nothing")
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def _check_path(context: Context, key: str, path: str) -> list[Finding]:
    nonce = secrets.token_hex(16)
    head, limit = context.nodes.head, context.timeout_s
    name = f"{key}={path}"
    context.nodes.ask(look, path, nonce, timeout_s=limit)
    written = context.nodes.ask_one(head, write, path, nonce, context.config.doctor.speed_mb, timeout_s=limit)
    if written.faults:
        fix = "check that it is mounted, writable and not full"
        return [failure(f"{name} on {node}", told, fix) for node, told in written.faults.items()]
    made = written.values[head.name]
    found = judge_written(name, made, needed=needed_bytes(context.config) if key == "run.path" else None)
    try:
        seen = context.nodes.ask(read, made["file"], nonce, timeout_s=limit + _VISIBLE_S)
        found += [failure(f"{name} on {node}", told, _MOUNT) for node, told in seen.faults.items()]
        for node, there in seen.values.items():
            found += judge_read(f"{name} on {node}", there)
        if all(there["problem"] == "" for there in seen.values.values()) and not seen.faults:
            late = max(there["delay_s"] for there in seen.values.values())
            told = (
                f"written on {head.name}, read and renamed on all {len(seen.values)} nodes, at most {late:.1f} s late"
            )
            found.append(ok(name, told))
            found += locks.check(context, name, made["folder"])
    finally:
        context.nodes.ask_one(head, remove, made["file"], timeout_s=limit)
    return found


def look(path: str, nonce: str) -> bool:
    """Whether the nonce's file is there already: asked before it is written, so that a client that remembers the answer
    for a while shows it."""
    return _file(path, nonce).exists()


def _file(path: str, nonce: str) -> Path:
    """In the nearest existing folder."""
    folder = next(one for one in (Path(path), *Path(path).parents) if one.is_dir())
    return folder / f"{_PREFIX}{nonce[:8]}"


def write(path: str, nonce: str, speed_mb: int) -> dict[str, Any]:
    """Write the nonce; measure how fast `speed_mb` are written and fsynced."""
    file = _file(path, nonce)
    folder = file.parent
    free = shutil.disk_usage(folder).free
    block, seconds = os.urandom(1 << 20), 0.0
    try:
        begin = time.perf_counter()
        with open(file, "wb") as sink:
            for _ in range(min(speed_mb, free // (1 << 20) // 2)):
                sink.write(block)
            sink.flush()
            os.fsync(sink.fileno())
        seconds = time.perf_counter() - begin
        size = file.stat().st_size
        file.write_text(nonce)
        with open(file, "rb") as source:
            os.fsync(source.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            file.unlink()
        raise
    return {"file": str(file), "folder": str(folder), "free": free, "mb_s": size / 1e6 / max(seconds, 1e-6)}


def read(file: str, nonce: str) -> dict[str, Any]:
    """Wait for the nonce, then replace a file of this node's own by rename, as commits do."""
    begin, problem = time.monotonic(), "the nonce is not there"
    while time.monotonic() - begin < _VISIBLE_S:
        try:
            problem = "" if Path(file).read_text() == nonce else "the nonce is another one"
        except OSError as error:
            problem = f"the nonce cannot be read: {error.strerror}"
        if not problem:
            break
        time.sleep(0.1)
    delay = time.monotonic() - begin
    return {"problem": problem or _rename_problem(Path(file).parent), "delay_s": delay}


def _rename_problem(folder: Path) -> str:
    """Empty, or why a file cannot be replaced by rename here."""
    own = secrets.token_hex(8)
    target, fresh = folder / f"{_PREFIX}{own}", folder / f"{_PREFIX}{own}.new"
    try:
        target.write_text("old")
        fresh.write_text(own)
        os.replace(fresh, target)
        if target.read_text() != own or fresh.exists():
            return "a rename did not replace the file at once"
    except OSError as error:
        return f"a rename failed: {error.strerror}"
    finally:
        for left in (target, fresh):
            with contextlib.suppress(OSError):
                left.unlink()
    return ""


def remove(file: str) -> None:
    with contextlib.suppress(OSError):
        Path(file).unlink()


def needed_bytes(config: Config) -> tuple[float, float] | None:
    """One checkpoint, and all that are kept; None where the model tells nothing."""
    from consumers.planning.disk import disk
    from consumers.planning.facts import data_facts, model_facts

    try:
        model = model_facts(config)
        without = config.model_copy(update={"data": config.data.model_copy(update={"path": None, "mix": {}})})
        planned = disk(config, model, data_facts(without, world_size=config.cluster.ranks))
    except ValueError:
        return None
    return planned.checkpoint, planned.checkpoints


def judge_written(name: str, made: dict[str, Any], *, needed: tuple[float, float] | None) -> list[Finding]:
    """Room and speed."""
    found = []
    free, shown = made["free"], f"{made['free'] / 1e9:,.1f} GB free"
    if needed is not None and free < needed[0]:
        told = f"{shown}, one checkpoint takes {needed[0] / 1e9:,.1f} GB"
        found.append(failure(f"{name}: room", told, "make room, or take another run.path"))
    elif needed is not None and free < needed[1]:
        told = f"{shown}, the checkpoints that are kept take {needed[1] / 1e9:,.1f} GB"
        found.append(warning(f"{name}: room", told, "make room, or lower checkpoint.keep or checkpoint.keep_every"))
    else:
        found.append(ok(f"{name}: room", shown))
    if made["mb_s"] < _SLOW_MB_S:
        told = f"{made['mb_s']:,.0f} MB/s written and synced by one process"
        fix = "a faster file system: training waits while a checkpoint is written"
        found.append(warning(f"{name}: speed", told, fix))
    else:
        found.append(ok(f"{name}: speed", f"{made['mb_s']:,.0f} MB/s written and synced by one process"))
    return found


def judge_read(name: str, there: dict[str, Any]) -> list[Finding]:
    """What a node saw of the nonce; nothing where all is well."""
    if there["problem"]:
        return [failure(name, there["problem"], _MOUNT)]
    if there["delay_s"] > _LATE_S:
        told = f"a file that another node wrote was seen {there['delay_s']:.1f} s later"
        return [warning(name, told, "mount it with lookupcache=positive, or shorter attribute caching (NFS: actimeo)")]
    return []
