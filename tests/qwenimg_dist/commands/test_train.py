"""Ranks that no cluster has room for are refused; Ray Train would wait for them without a word."""

from __future__ import annotations

import pytest

from qwenimg_dist.commands.train import check_room
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
