"""What `produce` tells W&B, read back from an offline file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from wandb_file import finished, offline_files

from producers import tracking
from producers.tracking import WandbGauges, start_tracking
from producers.unit import UnitReport
from qwenimg_dist.config import LoggerConfig
from qwenimg_dist.report.table import Table


def test_an_offline_file_has_the_curves_and_the_funnel(tmp_path: Path) -> None:
    gauges = WandbGauges(LoggerConfig(wandb="offline", project="p"), tmp_path, group="run-a")
    reasons = Counter(blurry=2, dark=1)
    report = UnitReport(unit=0, num_rows=10, num_kept=7, decoded=10, latents=7, captions=7, reasons=reasons)
    for left in (2, 1, 0):
        gauges.unit_done(report)
        gauges.state(images_per_s=12.5, units_left=left, left_s=1.0)
    gauges.finish([Table(title="Not admitted", columns=("reason", "rows"), rows=(("blurry", 6), ("dark", 3)))])

    (file,) = offline_files(tmp_path)
    found = finished(file)
    assert (found.run.run_group, found.run.job_type) == ("run-a", "produce")
    assert found.metrics["produce/*"] == "produce/units"
    first, last, table = found.history
    assert (first["produce/units"], last["produce/units"]) == (1, 3)  # not one point per unit
    assert (last["produce/opened"], last["produce/kept"], last["produce/not_admitted"]) == (30, 21, 9)
    assert (last["produce/not_admitted/blurry"], last["produce/images_per_s"]) == (6, 12.5)
    written = json.loads((file.parent / "files" / table["produce/not_admitted/path"]).read_text())
    assert written["data"] == [["blurry", 6], ["dark", 3]]


def test_a_lost_tracker_is_said_once_and_producing_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def __init__(self, *_: object, **__: object) -> None: ...

        def log(self, *_: object) -> None:
            raise ConnectionError("gone")

    monkeypatch.setattr(tracking, "Wandb", Broken)
    gauges = WandbGauges(LoggerConfig(wandb="offline"), tmp_path, group="g")
    for _ in range(2):
        gauges.state(images_per_s=1.0, units_left=0, left_s=0.0)
    gauges.finish([])
    assert capsys.readouterr().err.count("gone") == 1


def test_only_producing_that_was_tracked_before_goes_on_without_a_tracker_that_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    folder, said = tmp_path / ".tracking", list[str]()
    config = LoggerConfig(wandb="offline")
    with monkeypatch.context() as away:
        away.setattr(tracking, "Wandb", unreachable)
        for _ in range(2):
            with pytest.raises(ValueError, match="no route"):
                start_tracking(config, folder, group="g", say=said.append)
    gauges = start_tracking(config, folder, group="g", say=said.append)
    assert gauges is not None
    gauges.finish([])
    assert said == []
    monkeypatch.setattr(tracking, "Wandb", unreachable)
    assert start_tracking(config, folder, group="g", say=said.append) is None
    (line,) = said
    assert "no route" in line
    assert line.endswith("goes on without it")
