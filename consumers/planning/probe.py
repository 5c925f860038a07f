"""A few real steps on the ranks that are here, in the place of an assumed rate.

Place in the flow: the command `plan` starts ranks with `plan.probe=true` and runs `probe` on each. The engine is the
one that trains, with random weights (time and memory do not depend on them), random latents and texts of the mean
length. Refuses to read data or weights. Not in it: a reference that is a second model, the EMA's update.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from consumers.engine import build_engine, start_distributed, stop_distributed
from consumers.planning.facts import DataFacts, ModelFacts
from consumers.planning.timing import Measured, num_micro_batches, sample_flops
from consumers.ranks import Ranks
from consumers.throughput import peak_host_bytes
from consumers.zero_engine import Engine
from qwenimg_dist.compose import validate
from qwenimg_dist.config import Config


@dataclass(frozen=True, kw_only=True)
class Case:
    """One micro-batch to time."""

    phase: int
    resolution: int
    height: int
    width: int
    pictures: int
    """In the micro-batch, both of a pair."""
    text_tokens: int
    activation_checkpointing: bool
    flops: float
    """Of what is timed: one forward and its backward."""


def cases_of(config: Config, model: ModelFacts, data: DataFacts, *, world_size: int) -> list[Case]:
    """One per phase and resolution that has steps: the bucket with most steps, texts of the mean length."""
    found = []
    for stream in data.streams:
        if not any(stream.steps.values()):
            continue
        bucket = max(stream.steps, key=lambda one: stream.steps[one])
        text = max(1, round(data.mean_text))
        per_rank = -(-stream.phase.global_batch * data.rows_per_sample // world_size)
        samples = -(-per_rank // num_micro_batches(data, stream, bucket, text, per_rank))
        found.append(
            Case(
                phase=stream.phase.index,
                resolution=stream.resolution,
                height=bucket.height,
                width=bucket.width,
                pictures=samples * data.pictures,
                text_tokens=text,
                activation_checkpointing=stream.phase.activation_checkpointing,
                flops=samples * data.pictures * sample_flops(config, model, data, stream, bucket, text, step=False),
            )
        )
    return found


def probe(job: Mapping[str, Any]) -> list[dict[str, Any]]:
    """On every rank, in torchrun's environment: `config`, `architecture`, `cases` -> what each case took.
    Collective."""
    config = validate(job["config"])
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_rank)))
    ranks = start_distributed(config.cluster.device)
    try:
        engine = build_engine(job["architecture"], config, ranks, None)
        width = int(job["architecture"]["joint_attention_dim"])
        try:
            return [_measure(engine, ranks, Case(**case), width, config.plan.probe_steps) for case in job["cases"]]
        finally:
            engine.close()
    finally:
        stop_distributed()


def job_of(config: Config, model: ModelFacts, cases: Sequence[Case]) -> dict[str, Any]:
    """What `probe` takes, as plain values."""
    return {
        "config": config.model_dump(mode="json"),
        "architecture": dict(model.architecture),
        "cases": [asdict(case) for case in cases],
    }


def measured(answers: Sequence[Mapping[str, Any]]) -> dict[tuple[int, int], Measured]:
    """One rank's answer, which is every rank's."""
    return {
        (one["phase"], one["resolution"]): Measured(
            micro_batch_s=one["micro_batch_s"],
            flops=one["flops"],
            update_s=one["update_s"],
            peak_bytes=one["peak_bytes"],
        )
        for one in answers
    }


def _measure(engine: Engine, ranks: Ranks, case: Case, width: int, repeats: int) -> dict[str, Any]:
    engine.checkpoint_activations(case.activation_checkpointing)
    device = ranks.device
    noisy = torch.randn(case.pictures, 16, case.height // 8, case.width // 8, device=device)
    sigma = torch.full((case.pictures,), 0.5, device=device)
    text = torch.randn(case.pictures, case.text_tokens, width, device=device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)

    def clock() -> float:
        if on_gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    times = []
    for number in range(-1, repeats):
        begin = clock()
        loss = engine.predict(noisy, sigma, text, None).square().mean()
        engine.backward(loss, last=number + 1 == repeats)
        if number >= 0:
            times.append(clock() - begin)
    begin = clock()
    engine.step(0.0)
    update = clock() - begin
    peak = float(torch.cuda.max_memory_allocated(device)) if on_gpu else float(peak_host_bytes())
    micro_batch_s, update_s, peak_bytes = ranks.max([statistics.median(times), update, peak])
    return {
        "phase": case.phase,
        "resolution": case.resolution,
        "flops": case.flops,
        "micro_batch_s": micro_batch_s,
        "update_s": update_s,
        "peak_bytes": peak_bytes,
    }
