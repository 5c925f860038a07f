"""Checkpoints of a run: what is there, whether it is sound, and the way to a diffusers pipeline.

    qwenimg-dist ckpt list run.path=RUN                         with what each certificate says, and the lineage
    qwenimg-dist ckpt verify run.path=RUN                       every byte against the manifests
    qwenimg-dist ckpt export run.path=RUN export.path=OUT       a directory that stock diffusers loads
        [export.weights=ema|raw] [export.step=N] [export.dtype=bfloat16|float32]

The export streams tensor by tensor, so it needs memory for one tensor; the frozen components are taken over from the
pipeline that the run was trained from (hard links where the file system allows, else copies).
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from qwenimg_dist.commands.ckpt_list import checkpoint_table, lineage_of_run
from qwenimg_dist.commands.inputs import required, wanted_weights
from qwenimg_dist.compose import load_config
from qwenimg_dist.config import Config
from qwenimg_dist.config_of_run import config_of_run
from qwenimg_dist.models.pipeline import CERTIFICATE, PROVENANCE

if TYPE_CHECKING:
    from consumers.checkpoint_reader import CheckpointReader
    from qwenimg_dist.models.weights import TensorSource

SUMMARY: Final = "list, verify and export checkpoints"


def run(args: list[str]) -> int:
    """Dispatch on the verb. Raises ValueError for an unknown verb or unusable input."""
    verbs = {"list": list_run, "verify": verify_run, "export": export_run}
    if not args or args[0] not in verbs:
        raise ValueError(f"ckpt needs one of: {', '.join(verbs)} (then run.path=...)")
    return verbs[args[0]](load_config(args[1:]), args[1:])


def list_run(config: Config, args: list[str]) -> int:
    """Print each checkpoint: step, time, ranks, size, images, data, what it started from, difference from stock; and
    the chain of stages that the run came out of."""
    run_dir = Path(required(config.run.path, "run.path"))
    if not run_dir.is_dir():
        raise ValueError(f"run.path={run_dir} is not there")
    table = checkpoint_table(run_dir)
    print(table.text() if table.rows else f"no checkpoints in {run_dir}")
    for lineage in lineage_of_run(run_dir):
        print(f"\n{lineage.text()}")
    return 0


def verify_run(config: Config, args: list[str]) -> int:
    """Read every byte of every checkpoint. Exit code 1 if one is damaged."""
    from consumers.checkpoint_files import list_checkpoints
    from consumers.checkpoint_reader import verify_checkpoint

    run_dir = Path(required(config.run.path, "run.path"))
    found = list_checkpoints(run_dir)
    if not found:
        raise ValueError(f"no checkpoints in {run_dir}")
    faults = 0
    for info in found:
        problems = [info.fault] if info.fault else verify_checkpoint(info.path)
        faults += bool(problems)
        print(f"step {info.step}: {'; '.join(problems) if problems else 'sound'}")
    if faults:
        print(f"{faults} of {len(found)} damaged; `train` falls back to the newest sound one")
    return 1 if faults else 0


def export_run(config: Config, args: list[str]) -> int:
    """Write a pipeline directory. Nothing appears under `export.path` before it is whole and checked."""
    run_dir = Path(required(config.run.path, "run.path"))
    out = Path(required(config.export.path, "export.path"))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"export.path={out} exists and is not empty; remove it or choose another")
    from consumers.checkpoint_reader import open_checkpoint
    from qwenimg_dist.models.pipeline import pipeline_class, pipeline_dir

    # The model is the one that the run trained, whatever the defaults of this command line are.
    source = pipeline_dir(config_of_run(run_dir, args).model)
    which = wanted_weights(config, open_checkpoint(run_dir, config.export.step))  # said before all is hashed
    # Read twice, once for the hashes: what is exported leaves the reach of the manifest.
    reader = open_checkpoint(run_dir, config.export.step, verify=True)
    temporary = out.with_name(f".tmp-{out.name}-{uuid.uuid4().hex[:8]}")
    try:
        _write_pipeline(temporary, source, reader, which, config)
        if out.exists():
            out.rmdir()
        out.parent.mkdir(parents=True, exist_ok=True)
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"exported step {reader.step} ({config.export.weights} weights, {config.export.dtype}) to {out}")
    print(f'load it with {pipeline_class(out)}.from_pretrained("{out}")')
    return 0


def _write_pipeline(
    folder: Path, source: Path, reader: CheckpointReader, which: Literal["master", "ema"], config: Config
) -> None:
    import torch

    from qwenimg_dist.models.weights import SafetensorsDirectory, write_sharded

    dtype = getattr(torch, config.export.dtype)
    _take_over(source, folder, leave_out="transformer")
    transformer = folder / "transformer"
    transformer.mkdir()
    shutil.copy2(source / "transformer" / "config.json", transformer / "config.json")

    start = SafetensorsDirectory(source / "transformer")
    if set(start.names) != set(reader.names):
        missing, extra = set(start.names) - set(reader.names), set(reader.names) - set(start.names)
        raise ValueError(
            f"checkpoint {reader.path} is of another model than {source}: lacks {sorted(missing)[:3]}, "
            f"has besides {sorted(extra)[:3]}"
        )

    def tensor(name: str) -> TensorSource:
        if reader.shape(name) != start.shape(name):
            raise ValueError(f"{name} is {reader.shape(name)} in {reader.path}, {start.shape(name)} in {source}")
        return name, start.shape(name), dtype, lambda: reader.read(name, which).to(dtype)

    write_sharded(transformer, map(tensor, start.names), max_shard_bytes=config.export.max_shard_bytes)
    provenance = {"run": str(reader.path), "step": reader.step, "weights": config.export.weights, "from": str(source)}
    (folder / PROVENANCE).write_text(json.dumps(provenance, indent=1) + "\n")
    if (reader.path / CERTIFICATE).is_file():
        shutil.copy2(reader.path / CERTIFICATE, folder / CERTIFICATE)


def _take_over(source: Path, folder: Path, *, leave_out: str) -> None:
    """Hard-link weights, copy the rest: a user may edit a copied config without touching the source."""
    for file in sorted(source.rglob("*")):
        relative = file.relative_to(source)
        if not file.is_file() or relative.parts[0] == leave_out or relative.parts[0].startswith("."):
            continue
        if relative.name in (PROVENANCE, CERTIFICATE):  # of an earlier export, and not of this one
            continue
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        real = file.resolve()  # hub caches hold links into a blob store
        try:
            if file.suffix != ".safetensors":
                raise OSError("copied on purpose")
            os.link(real, target)
        except OSError:
            shutil.copy2(real, target)
