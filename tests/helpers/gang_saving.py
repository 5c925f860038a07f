"""Checks of saving and resuming on several ranks, see `gang_checks.py`."""

from __future__ import annotations

import os
import resource
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import torch
from gang_world import EMA_DECAY, FREEZE, GROUPS, World, engine_step, equal, snapshot

import consumers.checkpoint as checkpoint
import consumers.checkpoint_files as checkpoint_files
import consumers.watchdog_process as watchdog_process
from consumers.ema import Ema
from consumers.errors import TrainingError
from consumers.saver import Saver
from consumers.zero_engine import Engine
from qwenimg_dist.compose import load_config
from qwenimg_dist.debug import FAULT_DIR_VARIABLE
from qwenimg_dist.models.safetensors_directory import SafetensorsDirectory
from qwenimg_dist.patience import StorageAwayError


def check_frozen_save(world: World) -> dict[str, Any]:
    """Frozen weights stand in the checkpoint once, in bf16 too, and come back from it, not from the source."""
    run_dir = world.out / "frozen"
    settings = ["engine.precision=bf16", *GROUPS, *FREEZE]
    engine, _ = world.engine(*settings)
    ema = Ema(engine, EMA_DECAY)
    for step in range(3):
        engine_step(engine, ema, step, 1e-3)
    checkpoint.save_checkpoint(engine, ema, run_dir, step=3, state={}, keep=1)
    other, _ = world.engine(*settings)
    other_ema = Ema(other, EMA_DECAY)
    for share in other.frozen:
        other.frozen_values(share).add_(1)
    checkpoint.load_newest(other, other_ema, run_dir)
    same = equal(snapshot(engine, ema), snapshot(other, other_ema))
    frozen = all(
        torch.equal(engine.frozen_values(a), other.frozen_values(b)) for a, b in zip(engine.frozen, other.frozen)
    )
    after = [engine_step(one, average, 3, 1e-3) for one, average in ((engine, ema), (other, other_ema))]
    engine.close()
    other.close()
    return {"same": same and frozen, "same_later": after[0] == after[1], "num_frozen": len(engine.frozen)}


def check_save(world: World) -> dict[str, Any]:
    """Saved after 4 steps, loaded into another engine: bitwise the same, and so are the next steps."""
    run_dir = world.out / "run"
    run_dir.mkdir(exist_ok=True)
    engine, _ = world.engine()
    ema = Ema(engine, EMA_DECAY)
    fresh = checkpoint.load_newest(engine, ema, run_dir)
    for step in range(4):
        engine_step(engine, ema, step, 1e-3)
    checkpoint.save_checkpoint(engine, ema, run_dir, step=4, state={"note": "kept"}, keep=2)
    other, _ = world.engine()
    other_ema = Ema(other, EMA_DECAY)
    loaded = checkpoint.load_newest(other, other_ema, run_dir)
    same = equal(snapshot(engine, ema), snapshot(other, other_ema))
    after = [engine_step(engine, ema, step, 1e-3) for step in range(4, 10)]
    other_after = [engine_step(other, other_ema, step, 1e-3) for step in range(4, 10)]
    end = equal(snapshot(engine, ema), snapshot(other, other_ema))
    checkpoint.save_checkpoint(engine, ema, world.out / "end", step=10, state={}, keep=1)
    engine.close()
    other.close()
    return {
        "fresh": fresh is None,
        "step": loaded.step if loaded else None,
        "note": loaded.state["note"] if loaded else None,
        "same": same,
        "same_later": end and after == other_after,
        "losses": after,
    }


