"""Checks of what ranks agree on before they build an engine, see `gang_checks.py`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

from gang_world import World
from small_run import overrides
from written_checkpoint import write_checkpoint

import consumers.start_from as module
from consumers.reference_pass import open_reference
from consumers.start_from import StartWeights, agree
from qwenimg_dist.compose import load_config


def check_start_weights(world: World) -> dict[str, Any]:
    """What each rank starts from where rank 1's machine lacks the mount, and what it is told by a stage that needs the
    source for its reference."""
    root, ranks = world.out / "start", world.ranks

    def write() -> None:
        root.mkdir()
        (root / "pipeline").symlink_to(world.pipeline)
        for run in ("parent", "child"):
            write_checkpoint(root, run, 2)

    ranks.on_first(write)
    start_from = f"start_from={root / 'parent'}"
    config = load_config(overrides(root, "child", "train.fresh=true", start_from))
    pipeline = root / "pipeline"
    found = {"seen": agreed_on(agree(config, root / "child", pipeline, first(config, root, pipeline), ranks))}
    config = load_config(overrides(root, "child", start_from))
    lacks = mock.patch.object(module, "open_weights", side_effect=ValueError("no mount"))
    with lacks if ranks.rank == 1 else mock.patch.object(module, "open_weights", module.open_weights):
        weights = agree(config, root / "child", pipeline, None, ranks)
    found["hidden"] = agreed_on(weights)
    for name, *words in (
        ("dpo", "stage=dpo", "objective.reference=online"),
        ("grpo", "stage=grpo", "objective.kl_weight=0.1"),
    ):
        found[name] = refused(load_config([*words, start_from]), weights)
    return {f"rank {rank}": one for rank, one in enumerate(ranks.gather_json(found))}


def first(config: Any, root: Path, pipeline: Path) -> StartWeights | None:
    return module.find_start(config, root / "child", pipeline, recorded=None)


def agreed_on(weights: StartWeights | None) -> list[Any]:
    assert weights is not None
    return [weights.source is not None, weights.checkpoint is not None, weights.record["step"], weights.fault]


def refused(config: Any, weights: StartWeights | None) -> list[str]:
    """What opening the reference raises; nothing else of a session is there, nor needed for it."""
    nothing = cast(Any, None)
    prepared = cast(Any, SimpleNamespace(start=weights))
    try:
        open_reference(config, prepared, {}, nothing, nothing, nothing, step=2, stack=nothing, watch=nothing)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []
