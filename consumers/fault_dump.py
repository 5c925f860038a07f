"""What a step was made of when its loss was not finite: kept in the run directory, to be looked at.

Place in the flow: the trainer calls this on the rank whose loss was NaN or infinite, before the step is skipped on all
ranks. `faults/step-00000042-rank-00003/` then holds `batch.json` (keys, bucket, slots, weights, loss and sigma of each
sample, which inputs were not finite) and `batch.safetensors` (latents, text, text mask, and the objective's own
per-sample values). A dump is some MB per sample; a run keeps at most `MAX_DUMPS` of them, the first ones.
Where all losses were finite and the gradient was not, `faults/step-00000042-gradient.json` holds the batch's keys.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from consumers.batch import MicroBatch, RankBatch
from consumers.objectives.base import LossOutput
from qwenimg_dist.schema import condition_name

FOLDER: Final = "faults"
MAX_DUMPS: Final = 32


def dump_micro_batch(
    run_dir: Path,
    *,
    step: int,
    rank: int,
    index: int,
    batch: RankBatch,
    micro: MicroBatch,
    output: LossOutput,
    update: int | None = None,
) -> str:
    """Write the micro-batch, and say in a few words where it is and which samples are to blame.

    `update` is which one of a step's several it was, from 1: those before it were made. Never raises for a disk that is
    full or gone: the words say so then.
    """
    keys = [batch.keys[min(slot, len(batch.keys) - 1)] for slot in micro.slots.tolist()]
    record = {
        "step": step,
        **({} if update is None else {"update": update}),
        "rank": rank,
        "micro_batch": index,
        "bucket": str(micro.bucket),
        "resolution": batch.batch.resolution,
        "epoch": batch.batch.epoch,
        "loss": float(output.loss.detach()),
        "samples": _samples(keys, micro, output),
        "keys_of_the_global_batch": batch.keys,
    }
    guilty = [
        str(sample["key"])
        for sample in record["samples"]  # type: ignore[attr-defined]
        if sample["latents_not_finite"] or sample["text_not_finite"]
    ]
    blame = f"not finite in the data: {', '.join(guilty)}" if guilty else f"all inputs are finite ({', '.join(keys)})"
    folder = run_dir / FOLDER / f"step-{step:08d}-rank-{rank:05d}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if len(list(folder.parent.iterdir())) >= MAX_DUMPS:
            return f"{blame}; not dumped, {folder.parent} holds {MAX_DUMPS} dumps already"
        folder.mkdir(exist_ok=True)
        (folder / "batch.json").write_text(json.dumps(record, indent=1))
        save_file(_tensors(micro, output), folder / "batch.safetensors")
    except (OSError, SafetensorError) as error:  # the latter is what safetensors makes of a full disk
        return f"{blame}; the dump failed ({error})"
    return f"{blame}; dumped to {folder}"


def dump_keys(run_dir: Path, *, step: int, batch: RankBatch, update: int | None = None) -> str:
    """Write the global batch's keys where losses were finite and the gradient was not: no single sample can be blamed.

    Returns where they are. Never raises for a disk that is full or gone.
    """
    file = run_dir / FOLDER / f"step-{step:08d}-gradient.json"
    record: dict[str, Any] = {"step": step, **({} if update is None else {"update": update})}
    record |= {"bucket": str(batch.batch.bucket), "epoch": batch.batch.epoch, "keys": batch.keys}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if len(list(file.parent.iterdir())) >= MAX_DUMPS:
            return f"nowhere, {file.parent} holds {MAX_DUMPS} dumps already"
        file.write_text(json.dumps(record, indent=1))
    except OSError as error:
        return f"nowhere ({error})"
    return str(file)


def _samples(keys: list[str], micro: MicroBatch, output: LossOutput) -> list[dict[str, Any]]:
    values = {name: tensor.tolist() for name, tensor in output.per_sample.items() if tensor.dim() == 1}
    return [
        {
            "key": key,
            "slot": int(micro.slots[i]),
            "weight": float(micro.weights[i]),
            "latents_not_finite": sum(
                _count_not_finite(one[i])
                for one in (micro.latents, micro.rejected, *micro.conditions, *_rollout(micro).values())
                if one is not None
            ),
            "text_not_finite": _count_not_finite(micro.text[i]),
            **{name: value[i] for name, value in values.items()},
        }
        for i, key in enumerate(keys)
    ]


def _tensors(micro: MicroBatch, output: LossOutput) -> dict[str, torch.Tensor]:
    found = {"latents": micro.latents, "text": micro.text, "slots": micro.slots, "weights": micro.weights}
    if micro.text_mask is not None:
        found["text_mask"] = micro.text_mask
    if micro.rejected is not None:
        found["rejected"] = micro.rejected
    found |= {condition_name(index): one for index, one in enumerate(micro.conditions)} | _rollout(micro)
    found.update(output.per_sample)
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in found.items()}


def _rollout(micro: MicroBatch) -> dict[str, torch.Tensor]:
    """The latents that a rollout's step began and ended with."""
    one = micro.rollout
    return {} if one is None else {"rollout_x": one.x, "rollout_x_next": one.x_next}


def _count_not_finite(tensor: torch.Tensor) -> int:
    return int((~torch.isfinite(tensor)).sum())