def check_damage(world: World) -> dict[str, Any]:
    """Newest valid wins, the others are named; none valid is an error; a rank that cannot write fails all."""
    run_dir = world.out / "damaged"
    ranks = world.ranks
    engine, _ = world.engine()
    for step in (1, 2, 3, 4):
        checkpoint.save_checkpoint(engine, None, run_dir, step=step, state={}, keep=4)
    if ranks.is_first:
        flip(rank_file_of(run_dir, 4), -1000)
        truncate(rank_file_of(run_dir, 3))
        (run_dir / "checkpoints" / "step-00000002" / "manifest.json").unlink()
    ranks.any(False)
    loaded = checkpoint.load_newest(engine, None, run_dir)
    found: dict[str, Any] = {"step": loaded.step if loaded else None, "skipped": loaded.skipped if loaded else None}

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if ranks.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # the kernel refuses byte 10,001 of a file
    found["write_error"] = save_refusal(engine, run_dir, step=5)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    faults = world.out / "away"
    if ranks.rank == 1:
        faults.mkdir()
        (faults / "checkpoint_write@next").write_text("raise ESTALE")
        os.environ[FAULT_DIR_VARIABLE] = str(faults)
    try:
        save_refusal(engine, run_dir, step=5)
    except StorageAwayError as error:
        found["away_error"] = ranks.gather_json(str(error))
    os.environ.pop(FAULT_DIR_VARIABLE, None)
    found["visible"] = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    found["read_errors"] = one_rank_cannot_read(world, engine, run_dir)

    if ranks.is_first:
        shutil.rmtree(run_dir / "checkpoints" / "step-00000001" / "state.json", ignore_errors=True)
        flip(run_dir / "checkpoints" / "step-00000001" / "state.json", 10)
    ranks.any(False)
    try:
        checkpoint.load_newest(engine, None, run_dir)
        found["none_valid"] = None
    except checkpoint.CheckpointError as error:
        found["none_valid"] = str(error)
    checkpoint.save_checkpoint(engine, None, run_dir, step=4, state={}, keep=1)  # over the invalid one
    found["kept"] = [[info.step, info.fault] for info in checkpoint.list_checkpoints(run_dir)]
    # Step 4 rots unseen by its size; a run that fell back to before it commits step 2, which must be what is kept.
    if ranks.is_first:
        flip(rank_file_of(run_dir, 4), -1000)
    checkpoint.save_checkpoint(engine, None, run_dir, step=2, state={}, keep=1)
    found["kept_of_new_line"] = [[info.step, info.fault] for info in checkpoint.list_checkpoints(run_dir)]
    engine.close()
    return found


def one_rank_cannot_read(world: World, engine: Engine, run_dir: Path) -> list[str]:
    """What this rank is told where rank 1 alone can read neither checkpoint nor weights: its mount is gone."""

    def unreadable(*_: object) -> Any:
        raise OSError("the mount is gone")

    told = []
    reader, source = checkpoint.CheckpointReader.read_range_into, SafetensorsDirectory.read_flat_range
    if world.ranks.rank == 1:
        checkpoint.CheckpointReader.read_range_into = unreadable  # type: ignore[method-assign, assignment]
        SafetensorsDirectory.read_flat_range = unreadable  # type: ignore[method-assign, assignment]
    for action in (lambda: checkpoint.load_newest(engine, None, run_dir), world.engine):
        try:
            action()
        except ValueError as error:
            told.append(str(error))
    checkpoint.CheckpointReader.read_range_into = reader  # type: ignore[method-assign]
    SafetensorsDirectory.read_flat_range = source  # type: ignore[method-assign]
    return told


def check_each_damage(world: World) -> dict[str, Any]:
    """Each kind of damage on each kind of file of the newest checkpoint: the one before is loaded, and why is said."""
    run_dir, ranks = world.out / "each", world.ranks
    engine, _ = world.engine()
    for step in (1, 2):
        checkpoint.save_checkpoint(engine, None, run_dir, step=step, state={}, keep=2)
    newest = run_dir / "checkpoints" / "step-00000002"
    sound = {file.name: file.read_bytes() for file in newest.iterdir()}
    found: dict[str, Any] = {}
    for name, data in sound.items():
        middle = len(data) // 2
        damages = {
            "missing": None,
            "empty": b"",
            "cut": data[:-9],
            "longer": data + b"\0",
            "flipped": data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :],
            "torn": data[:middle] + bytes(len(data) - middle),
        }
        for damage, damaged in damages.items():
            ranks.any(False)  # nobody still reads
            if ranks.is_first:
                (newest / name).unlink(missing_ok=True)
                if damaged is not None:
                    (newest / name).write_bytes(damaged)
            ranks.any(False)
            loaded = checkpoint.load_newest(engine, None, run_dir)
            assert loaded is not None
            found[f"{name} {damage}"] = [loaded.step, *loaded.skipped]
        ranks.any(False)
        if ranks.is_first:
            (newest / name).write_bytes(data)
    ranks.any(False)
    loaded = checkpoint.load_newest(engine, None, run_dir)
    found["restored"] = [loaded.step, *loaded.skipped] if loaded else None
    engine.close()
    return found


