"""The dashboard builds, and every panel names a metric that the code logs."""

from __future__ import annotations

import re
from pathlib import Path

from qwenimg_dist.report.wandb_dashboard import PANELS, build_dashboard

ROOT = Path(__file__).resolve().parents[3]


def test_the_view_holds_every_panel_over_its_own_axis() -> None:
    view = build_dashboard("a-project", "a-team")
    sections = {section.name: section.panels for section in view.sections}
    assert set(sections) == {*PANELS, "Grids"}
    axes = {(name, str(getattr(panel.x, "name", panel.x))) for name in PANELS for panel in sections[name]}
    assert {axis for _, axis in axes} == {"train/global_step", "produce/units"}
    assert {name for name, axis in axes if axis == "produce/units"} == {"Producing"}
    assert len(view._to_model().model_dump_json()) > 1000  # what would be sent


def test_panels_name_metrics_that_are_logged() -> None:
    code = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in ("consumers", "producers")
        for path in (ROOT / folder).rglob("*.py")
    )
    for metrics in (metric for plots in PANELS.values() for plot in plots.values() for metric in plot):
        kind, _, name = metrics.partition("/")
        stem = re.sub(r"^start_|_q0\.\d$", "", name)
        assert f'"{stem}' in code or f"{kind}/{stem}" in code, f"{metrics} is logged nowhere"
