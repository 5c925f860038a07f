"""What is kept of a step that was not finite, and that neither its number nor a full disk can hurt the run."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from consumers.batch import MicroBatch, RankBatch
from consumers.fault_dump import MAX_DUMPS, dump_keys, dump_micro_batch
from consumers.objectives.base import LossOutput
from qwenimg_dist.data.ledger import GlobalBatch
from qwenimg_dist.schema import Bucket

BUCKET = Bucket(height=64, width=64)


def batch() -> tuple[RankBatch, MicroBatch, LossOutput]:
    """The second rank's cut of three samples: the last one, and its repetition; its text is broken."""
    text = torch.zeros(2, 5, 8, dtype=torch.bfloat16)
    text[:, 3] = float("inf")
    micro = MicroBatch(
        latents=torch.randn(2, 16, 8, 8),
        logvar=None,
        text=text,
        text_mask=None,
        weights=torch.tensor([1.0, 0.0]),
        slots=torch.tensor([2, 3]),
        num_slots=3,
        bucket=BUCKET,
    )
    rows = np.arange(3)
    whole = GlobalBatch(
        step=6, phase=0, resolution=64, bucket=BUCKET, epoch=1, rows=rows, texts=rows, weights=np.ones(3, np.float32)
    )
    cut = RankBatch(
        batch=whole,
        micro_batches=[micro],
        keys=["a", "b", "c"],
        num_real=3,
        wait_s=0.0,
        read_s=0.0,
        read_bytes=0,
        image_tokens=32,
        text_tokens=10,
        padding=0.0,
    )
    errors = torch.tensor([float("nan"), 1.0])
    output = LossOutput(loss=errors.sum(), per_sample={"sigma": torch.tensor([0.25, 0.5]), "error": errors})
    return cut, micro, output


def dump(run_dir: Path, step: int) -> str:
    cut, micro, output = batch()
    return dump_micro_batch(run_dir, step=step, rank=1, index=0, batch=cut, micro=micro, output=output)


def test_the_dump_names_the_guilty_and_holds_all_tensors(tmp_path: Path) -> None:
    said = dump(tmp_path, 7)
    folder = tmp_path / "faults" / "step-00000007-rank-00001"
    assert said == f"not finite in the data: c, c; dumped to {folder}"
    record = json.loads((folder / "batch.json").read_text())
    assert record["keys_of_the_global_batch"] == ["a", "b", "c"]
    first, second = record["samples"]
    assert (first["key"], first["slot"], first["weight"], first["text_not_finite"]) == ("c", 2, 1.0, 8)
    assert (first["sigma"], first["latents_not_finite"]) == (0.25, 0)
    assert (second["key"], second["slot"], second["weight"], second["error"]) == ("c", 3, 0.0, 1.0)
    tensors = load_file(folder / "batch.safetensors")
    assert tensors["text"].dtype == torch.bfloat16
    assert tensors["latents"].shape == (2, 16, 8, 8)
    assert tensors["sigma"].tolist() == [0.25, 0.5]


def test_dumps_are_bounded_in_number(tmp_path: Path) -> None:
    for step in range(MAX_DUMPS):
        assert "dumped to" in dump(tmp_path, step)
    assert "not dumped" in dump(tmp_path, MAX_DUMPS)
    assert dump_keys(tmp_path, step=99, batch=batch()[0]).startswith("nowhere")
    assert len(list((tmp_path / "faults").iterdir())) == MAX_DUMPS


def test_keys_alone_where_the_gradient_was_not_finite(tmp_path: Path) -> None:
    file = Path(dump_keys(tmp_path, step=7, batch=batch()[0]))
    assert json.loads(file.read_text())["keys"] == ["a", "b", "c"]


def test_a_dump_that_fails_is_said_and_not_raised(tmp_path: Path) -> None:
    (tmp_path / "faults").write_text("a file where the folder should be")
    assert "the dump failed" in dump(tmp_path, 7)
    assert "nowhere" in dump_keys(tmp_path, step=7, batch=batch()[0])


def test_a_disk_that_is_full_within_the_tensors_is_said_and_not_raised(tmp_path: Path) -> None:
    """safetensors raises an error of its own then, and a rank that raised alone would leave the others waiting."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))  # the JSON has room, the tensors have not
    try:
        said = dump(tmp_path, 7)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "the dump failed" in said
    assert (tmp_path / "faults" / "step-00000007-rank-00001" / "batch.json").is_file()
