"""What `qwenimg-dist plan` says a rank takes, against what ranks take: growth over the baseline after the imports.

The ranks are those of `memory.py` (real classes, random weights, gloo): loaded, stepped twice; the highest VmHWM of the
ranks counts. The plan is of the same config and architecture, at the micro-batch's own tokens. Cases:

    block, layer     engine.gather
    recompute        activation checkpointing
    offload          engine.offload_optimizer=cpu, which on a CPU costs a second copy of the gradients
    frozen           optim.train=[attn]
    fp32             engine.precision=fp32

    python tests/bench/plan.py [--quick] [--cases block,layer,...] [--repeats 1] [--out FILE]

361 million parameters, about 25 bytes of free memory for each.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import memory
from fake_model import architecture, write_pipeline
from harness import Figures, Report, num_repeats, parser, run_ranks, scratch

FULL: Final = {"num_layers": 4, "num_heads": 12}
QUICK: Final = {"num_layers": 3, "num_heads": 6}
NUM_RANKS: Final = 2
CASES: Final[Mapping[str, tuple[str, ...]]] = {
    "block": ("engine.gather=block",),
    "layer": ("engine.gather=layer",),
    "recompute": ("engine.gather=block", "engine.activation_checkpointing=true"),
    "offload": ("engine.gather=block", "engine.offload_optimizer=cpu"),
    "frozen": ("engine.gather=block", "optim.train=[attn]"),
    "fp32": ("engine.gather=block", "engine.precision=fp32"),
}
MB: Final = 1e6


def predicted(pipeline: Path, overrides: tuple[str, ...]) -> float:
    """Bytes of one rank at its peak."""
    from consumers.planning.facts import model_facts
    from consumers.planning.memory import memory_of
    from qwenimg_dist.compose import load_config
    from qwenimg_dist.estimate import offloaded_bytes

    config = load_config([f"model.path={pipeline}", f"optim.ema_decay={memory.EMA_DECAY}", *overrides])
    model = model_facts(config)
    found = memory_of(
        config,
        model,
        world_size=NUM_RANKS,
        tokens=(memory.RESOLUTION // 16) ** 2 + memory.TEXT_TOKENS,
        activation_checkpointing=config.engine.activation_checkpointing,
    ).total
    if config.engine.offload_optimizer == "cpu":
        found += offloaded_bytes(model.num_trained, num_ranks=NUM_RANKS, ema=True)
    return found


def measured(pipeline: Path, folder: Path, overrides: tuple[str, ...]) -> float:
    """Bytes by which the largest rank grew in loading and two steps."""
    job: dict[str, Any] = {
        "task": "train",
        "pipeline": str(pipeline),
        "run": str(folder / "run"),
        "precision": "bf16",
        "gather": "block",
        "save": False,
        "overrides": list(overrides),
    }
    told = run_ranks(str(Path(memory.__file__)), NUM_RANKS, job, folder)
    return MB * max(float(peak) for rank in told for peak in rank["peaks"].values())


def main() -> int:
    options = parser(__doc__, repeats=1)
    options.add_argument("--cases", default=",".join(CASES))
    args = options.parse_args()
    size = QUICK if args.quick else FULL
    report = Report(
        name="plan",
        what="a rank's memory as planned, against the growth of the largest rank",
        targets=["error within 10 % (5 % on a GPU)"],
    )
    with scratch("plan") as folder:
        num_parameters = write_pipeline(folder / "pipeline", architecture(**size), "bf16")
        memory.require_memory(25 * num_parameters)
        report.settings = {"parameters": f"{num_parameters / 1e6:.0f}M", **size, "ranks": NUM_RANKS}
        for case in args.cases.split(","):
            expected = predicted(folder / "pipeline", CASES[case])
            found: list[Figures] = []
            for number in range(num_repeats(args)):
                taken = measured(folder / "pipeline", folder / f"{case}-{number}", CASES[case])
                found.append(
                    {"planned MB": expected / MB, "taken MB": taken / MB, "error %": 100 * (expected / taken - 1)}
                )
            report.add(case, found)
            print(report.rows[case], flush=True)
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(main())
