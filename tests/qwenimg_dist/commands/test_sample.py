"""Where a grid goes when nobody says so: to what it was drawn from, never silently into the current folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwenimg_dist.commands.sample import grid_file
from qwenimg_dist.compose import load_config


def test_a_grid_lies_with_what_it_was_drawn_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    run, export = f"run.path={tmp_path / 'run'}", tmp_path / "out"
    assert grid_file(load_config([run])) == tmp_path / "run" / "grid.png"
    for key in ("sample.path", "export.path"):
        assert grid_file(load_config([f"{key}={export}", run])) == tmp_path / "out-grid.png"
    monkeypatch.chdir(export)
    assert grid_file(load_config(["sample.path=."])) == tmp_path / "out-grid.png"
    assert grid_file(load_config(["sample.path=some-hub/model"])) == Path("grid.png")
    assert grid_file(load_config([])) == Path("grid.png")
    assert grid_file(load_config([run, f"sample.path={export}", "sample.out=here.png"])) == Path("here.png")
