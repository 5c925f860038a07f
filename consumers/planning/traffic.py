"""Bytes that a rank's collectives carry per optimiser step, and the seconds that the links need for them.

Place in the flow: `timing.py` sets them against the computation. Per micro-batch and rank, with P parameters of which T
train (`tests/bench/traffic.py` counts the same on the trainer itself, and finds 0.98 to 0.99 of it):

    all-gather of the weights in the forward and for the backward        2 + 2 bytes x P    (fp32: 4 + 4)
    a third one with `gather=layer` and activation checkpointing         2 x P
    each forward of a reference that is a second model, or of a rollout  2 x P
    reduce-scatter of the gradients in fp32                              4 x T

With hpZ (groups of h ranks) only the first forward of a step gathers over all ranks; the rest stays within the group.

Seconds are those of a ring or of NCCL's rails: of B bytes a rank takes in (N-1)/N through its links within the node,
and a node takes in (n-1)/n through its adapters, of which each GPU has one; the slower of the two counts. A
collective's latency is a hop's times the ranks. Deliberately left out: congestion, a slow rank, PCIe topologies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from consumers.planning.facts import ModelFacts
from consumers.planning.passes import passes_of
from qwenimg_dist.config import ClusterConfig, Config

_HOP_S: Final = 3e-6
"""Of a ring's step between two GPUs; an assumption."""
_GBIT: Final = 1e9 / 8


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes before the share (N-1)/N that leaves a rank, and how many collectives they come in."""

    gather_all: float
    """Over all ranks."""
    gather_group: float
    """Within hpZ's groups."""
    reduce: float
    num_over_all: int
    num_in_group: int

    @property
    def total(self) -> float:
        return self.gather_all + self.gather_group + self.reduce


def traffic(config: Config, model: ModelFacts, *, micro_batches: int, activation_checkpointing: bool) -> Traffic:
    """Of one optimiser step."""
    size = 2.0 if config.engine.precision == "bf16" else 4.0
    whole = size * model.num_parameters
    layers = config.engine.gather == "layer"
    passes = passes_of(config)
    per_micro_batch = passes.trained * (2 + (layers and activation_checkpointing)) + passes.drawn + passes.reference
    gathers = micro_batches * per_micro_batch
    over_all = gathers
    if config.engine.hpz_partition > 1:
        over_all = passes.updates + passes.second_model  # the first forward after each change of the weights
    num_blocks = int(model.architecture["num_layers"])
    units = len(model.shapes) // 2 if layers else num_blocks + len(model.shapes) // 200
    buckets = -(-model.num_trained // max(model.largest, 50_000_000))
    return Traffic(
        gather_all=over_all * whole,
        gather_group=(gathers - over_all) * whole,
        reduce=micro_batches * passes.trained * 4.0 * model.num_trained,
        num_over_all=over_all * units + micro_batches * passes.trained * buckets,
        num_in_group=(gathers - over_all) * units,
    )


def seconds(carried: Traffic, cluster: ClusterConfig, *, world_size: int, hpz: int, efficiency: float) -> float:
    """What the links need for a step, were nothing else to be done."""
    if world_size == 1:
        return 0.0
    within = cluster.intra_node_gbps * _GBIT * efficiency
    between = cluster.inter_node_gbps * _GBIT * efficiency
    per_node = min(cluster.gpus_per_node, world_size)

    def ring(nbytes: float, ranks: int) -> float:
        nodes = -(-ranks // per_node)
        inside = nbytes * (ranks - 1) / ranks / within
        outside = nbytes * (nodes - 1) / nodes / (per_node * between)
        return max(inside, outside)

    latency = _HOP_S * (carried.num_over_all * (world_size - 1) + carried.num_in_group * (hpz - 1))
    return ring(carried.gather_all + carried.reduce, world_size) + ring(carried.gather_group, hpz) + latency


def inter_node_bytes(carried: Traffic, cluster: ClusterConfig, *, world_size: int, hpz: int) -> float:
    """That one GPU's adapter carries per step."""
    per_node = min(cluster.gpus_per_node, world_size)
    nodes, group_nodes = -(-world_size // per_node), -(-hpz // per_node)
    over_all = (carried.gather_all + carried.reduce) * (nodes - 1) / nodes
    return (over_all + carried.gather_group * (group_nodes - 1) / group_nodes) / per_node
