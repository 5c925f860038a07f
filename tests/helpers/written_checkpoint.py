"""Checkpoints without a training run, as any number of ranks would have written them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from consumers.checkpoint_files import (
    Piece,
    checkpoints_dir,
    rank_file,
    step_name,
    write_certificate,
    write_manifest,
    write_rank_file,
    write_state,
)
from qwenimg_dist.models.safetensors_directory import SafetensorsDirectory


def write_checkpoint(
    root: Path,
    run: str,
    step: int,
    *,
    ranks: int = 3,
    ema: bool = True,
    lineage: Mapping[str, Any] | None = None,
    scale: float = 1.0,
) -> Path:
    """A checkpoint of `root/pipeline` as `ranks` ranks write it: masters are the weights + step, averages - step, both
    changes times `scale`."""
    source = SafetensorsDirectory(root / "pipeline" / "transformer")
    folder = checkpoints_dir(root / run) / step_name(step)
    folder.mkdir(parents=True)
    records = []
    for rank in range(ranks):
        pieces = []
        for name in source.names:
            flat = source.read(name).float().flatten()
            size = -(-len(flat) // ranks)
            start, stop = min(rank * size, len(flat)), min((rank + 1) * size, len(flat))
            for which, change in (("master", step), ("ema", -step))[: 1 + ema]:
                if stop > start:
                    values = flat[start:stop] + scale * change
                    pieces.append(Piece(which=which, name=name, start=start, stop=stop, values=values))  # type: ignore[arg-type]
        records.append(write_rank_file(folder / rank_file(rank, ranks), pieces))
    shapes = {name: {"shape": list(source.shape(name)), "group": "decay"} for name in source.names}
    records.append(write_state(folder, {"step": step, "parameters": shapes}))
    known = {"model": "small", "fingerprint": "0" * 12} if lineage is None else lineage
    certificate = {"data": {"fingerprint": "da7a"}, "lineage": known, "run": {"path": str(root / run)}}
    records.append(write_certificate(folder, certificate))
    write_manifest(folder, step, ranks, records)
    return folder


def write_bare_checkpoint(run_dir: Path, step: int, state: Mapping[str, Any]) -> Path:
    """A valid checkpoint of one rank that holds no weights."""
    folder = checkpoints_dir(run_dir) / step_name(step)
    folder.mkdir(parents=True)
    write_manifest(folder, step, 1, [write_rank_file(folder / rank_file(0, 1), []), write_state(folder, dict(state))])
    return folder
