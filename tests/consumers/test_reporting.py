"""The report is written beside the run: one process at a time, seldom, and never at the run's cost."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

import pytest

from consumers.errors import DegradedError
from consumers.reporting import ReportWriter


def write_run(folder: Path, steps: int) -> None:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"step": step, "train/loss": 1.0}) for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_written_beside_and_at_the_end(tmp_path: Path) -> None:
    said: list[str] = []
    write_run(tmp_path / "run", 5)
    writer = ReportWriter(tmp_path / "run", said.append)
    begin = time.monotonic()
    writer.begin()
    writer.begin()  # one at a time
    assert time.monotonic() - begin < 1.0  # nothing was waited for
    process = writer._process
    assert process is not None
    assert os.getpgid(process.pid) != os.getpgid(0)  # what signals the ranks' group leaves it alone
    process.wait(timeout=120)
    assert (tmp_path / "run" / "report.html").is_file()
    writer.begin()  # just done: not again so soon
    assert writer._process is None
    write_run(tmp_path / "run", 4321)
    writer.finish()
    assert "4,321" in (tmp_path / "run" / "report.html").read_text()
    assert said == []


def test_what_goes_wrong_is_said_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    write_run(tmp_path / "run", 3)
    (tmp_path / "run" / "metrics.jsonl").write_text("{nonsense\n{}\n")
    writer = ReportWriter(tmp_path / "run", said.append)
    writer.finish()
    assert len(said) == 1
    assert "line 1 is damaged" in said[0]
    assert "qwenimg-dist report run.path=" in said[0]
    monkeypatch.setattr("sys.executable", "/nonexistent")
    monkeypatch.setattr("shutil.which", lambda name: None)
    writer.finish()
    assert "not written" in said[1]


def test_a_crash_waits_for_no_report_and_an_end_does(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 3)
    writer = ReportWriter(tmp_path / "run", lambda line: None)

    def end_by(error: Exception) -> None:
        with contextlib.suppress(type(error)), contextlib.ExitStack() as afterwards:
            afterwards.push(writer.left)
            raise error

    end_by(RuntimeError("a collective lost its peer"))
    assert not (tmp_path / "run" / "report.html").exists()
    end_by(DegradedError("worse"))
    assert (tmp_path / "run" / "report.html").is_file()
