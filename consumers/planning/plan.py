"""The whole plan of a run on a number of ranks: memory, disk, traffic, time, and whether it fits.

Place in the flow: the command `plan` shows it, the session asks `check_device` before the engine is built. Refuses to
fail over what it does not know: without a known memory nothing is compared, without a rate there are no hours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from consumers.planning.disk import Disk, disk
from consumers.planning.facts import DataFacts, ModelFacts, data_facts, model_facts
from consumers.planning.memory import GIB, HostMemory, Peak, host_memory, memory_of, peak_of
from consumers.planning.timing import SCALES, Probe, ScalePoint, StreamTime, scaling, time_of
from consumers.ranks import Ranks
from qwenimg_dist.config import Config


@dataclass(frozen=True, kw_only=True)
class JobPlan:
    """Everything that `plan` tells."""

    config: Config
    world_size: int
    model: ModelFacts
    data: DataFacts
    peaks: tuple[Peak, ...]
    """One per phase and resolution."""
    host: HostMemory
    disk: Disk
    times: tuple[StreamTime, ...]
    """Beside `peaks`."""
    scale: Sequence[ScalePoint]
    probe: Probe | None = None

    @property
    def worst(self) -> Peak:
        return max(self.peaks, key=lambda peak: peak.memory.total)

    @property
    def room(self) -> float | None:
        """Bytes that a rank may use; None where `cluster.device_memory_gib` says nothing."""
        given = self.config.cluster.device_memory_gib
        return None if given is None else usable(given * GIB, self.config)

    @property
    def node_bytes(self) -> float:
        """Host memory that the ranks of one node need."""
        ranks = min(self.config.cluster.gpus_per_node, self.world_size)
        on_host = self.worst.memory.total if self.config.cluster.device == "cpu" else 0.0
        return ranks * (self.host.total + on_host)

    @property
    def faults(self) -> list[str]:
        """Why it cannot fit, a line each; empty if it can, or nothing is known to hold it against."""
        found = []
        if self.room is not None:
            found = [_too_much(peak, self.room, self.config) for peak in self.peaks if peak.memory.total > self.room]
        host = self.config.cluster.host_memory_gib
        if host is not None and self.node_bytes > host * GIB:
            found.append(
                f"a node's ranks need {self.node_bytes / GIB:.0f} GiB of host memory, cluster.host_memory_gib={host:g}"
            )
        return found

    @property
    def hours(self) -> float | None:
        """Of the steps; saving, evaluating and waiting come on top."""
        parts = [time.hours for time in self.times]
        return None if None in parts else sum(part for part in parts if part is not None)


def make_job_plan(
    config: Config, *, world_size: int, data: DataFacts | None = None, probe: Probe | None = None, scale: bool = True
) -> JobPlan:
    """Raises ValueError for input that cannot be planned for. `data` where it was looked at already."""
    model = model_facts(config)
    data = data_facts(config, world_size=world_size) if data is None else data
    peaks = tuple(peak_of(config, model, data, stream, world_size=world_size) for stream in data.streams)
    at_scale: Sequence[ScalePoint] = ()
    if scale:
        worst = max(peaks, key=lambda peak: peak.memory.total)
        fits = {ranks: _at(config, model, worst, ranks) for ranks in SCALES if not ranks % config.engine.hpz_partition}
        at_scale = scaling(config, model, data, world_size=world_size, memory=fits)
    return JobPlan(
        config=config,
        world_size=world_size,
        model=model,
        data=data,
        peaks=peaks,
        host=host_memory(config, model, data, world_size=world_size),
        disk=disk(config, model, data),
        times=tuple(
            time_of(config, model, data, stream, world_size=world_size, probe=probe) for stream in data.streams
        ),
        scale=at_scale,
        probe=probe,
    )


def usable(device_bytes: float, config: Config) -> float:
    """What of a device's memory a run may count on."""
    return device_bytes * (1 - config.plan.headroom)


def check_device(config: Config, ranks: Ranks) -> None:
    """Raise ValueError on every rank if the run cannot fit into the smallest of their GPUs. Collective.

    Of ranks on CPUs nothing is known but what `cluster.device_memory_gib` says. `plan.force=true` passes everything.
    """
    given = config.cluster.device_memory_gib
    device_bytes = given * GIB if given else 0.0
    if ranks.device.type == "cuda":
        device_bytes = -ranks.max([-float(torch.cuda.get_device_properties(ranks.device).total_memory)])[0]
    if not device_bytes or config.plan.force:
        return
    if fault := device_fault(config, world_size=ranks.world_size, device_bytes=device_bytes):
        raise ValueError(fault)


def device_fault(config: Config, *, world_size: int, device_bytes: float) -> str:
    """Why this run cannot fit on a device of this size; empty if it can.

    Captions count as long as `model.max_text_tokens` allows: the ranks ask before the data is open.
    """
    assumed = config.model_copy(update={"data": config.data.model_copy(update={"path": None, "mix": {}})})
    plan = make_job_plan(assumed, world_size=world_size, scale=False)
    room = usable(device_bytes, config)
    faults = [_too_much(peak, room, config) for peak in plan.peaks if peak.memory.total > room]
    if not faults:
        return ""
    return (
        f"this cannot fit into the {device_bytes / GIB:.1f} GiB of a rank's GPU: {'; '.join(faults)}. `qwenimg-dist "
        f"plan` with the same settings and cluster.device_memory_gib={device_bytes / GIB:.1f} says what would fit; "
        "plan.force=true tries all the same"
    )


def _at(config: Config, model: ModelFacts, peak: Peak, ranks: int) -> float:
    checkpointing = peak.stream.phase.activation_checkpointing
    return memory_of(config, model, world_size=ranks, tokens=peak.tokens, activation_checkpointing=checkpointing).total


def _too_much(peak: Peak, room: float, config: Config) -> str:
    return (
        f"{peak.stream.phase} at {peak.stream.resolution} px needs {peak.memory.total / GIB:.1f} GiB per rank ("
        f"{peak.samples} x {peak.bucket}, {peak.tokens:,} tokens), {room / GIB:.1f} GiB are there (plan.headroom="
        f"{config.plan.headroom:g} left free)"
    )
