"""The driver's figures reach the endpoint that Prometheus reads from each Ray node."""

from __future__ import annotations

import pytest
from prometheus import await_figures

from producers.ray_cluster import ray_session
from producers.ray_metrics import PREFIX, RayGauges
from producers.unit import UnitReport
from qwenimg_dist.compose import load_config


@pytest.mark.slow
def test_figures_reach_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "500")
    report = UnitReport(
        unit=0, num_rows=9, num_kept=6, decoded=7, latents=6, captions=6, reasons={"blurry": 2, "duplicate": 1}
    )
    with ray_session(load_config([]).cluster):
        gauges = RayGauges()
        for unit in range(2):
            gauges.unit_done(report)
            gauges.state(images_per_s=3.5, units_left=1 - unit, left_s=4.0)
        wanted = {"units": 2.0, "kept": 12.0, "images": 14.0, "images_per_second": 3.5, "units_left": 0.0}
        wanted |= {'not_admitted reason="blurry"': 4.0, 'not_admitted reason="duplicate"': 2.0}
        await_figures(wanted, PREFIX, "reason")
