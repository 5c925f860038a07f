"""A run that the guard ended is not complete; ranks without room are refused, which Ray would wait for in silence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from consumers.checkpoint_files import STATE, describe, write_manifest
from consumers.held_out import START_LOSS, Start
from qwenimg_dist.commands.train import _trainer, _verdict, check_room
from qwenimg_dist.compose import load_config
from qwenimg_dist.config import ClusterConfig

NODE = {"CPU": 8.0, "GPU": 4.0, "memory": 1e9}


@pytest.mark.parametrize(
    ("ranks", "device", "cpus", "machines", "refused"),
    [
        (8, "cuda", 1, [NODE, NODE], False),
        (9, "cuda", 1, [NODE, NODE], True),
        (8, "cuda", 4, [NODE, NODE], True),
        (16, "cpu", 1, [NODE, NODE], False),
        (1, "cuda", 1, [{"CPU": 2.0}], True),
        (1, "cpu", 1, [], True),
    ],
)
def test_all_ranks_must_have_room_at_once(
    ranks: int, device: str, cpus: float, machines: list[dict[str, float]], refused: bool
) -> None:
    cluster = ClusterConfig.model_validate({"ranks": ranks, "device": device, "cpus_per_rank": cpus})
    if refused:
        with pytest.raises(ValueError, match=rf"cluster\.ranks={ranks} .*cluster\.device=cpu"):
            check_room(cluster, machines)
    else:
        check_room(cluster, machines)


def test_rays_process_group_waits_longer_than_the_watchdog(tmp_path: Path) -> None:
    config = load_config([f"run.path={tmp_path}", "train.stall_timeout_s=7200.5"])
    trainer = _trainer(config, "id", "training", ())
    assert trainer.backend_config.timeout_s == 7501


@pytest.mark.parametrize(
    ("guard", "loss", "degraded"), [("stop", 0.3, True), ("warn", 0.3, False), ("stop", 0.2, False)]
)
def test_a_run_that_the_guard_ended_at_its_last_step_says_so_again(
    tmp_path: Path, guard: str, loss: float, degraded: bool
) -> None:
    errors = {64: np.full((3, 2), 0.2)}
    start = Start(num_samples=3, quantiles=(0.1, 0.9), seed=0, keys={64: ("a", "b", "c")}, errors=errors)
    (tmp_path / START_LOSS).write_text(json.dumps(start.to_json()))
    folder = tmp_path / "checkpoints" / "step-00000012"
    folder.mkdir(parents=True)
    counts = {"step": 12, "losses": {"64": repr(loss)}, "counts": {"64": 2}}
    (folder / STATE).write_text(json.dumps({"guard": counts}))
    (folder / "rank-00000-of-00001.safetensors").touch()
    records = [describe(file) for file in folder.iterdir()]
    write_manifest(folder, 12, 1, records)
    said = _verdict(load_config([f"evaluate.guard={guard}"]), tmp_path)
    assert bool(said) == degraded
    if degraded:
        assert "degradation at step 12" in said
        assert "64 px 0.3000 against 0.2000" in said
