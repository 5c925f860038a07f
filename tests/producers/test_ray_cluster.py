"""A cluster that cannot be reached is said, with the way to it."""

from __future__ import annotations

import pytest
import ray

from producers.ray_cluster import ray_session
from qwenimg_dist.config import ClusterConfig


def test_where_no_cluster_is_the_way_to_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(**_: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", nowhere)  # on this machine another test may run one
    there = ClusterConfig(address="auto")
    with pytest.raises(ValueError, match=r"no Ray cluster at 'auto'.*ray job submit"), ray_session(there):
        pass