def check_full_disk(world: World) -> dict[str, Any]:
    """A real file system of the size of two and a half checkpoints (OUT/small, if the test could mount one)."""
    small, ranks = world.out / "small", world.ranks
    if not os.path.ismount(small):
        return {"mounted": None}
    run_dir, filler = small / "run", small / "filler"
    engine, _ = world.engine()
    before = snapshot(engine, None)
    found: dict[str, Any] = {"mounted": 1, "first": save_refusal(engine, run_dir, step=1)}
    faults = world.out / "faults"
    if ranks.is_first:
        faults.mkdir()
        (faults / "checkpoint_write@next").write_text(f"fill {filler}")
        torn = run_dir / "checkpoints" / ".tmp-step-00000002-of-the-dead"
        torn.mkdir()
        shutil.copy(rank_file_of(run_dir, 1), torn)
        shutil.copy(rank_file_of(run_dir, 1), torn / "another")  # leaves no room for a whole checkpoint
    os.environ[FAULT_DIR_VARIABLE] = str(faults)
    ranks.any(False)
    found["filled_while_writing"] = save_refusal(engine, run_dir, step=2)
    del os.environ[FAULT_DIR_VARIABLE]
    found["after_filling"] = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    found["full_before"] = save_refusal(engine, run_dir, step=2)
    found["unchanged"] = equal(before, snapshot(engine, None))
    loaded = checkpoint.load_newest(engine, None, run_dir)
    found["loaded"] = [loaded.step, *loaded.skipped] if loaded else None
    if ranks.is_first:
        filler.unlink()
    ranks.any(False)
    found["room_again"] = save_refusal(engine, run_dir, step=3, keep=1)
    # And while training goes on: one rank's thread fills the disk.
    if ranks.is_first:
        (faults / "checkpoint_write@next").write_text(f"fill {filler}")
    os.environ[FAULT_DIR_VARIABLE] = str(faults)
    ranks.any(False)
    saver = Saver(engine, None, run_dir, BACKGROUND)
    found["filled_in_background"] = background_refusal(saver, step=4)
    del os.environ[FAULT_DIR_VARIABLE]
    saver.close()
    found["left"] = [[info.step, info.fault] for info in checkpoint.list_checkpoints(run_dir)]
    engine.close()
    return found


