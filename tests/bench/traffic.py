"""What the trainer's collectives carry per optimiser step, against what ZeRO-3 cannot do without.

The trainer runs as it is, `consumers.trainer.train` on gloo ranks; every collective is counted where PyTorch hands it
to a process group, whoever asked for it, so counts do not depend on the machine. Theory per micro-batch and rank, with
P parameters and the share (N-1)/N that leaves a rank: the weights gathered in bf16 in the forward and once more for
the backward, the gradients reduced and scattered in fp32, `(2 + 2 + 4) P`. Recomputing activations needs no third
gathering: a block that is gathered for its recomputation is there for its backward. Padding, flags, norms, finite
checks and logs are beyond theory. An all-reduce counts twice its size, any other collective once.

`recompute` is the same run's second phase, `switch` the first two steps of it, in which DeepSpeed learns the new order.
`layer` gathers each layer by itself (`engine.gather=layer`): a layer that is gathered for the recomputation is released
before the block's backward, so the weights travel a third time. That is what `layer` pays for its smaller memory.

    python tests/bench/traffic.py [--quick] [--ranks 2] [--out FILE]
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from consumer_step import SAMPLES_PER_RANK, Enough, overrides, write_data
from fake_model import architecture, write_pipeline
from harness import Figures, Report, answer, parser, run_ranks, scratch

FULL: Final = {"num_layers": 30, "num_heads": 1}
"""Deep, since a block or two that are still there when they are needed again would hide what is beyond theory."""
QUICK: Final = {"num_layers": 4, "num_heads": 1}
RESOLUTION: Final = 64
TEXT_TOKENS: Final = 16
"""Bytes do not depend on these two."""
PHASE_STEPS: Final = 6
SETTLED: Final = 4
"""Steps of a phase before it is counted: DeepSpeed records the order of its modules in the first ones."""
MB: Final = 1e6

COLLECTIVES: Final[Mapping[str, tuple[str, int, int]]] = {
    # method of a process group: (kind, argument with the whole of the bytes, how often they travel)
    "allgather": ("all-gather", 0, 1),
    "allgather_coalesced": ("all-gather", 0, 1),
    "all_gather_single": ("all-gather", 0, 1),
    "all_gather_single_coalesced": ("all-gather", 0, 1),
    "_allgather_base": ("all-gather", 0, 1),
    "allgather_into_tensor_coalesced": ("all-gather", 0, 1),
    "reduce_scatter": ("reduce-scatter", 1, 1),
    "reduce_scatter_single": ("reduce-scatter", 1, 1),
    "reduce_scatter_single_coalesced": ("reduce-scatter", 1, 1),
    "_reduce_scatter_base": ("reduce-scatter", 1, 1),
    "reduce_scatter_tensor_coalesced": ("reduce-scatter", 1, 1),
    "allreduce": ("all-reduce", 0, 2),
    "allreduce_coalesced": ("all-reduce", 0, 2),
    "broadcast": ("broadcast", 0, 1),
    "reduce": ("reduce", 0, 1),
    "gather": ("gather", 0, 1),
    "scatter": ("scatter", 1, 1),
    "alltoall": ("all-to-all", 0, 1),
    "alltoall_base": ("all-to-all", 0, 1),
    "all_to_all_single": ("all-to-all", 0, 1),
    "send": ("send", 0, 1),
    "recv": ("recv", 0, 1),
}


class Count:
    """Bytes that a rank's collectives carried, by kind and element type, since the last `take`."""

    def __init__(self) -> None:
        self._bytes: Counter[str] = Counter()

    def watch(self) -> None:
        """Count in every process group of this process. Before anything keeps a reference to a collective."""
        from torch.distributed.distributed_c10d import ProcessGroup

        for name, (kind, whole, times) in COLLECTIVES.items():
            setattr(ProcessGroup, name, self._counted(getattr(ProcessGroup, name), kind, whole, times))

    def _counted(self, method: Callable[..., Any], kind: str, whole: int, times: int) -> Callable[..., Any]:
        @functools.wraps(method)
        def counted(*given: Any, **named: Any) -> Any:
            if len(given) < whole + 2:
                raise TypeError(f"{method.__name__} was called with its tensors by name: cannot be counted")
            for tensor in _tensors(given[whole + 1]):
                dtype = str(tensor.dtype).removeprefix("torch.")
                self._bytes[f"{kind} {dtype}"] += times * tensor.numel() * tensor.element_size()
            return method(*given, **named)

        return counted

    def take(self) -> dict[str, float]:
        """What was counted, and begin anew."""
        taken: dict[str, float] = dict(self._bytes)
        self._bytes = Counter()
        return taken


