"""A training's figures reach the endpoint that Prometheus reads from each Ray node."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
from prometheus import await_figures, scrape
from small_run import overrides, write_input

from consumers.checkpoint_files import list_checkpoints
from producers.ray_cluster import ray_session
from qwenimg_dist.commands.train import Training, prepare_environment
from qwenimg_dist.commands.train_metrics import FIGURES, PREFIX, TrainGauges
from qwenimg_dist.compose import load_config


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_figures_reach_the_endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "500")
    write_input(tmp_path)
    config = load_config(overrides(tmp_path, "run", "train.steps=4000", "checkpoint.every=4", "cluster.ranks=1"))
    prepare_environment()
    with ray_session(config.cluster):
        gauges = TrainGauges("another")
        gauges.set({"train/loss": 0.5, "train/lr": 1.0, "checkpoint/step": 7})
        gauges.set({"train/loss": math.nan})
        found = await_figures(
            {'loss run="another"': 0.5, 'last_checkpoint_step run="another"': 7}, PREFIX, "run", timeout_s=60
        )
        assert abs(found['last_checkpoint_time run="another"'] - time.time()) < 120
        assert not [name for name in found if name.startswith("lr")]

        with Training(config, tmp_path / "run") as training:
            training.start(1)
            wanted = {f'{name} run="run"' for name, _ in FIGURES.values()} - {'mfu run="run"'}
            deadline = time.monotonic() + 400
            while training.poll() and not wanted <= found.keys():
                assert time.monotonic() < deadline, wanted - found.keys()
                found = scrape(PREFIX, "run")
            training.stop()
            while training.poll():
                pass
            assert training.ended().code == 0
    steps = [info.step for info in list_checkpoints(tmp_path / "run") if info.fault is None]
    assert 0 < found['step run="run"'] <= steps[-1]
    assert found['last_checkpoint_step run="run"'] % 4 == 0
    assert 0 < found['data_wait_share run="run"'] < 1
    assert found['images_per_second run="run"'] > 0
