"""A plan as tables for a person, and as JSON.

Place in the flow: the command `plan` prints one of both. Every figure that is no count is marked by where it comes
from: computed, assumed, or measured by a probe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from consumers.planning.fit import Change
from consumers.planning.memory import GIB, Peak
from consumers.planning.plan import JobPlan
from consumers.planning.timing import StreamTime, peak_rate
from qwenimg_dist.report.table import Cell, Table, show_bytes

_PARTS: Final[Mapping[str, str]] = {
    "weights": "weights, this rank's part",
    "secondary": "hpZ's second part",
    "states": "fp32 masters and moments",
    "gradients": "gradients, fp32",
    "ema": "EMA",
    "reference": "frozen reference",
    "other": "the VAE of rollouts, rewards",
    "gathered": "gathered weights, a block's gradients",
    "buffers": "reduction buffers",
    "activations": "activations",
    "update": "(the update's copy, when no graph is there)",
}
_HOST_PARTS: Final[Mapping[str, str]] = {
    "process": "process and libraries",
    "batches": "batches ahead",
    "held_out": "held-out samples",
    "offloaded": "offloaded states",
    "saving": "a checkpoint on its way to disk",
}


def tables(plan: JobPlan) -> list[Table]:
    """For a person."""
    return [
        _memory_table(plan),
        _peaks_table(plan),
        _host_table(plan),
        _disk_table(plan),
        _time_table(plan),
        *_scale_tables(plan),
    ]


def assumptions(plan: JobPlan) -> list[str]:
    """What the figures rest on, a line each."""
    config, model = plan.config, plan.model
    _, rate = peak_rate(config)
    lines = [
        f"model: {model.num_parameters:,} parameters, {model.num_trained:,} of them trained; {model.told}",
        f"data: {plan.data.told}",
        f"ranks: {plan.world_size}, {min(config.cluster.gpus_per_node, plan.world_size)} per node",
    ]
    if plan.probe is None:
        lines.append(f"rate: {rate}")
        overlap = "hides behind computation" if config.engine.gather == "block" else "adds to computation"
        lines.append(
            f"network: {config.cluster.intra_node_gbps:g} Gbit/s within a node, {config.cluster.inter_node_gbps:g} per "
            f"GPU between nodes, {config.plan.network_efficiency:.0%} of it reached; it {overlap}"
        )
    else:
        lines.append("rate: measured by the probe on the ranks here, collectives included")
    lines.append("not counted: waiting for data, saving, evaluating, compiling")
    return lines


def verdict(plan: JobPlan) -> str:
    """One line."""
    if plan.faults:
        return "does not fit: " + "; ".join(plan.faults)
    peak = _gib(plan.worst.memory.total)
    if plan.room is None:
        return f"needs {peak} per rank; cluster.device_memory_gib is not set, so nothing is compared"
    free = 1 - plan.worst.memory.total / (plan.room / (1 - plan.config.plan.headroom))
    return f"fits: {peak} of {plan.config.cluster.device_memory_gib:g} GiB per rank, {free:.0%} free"


def change_lines(changes: Sequence[Change]) -> list[str]:
    """What would fit, a line each."""
    if not changes:
        return [
            "nothing that was tried makes it fit: take GPUs with more memory, or train part of the model (optim.train)"
        ]
    lines = ["what would fit, each recomputed (overrides: peak per rank, what it costs):"]
    for change in changes:
        overrides = " ".join(f"'{one}'" if any(c in one for c in "[]{}() ") else one for one in change.overrides)
        hours = f", {change.plan.hours:,.0f} h" if change.plan.hours is not None else ""
        lines.append(f"  {overrides}: {_gib(change.plan.worst.memory.total)}{hours}; {change.costs}")
    return lines


def to_json(plan: JobPlan, changes: Sequence[Change]) -> dict[str, Any]:
    """Bytes, seconds, hours; None where it is not known."""
    return {
        "fits": not plan.faults if plan.room is not None or plan.faults else None,
        "faults": plan.faults,
        "ranks": plan.world_size,
        "model": {
            "parameters": plan.model.num_parameters,
            "trained": plan.model.num_trained,
            "source": plan.model.told,
        },
        "data": {
            "assumed": plan.data.assumed,
            "source": plan.data.told,
            "rows": plan.data.num_images,
            "longest_text": plan.data.longest_text,
            "mean_text": plan.data.mean_text,
        },
        "device_memory": {
            "available_bytes": plan.room,
            "phases": [_peak_json(peak, plan) for peak in plan.peaks],
        },
        "host_memory": {**plan.host.parts(), "rank": plan.host.total, "node": plan.node_bytes},
        "disk": {
            "checkpoint": plan.disk.checkpoint,
            "checkpoints_at_once": plan.disk.num_kept,
            "checkpoints": plan.disk.checkpoints,
            "cache": plan.disk.cache,
        },
        "time": {
            "hours": plan.hours,
            "measured": plan.probe is not None,
            "assumed": None if plan.probe is not None else peak_rate(plan.config)[1],
            "phases": [_time_json(time) for time in plan.times],
        },
        "scaling_model": [
            {
                "ranks": point.num_ranks,
                "weak": dict(point.weak),
                "fixed_global_batch": dict(point.fixed),
                "network_bound": list(point.network_bound),
                "memory_bytes": point.memory_bytes,
            }
            for point in plan.scale
        ],
        "changes": [
            {
                "overrides": list(change.overrides),
                "peak_bytes": change.plan.worst.memory.total,
                "hours": change.plan.hours,
                "costs": change.costs,
            }
            for change in changes
        ],
    }


def _memory_table(plan: JobPlan) -> Table:
    worst = plan.worst
    where = f"{_phase(worst)} at {worst.stream.resolution} px"
    rows = [(told, f"{worst.memory.parts()[name] / GIB:.2f}") for name, told in _PARTS.items()]
    rows = [row for row in rows if float(row[1]) > 0]
    rows.append(("peak", f"{worst.memory.total / GIB:.2f}"))
    on = "device" if plan.config.cluster.device == "cuda" else "host (cluster.device=cpu)"
    return Table(title=f"Memory of one rank's {on}, GiB: the largest, {where}", columns=("", "GiB"), rows=tuple(rows))


def _peaks_table(plan: JobPlan) -> Table:
    columns = ("phase", "px", "checkpointing", "largest micro-batch", "text", "tokens", "activations GiB", "peak GiB")
    rows = tuple(
        (
            _phase(peak),
            str(peak.stream.resolution),
            "on" if peak.stream.phase.activation_checkpointing else "off",
            f"{peak.samples} x {peak.bucket}",
            peak.text_tokens,
            peak.tokens,
            f"{peak.memory.activations / GIB:.2f}",
            f"{peak.memory.total / GIB:.2f}",
        )
        for peak in plan.peaks
    )
    return Table(title="Peak of one rank by phase", columns=columns, rows=rows)


def _host_table(plan: JobPlan) -> Table:
    ranks = min(plan.config.cluster.gpus_per_node, plan.world_size)
    parts = plan.host.parts()
    rows = [(told, show_bytes(parts[name])) for name, told in _HOST_PARTS.items() if parts[name] > 0]
    rows.append(("a rank", show_bytes(plan.host.total)))
    rows.append((f"a node of {ranks} ranks", show_bytes(plan.node_bytes)))
    return Table(title="Host memory", columns=("", "bytes"), rows=tuple(rows))


def _disk_table(plan: JobPlan) -> Table:
    found = plan.disk
    rows = [("one checkpoint", show_bytes(found.checkpoint))]
    rows.append((f"checkpoints, {found.num_kept} at once at most", show_bytes(found.checkpoints)))
    rows += [(f"cache: {kind}", show_bytes(size)) for kind, size in found.cache.items()]
    rows.append(("cache", show_bytes(sum(found.cache.values()))))
    title = f"Disk, for {plan.data.num_images:,} rows"
    return Table(title=title, columns=("", "bytes"), rows=tuple(rows))


def _time_table(plan: JobPlan) -> Table:
    columns = (
        "phase", "px", "steps", "micro-batches", "compute s", "network s", "step s", "images/s", "hours", "bound by",
        "collectives/step", "between nodes/GPU",
    )  # fmt: skip
    rows = tuple(
        (
            _phase(time),
            str(time.stream.resolution),
            round(time.num_steps),
            f"{time.micro_batches:.1f}",
            _or_dash(time.compute_s),
            f"{time.network_s:.2f}",
            _or_dash(time.step_s),
            _or_dash(time.images_per_s),
            _or_dash(time.hours),
            time.bound,
            show_bytes(time.carried.total),
            show_bytes(time.inter_node),
        )
        for time in plan.times
    )
    total = "" if plan.hours is None else f": {plan.hours:,.1f} hours"
    how = "measured by the probe" if plan.probe is not None else "a model"
    return Table(title=f"Time ({how}){total}", columns=columns, rows=rows)


def _scale_tables(plan: JobPlan) -> list[Table]:
    if not plan.scale:
        return []
    names = list(plan.scale[0].weak)
    columns = (
        "GPUs",
        *(f"{name}, weak" for name in names),
        *(f"{name}, fixed" for name in names),
        "GiB",
        "network-bound",
    )
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (
            point.num_ranks,
            *(f"{point.weak[name]:.0%}" for name in names),
            *(f"{point.fixed[name]:.0%}" for name in names),
            f"{point.memory_bytes / GIB:.1f}",
            ", ".join(point.network_bound) or "-",
        )
        for point in plan.scale
    )
    title = (
        "Scaling, a model: share of pure computation (weak: batch per GPU as planned, fixed: the phase's global batch)"
    )
    return [Table(title=title, columns=columns, rows=rows)]


def _peak_json(peak: Peak, plan: JobPlan) -> dict[str, Any]:
    return {
        "phase": _phase(peak),
        "resolution": peak.stream.resolution,
        "bucket": str(peak.bucket),
        "samples": peak.samples,
        "text_tokens": peak.text_tokens,
        "tokens": peak.tokens,
        "activation_checkpointing": peak.stream.phase.activation_checkpointing,
        "parts": peak.memory.parts(),
        "peak_bytes": peak.memory.total,
        "fits": None if plan.room is None else peak.memory.total <= plan.room,
    }


def _time_json(time: StreamTime) -> dict[str, Any]:
    return {
        "phase": _phase(time),
        "resolution": time.stream.resolution,
        "steps": time.num_steps,
        "micro_batches": time.micro_batches,
        "compute_s": time.compute_s,
        "network_s": time.network_s,
        "offload_s": time.offload_s,
        "step_s": time.step_s,
        "images_per_s": time.images_per_s,
        "hours": time.hours,
        "bound": time.bound,
        "collective_bytes": {
            "gather_all": time.carried.gather_all,
            "gather_group": time.carried.gather_group,
            "reduce": time.carried.reduce,
            "between_nodes_per_gpu": time.inter_node,
        },
    }


def _phase(of: Peak | StreamTime) -> str:
    phase = of.stream.phase
    return phase.name or str(phase.index)


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def _gib(nbytes: float) -> str:
    return f"{nbytes / GIB:.1f} GiB"
