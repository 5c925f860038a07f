"""What needs several ranks, run on them: `python gang_checks.py PIPELINE OUT CHECK...` in torchrun's environment.

One gang runs many checks, since starting it costs more than they do. Each check writes `OUT/CHECK.json` (rank 0);
the tests read them. An exception ends the gang, and the test of the check says so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gang_certificate
import gang_engine
import gang_saving
import gang_start
import torch
from gang_world import World

from consumers.engine import start_distributed, stop_distributed

MODULES = (gang_engine, gang_saving, gang_certificate, gang_start)
SCRIPT = str(Path(__file__).resolve())


def _check(name: str) -> Callable[[World], dict[str, Any]]:
    made: Callable[[World], dict[str, Any]] = next(
        getattr(module, f"check_{name}") for module in MODULES if hasattr(module, f"check_{name}")
    )
    return made


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    pipeline, out, *checks = arguments
    world = World(ranks=start_distributed("cpu"), pipeline=Path(pipeline), out=Path(out))
    for name in checks:
        found = _check(name)(world)
        verdicts = {key: not world.ranks.any(not value) for key, value in found.items() if isinstance(value, bool)}
        if world.ranks.is_first:
            (world.out / f"{name}.json").write_text(json.dumps({**found, **verdicts}))
    stop_distributed()


if __name__ == "__main__":
    main(sys.argv[1:])
