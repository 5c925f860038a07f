"""Seconds per step of every phase and resolution, hours of the run, and what more GPUs would give.

Place in the flow: `plan.py` asks here. The computation is the formula's FLOPs (`models.transformer.forward_flops`: 3 x
a forward, 4 x with recomputation) at an assumed share of the peak, or what a probe measured on ranks; the network is
`traffic.py`'s. With `gather=block` on GPUs the next block is fetched while one computes, so the longer of both counts;
else they add up. All of it is a model and labelled so: it knows no slow rank, no congestion, no waiting for data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from consumers.planning.facts import DataFacts, ModelFacts, StreamFacts
from consumers.planning.passes import passes_of
from consumers.planning.traffic import Traffic, inter_node_bytes, seconds, traffic
from consumers.stream import micro_batch_sizes
from qwenimg_dist.config import Config
from qwenimg_dist.metrics import PEAK_FLOPS
from qwenimg_dist.models.transformer import forward_flops
from qwenimg_dist.schema import Bucket

MFU_EAGER: Final = 0.25
MFU_COMPILED: Final = 0.4
"""Of the data sheet's peak, forward and backward without recomputation: what an H200 gave (`tests/bench/gpu.py`)."""
_ASSUMED_GPU: Final = "H100"
_PCIE_BYTES_S: Final = 25e9
_UPDATE_BYTES: Final = 28
"""That AdamW on the host moves per parameter: masters and moments both ways, gradients."""
_CORE_BYTES_S: Final = 8e9
_HOST_BYTES_S: Final = 40e9
"""Of offloaded states: one direction of PCIe, memory per core and per rank; assumptions."""
SCALES: Final = (8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a probe found for one phase and resolution."""

    micro_batch_s: float
    """Forward and backward of one, collectives included; the slowest rank's median."""
    flops: float
    """Computed ones of it, by the formula."""
    update_s: float
    peak_bytes: float
    """On the rank with the highest; 0 where unknown."""


Probe = Mapping[tuple[int, int], Measured]
"""(phase, resolution) -> what was measured."""


@dataclass(frozen=True, kw_only=True)
class StreamTime:
    """One phase at one resolution."""

    stream: StreamFacts
    micro_batches: float
    """Per rank and step, mean over the buckets."""
    compute_s: float | None
    """Per step; None where nothing tells the device's rate."""
    network_s: float
    offload_s: float
    step_s: float | None
    carried: Traffic
    """Of a step with as many micro-batches, rounded up."""
    inter_node: float
    """Bytes of a step through one GPU's adapter."""

    @property
    def num_steps(self) -> float:
        return sum(self.stream.steps.values())

    @property
    def hours(self) -> float | None:
        return None if self.step_s is None else self.num_steps * self.step_s / 3600

    @property
    def images_per_s(self) -> float | None:
        if not self.step_s or not self.num_steps:
            return None
        return self.stream.images / self.num_steps / self.step_s

    @property
    def bound(self) -> str:
        """What the step waits for."""
        if self.compute_s is None:
            return "unknown"
        return "network" if self.network_s > self.compute_s else "compute"


@dataclass(frozen=True, kw_only=True)
class ScalePoint:
    """A number of GPUs, by the model."""

    num_ranks: int
    weak: Mapping[str, float]
    """Phase -> share of the pure computation's rate, each rank's part of the batch as on the planned ranks."""
    fixed: Mapping[str, float]
    """The same with the phase's own global batch."""
    network_bound: tuple[str, ...]
    """Phases (weak) in which the network takes longer than the computation."""
    memory_bytes: float
    """One rank's peak."""


def peak_rate(config: Config) -> tuple[float | None, str]:
    """FLOP/s of one rank that useful work reaches, and how that was found."""
    mfu = config.plan.mfu or (MFU_COMPILED if config.engine.compile else MFU_EAGER)
    if config.cluster.peak_tflops:
        return mfu * config.cluster.peak_tflops * 1e12, f"{mfu:g} of cluster.peak_tflops={config.cluster.peak_tflops:g}"
    if config.cluster.device == "cpu":
        return None, "unknown: set cluster.peak_tflops, or plan.probe=true"
    peak = PEAK_FLOPS[_ASSUMED_GPU]
    return mfu * peak, f"{mfu:g} of an {_ASSUMED_GPU}'s {peak / 1e12:g} TFLOP/s (cluster.peak_tflops is not set)"


def time_of(
    config: Config,
    model: ModelFacts,
    data: DataFacts,
    stream: StreamFacts,
    *,
    world_size: int,
    per_rank: int | None = None,
    probe: Probe | None = None,
) -> StreamTime:
    """`per_rank` rows of each rank in the place of the phase's own share."""
    phase = stream.phase
    rate, _ = peak_rate(config)
    rows = phase.global_batch * data.rows_per_sample
    samples = per_rank if per_rank is not None else -(-rows // world_size)
    measured = (probe or {}).get((phase.index, stream.resolution))
    text = max(1, round(data.mean_text))
    total_steps = sum(stream.steps.values()) or 1.0
    micro_batches = flops = 0.0
    for bucket, steps in stream.steps.items():
        share = (steps or (1.0 if not any(stream.steps.values()) else 0.0)) / total_steps
        micro_batches += share * num_micro_batches(data, stream, bucket, text, samples)
        flops += share * samples * data.pictures * sample_flops(config, model, data, stream, bucket, text)
    whole = max(1, round(micro_batches))
    carried = traffic(config, model, micro_batches=whole, activation_checkpointing=phase.activation_checkpointing)
    hpz, cluster = config.engine.hpz_partition, config.cluster
    network = seconds(carried, cluster, world_size=world_size, hpz=hpz, efficiency=config.plan.network_efficiency)
    offload = _offload_s(config, model, world_size, whole)
    if measured is not None:  # the collectives of the ranks that were here are in it
        compute: float | None = measured.micro_batch_s * flops / measured.flops
        step: float | None = (compute or 0.0) + measured.update_s
    else:
        compute = None if rate is None else flops / rate
        overlapped = cluster.device == "cuda" and config.engine.gather == "block"
        step = None
        if compute is not None:
            step = offload + (max(compute, network) if overlapped else compute + network)
    return StreamTime(
        stream=stream,
        micro_batches=micro_batches,
        compute_s=compute,
        network_s=network,
        offload_s=offload,
        step_s=step,
        carried=carried,
        inter_node=inter_node_bytes(carried, cluster, world_size=world_size, hpz=hpz),
    )


def num_micro_batches(data: DataFacts, stream: StreamFacts, bucket: Bucket, text: int, per_rank: int) -> int:
    """Of one rank and step, with texts of this length."""
    budget, tokens = stream.phase.micro_batch_tokens, data.image_tokens(bucket)
    return len(micro_batch_sizes(per_rank, tokens, text, budget, pictures=data.pictures))


def sample_flops(
    config: Config,
    model: ModelFacts,
    data: DataFacts,
    stream: StreamFacts,
    bucket: Bucket,
    text: int,
    *,
    step: bool = True,
) -> float:
    """Computed for one picture in a step: forwards, backwards by what trains, recomputation, a second model's forwards.

    Without the whole `step`: one forward and its backward.
    """
    once = 2 + model.num_trained / model.num_parameters + stream.phase.activation_checkpointing
    passes = passes_of(config)
    forwards = once * passes.trained + passes.drawn + passes.reference if step else once
    return forwards * forward_flops(model.architecture, data.image_tokens(bucket), text)


def scaling(
    config: Config, model: ModelFacts, data: DataFacts, *, world_size: int, memory: Mapping[int, float]
) -> Sequence[ScalePoint]:
    """From 8 to 1,024 GPUs; empty where nothing tells the device's rate."""
    if peak_rate(config)[0] is None:
        return ()
    points = []
    for ranks in SCALES:
        if ranks % config.engine.hpz_partition:
            continue
        weak: dict[str, list[tuple[float, float]]] = {}
        fixed: dict[str, list[tuple[float, float]]] = {}
        slow: list[str] = []
        for stream in (one for one in data.streams if sum(one.steps.values())):
            name = str(stream.phase.name or stream.phase.index)
            rows = stream.phase.global_batch * data.rows_per_sample
            per_rank = -(-rows // world_size)
            here = time_of(config, model, data, stream, world_size=ranks, per_rank=per_rank)
            weak.setdefault(name, []).append(_useful(here, 1.0))
            own = time_of(config, model, data, stream, world_size=ranks)
            filled = rows / (-(-rows // ranks) * ranks)
            fixed.setdefault(name, []).append(_useful(own, filled))
            if here.bound == "network" and name not in slow:
                slow.append(name)
        points.append(
            ScalePoint(
                num_ranks=ranks,
                weak={name: _share(pairs) for name, pairs in weak.items()},
                fixed={name: _share(pairs) for name, pairs in fixed.items()},
                network_bound=tuple(slow),
                memory_bytes=memory[ranks],
            )
        )
    return points


def _useful(time: StreamTime, filled: float) -> tuple[float, float]:
    """Seconds of useful computation, and of the whole phase at this resolution."""
    assert time.compute_s is not None
    assert time.step_s is not None
    return time.num_steps * time.compute_s * filled, time.num_steps * time.step_s


def _share(pairs: Sequence[tuple[float, float]]) -> float:
    return sum(useful for useful, _ in pairs) / sum(whole for _, whole in pairs)


def _offload_s(config: Config, model: ModelFacts, world_size: int, micro_batches: int) -> float:
    """What offloaded states add to a step: gradients over PCIe, AdamW on the rank's cores, weights back."""
    if config.engine.offload_optimizer != "cpu" or config.cluster.device != "cuda":
        return 0.0
    share = model.num_trained / world_size
    # The first micro-batch's gradients go down; those of further ones are fetched, added to and brought back.
    pcie = share * (4 + 8 * (micro_batches - 1) + 2) / _PCIE_BYTES_S
    return pcie + share * _UPDATE_BYTES / min(_HOST_BYTES_S, _CORE_BYTES_S * config.cluster.cpus_per_rank)