def _tensors(given: Any) -> Iterable[Any]:
    if isinstance(given, Sequence):
        for one in given:
            yield from _tensors(one)
    else:
        yield given


def worker(job: dict[str, Any]) -> None:
    """One rank: bytes of each step by kind."""
    count = Count()
    count.watch()
    from consumers.hooks import Hooks
    from consumers.trainer import train
    from qwenimg_dist.compose import load_config

    steps: list[dict[str, float]] = []

    def heartbeat(step: int) -> None:
        steps.append(count.take())
        if step == 2 * PHASE_STEPS:
            raise Enough

    try:
        train(load_config([*overrides(job), *job["overrides"]]), Hooks(heartbeat=heartbeat))
    except Enough:
        answer(job, steps)


def theory(num_parameters: int) -> dict[str, float]:
    """MB of a step, before the share that leaves a rank."""
    micro_batch = {"all-gather bfloat16": (2 + 2) * num_parameters, "reduce-scatter float32": 4 * num_parameters}
    return {kind: SAMPLES_PER_RANK * nbytes / MB for kind, nbytes in micro_batch.items()}


def figures(steps: Sequence[Mapping[str, float]], expected: Mapping[str, float], share: float) -> list[Figures]:
    """By kind, in MB that leave a rank; what theory does not have is `other`."""
    found = []
    for step in steps:
        known = {kind: share * step.get(kind, 0.0) / MB for kind in expected}
        total = share * sum(step.values()) / MB
        named = {f"{kind} MB": value for kind, value in known.items()}
        found.append({**named, "other MB": total - sum(known.values()), "all MB": total})
    return found


def main() -> int:
    options = parser(__doc__, repeats=1)
    options.add_argument("--ranks", type=int, default=2)
    args = options.parse_args()
    if args.worker is not None:
        worker(args.worker)
        return 0
    size = QUICK if args.quick else FULL
    report = Report(
        name="traffic",
        what="bytes of the trainer's collectives per step and rank, against ZeRO-3's theory",
        targets=["all / theory <= 1.02 with gather=block, with and without recomputation"],
        notes=["counts, the same on any machine; several values: steps that differ"],
    )
    with scratch("traffic") as folder:
        num_parameters = write_pipeline(folder / "pipeline", architecture(**size), "bf16")
        report.settings = {"parameters": f"{num_parameters / 1e6:.0f}M", **size, "micro_batches": SAMPLES_PER_RANK}
        report.settings |= {"ranks": args.ranks, "precision": "bf16"}
        share, expected = (args.ranks - 1) / args.ranks, theory(num_parameters)
        report.add("theory", figures([{kind: MB * mb for kind, mb in expected.items()}], expected, share))
        for gather in ("block", "layer"):
            for label, steps in measure(folder, args.ranks, gather).items():
                name = f"{gather}, {label}"
                report.add(name, figures(steps, expected, share))
                worst = max(report.rows[name]["all MB"].values) / (share * sum(expected.values()))
                report.notes.append(f"{name}: {worst:.4f} of theory")
    return report.finish(args)


def measure(folder: Path, num_ranks: int, gather: str) -> dict[str, list[dict[str, float]]]:
    """Steps of the first rank (all have the same) by what they are."""
    job = {
        "pipeline": str(folder / "pipeline"),
        "data": str(folder / "data"),
        "run": str(folder / f"run-{gather}"),
        "world_size": num_ranks,
        "resolution": RESOLUTION,
        "text_tokens": TEXT_TOKENS,
    }
    phase = f"{{resolutions: {{{RESOLUTION}: 1.0}}, share: 1.0, micro_batch_tokens: 1, activation_checkpointing: true"
    job["overrides"] = [
        f"engine.gather={gather}",
        f"+curriculum.phases.recompute={phase}, global_batch: {SAMPLES_PER_RANK * num_ranks}}}",
        f"train.steps={2 * PHASE_STEPS}",
        "checkpoint.certify=off",
    ]
    if not (folder / "data").exists():
        write_data(folder / "data", job)
    every = run_ranks(__file__, num_ranks, job, folder / f"ranks-{gather}")
    if any(steps != every[0] for steps in every[1:]):
        raise RuntimeError("the ranks' collectives differ")
    steps = every[0]
    return {
        "plain": steps[SETTLED:PHASE_STEPS],
        "switch": steps[PHASE_STEPS : PHASE_STEPS + 2],
        "recompute": steps[PHASE_STEPS + SETTLED :],
    }


if __name__ == "__main__":
    sys.exit(main())