def check_background(world: World) -> dict[str, Any]:
    """A save beside training is of the step at which it began, and nothing before all ranks have written."""
    run_dir, ranks = world.out / "background", world.ranks
    engine, _ = world.engine(*FREEZE)
    ema = Ema(engine, EMA_DECAY)
    saver = Saver(engine, ema, run_dir, BACKGROUND)
    numel = sum(3 * (share.stop - share.start) for share in engine.shares)
    numel += sum(share.stop - share.start for share in (*engine.shares, *engine.frozen))
    found: dict[str, Any] = {"copy": saver.copy_bytes == 4 * numel}
    engine_step(engine, ema, 0, 1e-3)
    before, gate = snapshot(engine, ema), threading.Event()
    in_the_middle = checkpoint_files.fault_point  # type: ignore[attr-defined]
    checkpoint_files.fault_point = lambda _: bool(gate.wait())  # type: ignore[attr-defined, assignment]
    begin_background(saver, step=1)
    after = [engine_step(engine, ema, step, 1e-3) for step in (1, 2, 3)]
    found["writing"] = ranks.max(saver.flags()) == [0.0, 1.0]
    found["nothing_yet"] = checkpoint.list_checkpoints(run_dir) == []
    gate.set()
    found["finished"] = [saver.finish(), saver.under_way]

    other, _ = world.engine(*FREEZE)
    other_ema = Ema(other, EMA_DECAY)
    loaded = checkpoint.load_newest(other, other_ema, run_dir)
    assert loaded is not None
    found["note"] = [loaded.step, loaded.state["note"], loaded.state["optimizer_steps"]]
    found["same"] = equal(before, snapshot(other, other_ema))
    found["same_later"] = after == [engine_step(other, other_ema, step, 1e-3) for step in (1, 2, 3)]
    found["same_later"] &= equal(snapshot(engine, ema), snapshot(other, other_ema))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    gate.clear()
    if ranks.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        checkpoint_files.fault_point = in_the_middle  # type: ignore[attr-defined]
    found["one_failed"] = background_refusal(saver, step=4, gate=gate)  # rank 0 is still in the middle of it
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    found["visible"] = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    checkpoint_files.fault_point = lambda _: gate.wait(1)  # type: ignore[attr-defined, assignment]
    gate.clear()
    begin_background(saver, step=5)
    saver.close()  # as when the run ends by an error: nobody agrees on anything any more
    found["given_up"] = sorted(path.name.rpartition("-")[0] for path in (run_dir / "checkpoints").iterdir())
    checkpoint_files.fault_point = in_the_middle  # type: ignore[attr-defined]

    saver = Saver(engine, ema, run_dir, BACKGROUND)
    for step, wait in ((6, False), (7, True), (8, False)):
        begin_background(saver, step=step, wait=wait)
        saver.finish()
    saver.close()
    found["kept"] = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    meminfo = watchdog_process._MEMINFO
    if ranks.rank == 1:
        watchdog_process._MEMINFO = world.out / "meminfo"
        (world.out / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable: 1 kB\n")
    try:
        Saver(engine, ema, run_dir, BACKGROUND)
    except ValueError as error:
        found["no_memory"] = str(error)
    watchdog_process._MEMINFO = meminfo
    engine.close()
    other.close()
    return found


BACKGROUND = load_config(["checkpoint.background=true", "checkpoint.keep=2"]).checkpoint


def begin_background(saver: Saver, *, step: int, wait: bool = False) -> None:
    saver.begin(step=step, state={"note": "then"}, certificate=dict, wait=wait)


def background_refusal(saver: Saver, *, step: int, gate: threading.Event | None = None) -> str | None:
    """What a save beside training refuses with, asked as the trainer does."""
    ranks = saver._engine.ranks
    begin_background(saver, step=step)
    while True:
        failed, writing = ranks.max(saver.flags())
        if failed or not writing:
            break
        time.sleep(0.01)
    if gate:
        gate.set()
    try:
        saver.finish(failed=bool(failed))
    except TrainingError as error:
        return str(error)
    return None


def check_retention(world: World) -> dict[str, Any]:
    """The last two and every third; loaded groups are those of the names, with their own weight decay."""
    run_dir = world.out / "retained"
    engine, _ = world.engine()
    for step in range(1, 9):
        checkpoint.save_checkpoint(engine, None, run_dir, step=step, state={}, keep=2, keep_every=3)
    kept = [info.step for info in checkpoint.list_checkpoints(run_dir)]
    checkpoint.load_newest(engine, None, run_dir)
    number, groups_of_adam = engine._zero.sub_group_to_group_id, engine._adam.param_groups
    decays = {share.name: groups_of_adam[number[share.sub_group]]["weight_decay"] for share in engine.shares}
    groups = {share.name: share.group for share in engine.shares}
    engine.close()
    return {"kept": kept, "decays": decays, "groups": groups}


def check_continue(world: World) -> dict[str, Any]:
    """Go on from the newest checkpoint of OUT/other for three steps and save: for gangs of another size."""
    run_dir = world.out / "other"
    engine, _ = world.engine()
    ema = Ema(engine, EMA_DECAY)
    loaded = checkpoint.load_newest(engine, ema, run_dir)
    assert loaded is not None
    losses = [engine_step(engine, ema, step, 1e-3) for step in range(loaded.step, loaded.step + 3)]
    checkpoint.save_checkpoint(engine, ema, run_dir, step=loaded.step + 3, state={}, keep=9)
    engine.close()
    return {"from": loaded.step, "losses": losses}


def save_refusal(engine: Engine, run_dir: Path, *, step: int, keep: int = 4, keep_every: int = 0) -> str | None:
    """What a save refuses with; None if it did not."""
    try:
        checkpoint.save_checkpoint(engine, None, run_dir, step=step, state={}, keep=keep, keep_every=keep_every)
    except TrainingError as error:
        return str(error)
    return None


def rank_file_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}" / "rank-00001-of-00002.safetensors"


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-17])
