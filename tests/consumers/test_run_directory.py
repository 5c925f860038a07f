"""A fresh start in a run directory that has results: all of them go aside, each once."""

from __future__ import annotations

from pathlib import Path

from consumers.run_directory import _MOVED_BY_FRESH, move_aside


def test_everything_of_an_earlier_run_is_moved_aside_and_kept(tmp_path: Path) -> None:
    assert move_aside(tmp_path) is None
    for number in (1, 2):
        for name in _MOVED_BY_FRESH:
            (tmp_path / name).write_text(f"{name} of run {number}")
        (tmp_path / "train.log").touch()  # the command is reading it
        aside = move_aside(tmp_path)
        assert aside == tmp_path / f"previous-{number:03d}"
        assert {file.name for file in aside.iterdir()} == set(_MOVED_BY_FRESH)
        assert (aside / "tables.jsonl").read_text() == f"tables.jsonl of run {number}"
        left = {file.name for file in tmp_path.iterdir()} - {f"previous-{n:03d}" for n in range(1, number + 1)}
        assert left == {"train.log"}
