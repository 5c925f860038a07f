"""How a run stands, read from files of known content."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_dataset import FakeProducer, make_rows

from qwenimg_dist.commands.main import main
from qwenimg_dist.metrics import last_entries
from qwenimg_dist.report.run_status import run_status

NOW = 1_800_000_000.0


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    producer = FakeProducer(tmp_path / "data", unit_size=16)
    producer.add(make_rows(40))
    producer.produce([0, 1])
    producer._listing(2, producer.unit_rows(2))
    (run / "checkpoints" / "step-00000100").mkdir(parents=True)
    (run / "checkpoints" / "step-00000200").mkdir()  # never committed
    manifest = run / "checkpoints" / "step-00000100" / "manifest.json"
    manifest.write_text("{}")
    os.utime(manifest, (NOW - 3600, NOW - 3600))
    (run / "config.yaml").write_text(
        f"stage: sft\nmodel: {{name: tiny}}\ntrain: {{steps: 400}}\ndata: {{path: {tmp_path / 'data'}}}\n"
    )
    (run / "plan.json").write_text(
        json.dumps({"phases": [{"name": "low", "first_step": 0}, {"name": "high", "first_step": 150}]})
    )
    lines = [
        {"step": step, "train/loss": 1.0, "train/step_s": 9.0 if step <= 150 else 2.0, "train/images_per_s": 8.0}
        | {"train/resolution": 64 if step <= 150 else 128, "train/skipped_steps": 1, "train/bad_samples": 3}
        | ({"eval/loss": 0.25, "eval/start_loss": 0.5} if step == 150 else {})
        for step in range(130, 161)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text + '{"step": 161, "train/lo')  # being written
    (run / "starts.jsonl").write_text('{"step": 0}\n{"step": 100}\n{"step": 100}\n')
    (run / "train.log").write_text("step 1\nwarning: a rank died\nstep 2\n")
    for name in ("metrics.jsonl", "starts.jsonl", "train.log"):
        os.utime(run / name, (NOW - 30, NOW - 30))
    return run


def test_it_tells_what_stands_there(run_dir: Path) -> None:
    found = run_status(run_dir, NOW)
    assert (found.stage, found.model, found.step, found.steps, found.complete) == ("sft", "tiny", 160, 400, False)
    assert (found.phase, found.resolution) == ("high", 128)
    assert (found.held_out, found.held_out_at_start) == (0.25, 0.5)
    assert found.step_s == 2.0, "the rate of the phase before does not count"
    assert found.left_s == 240 * 2.0
    assert (found.last_checkpoint, found.checkpoints, found.checkpoint_age_s) == (100, 1, 3600)
    assert (found.restarts, found.skipped_steps, found.bad_samples) == (2, 1, 3)
    assert found.silent_s == 30
    assert found.warnings == ("warning: a rank died",)
    (data,) = found.data
    assert (data.units_listed, data.units_done, data.source_complete) == (3, 2, False)
    json.dumps(found.as_dict())
    shown = found.table().text()
    assert "160 of 400 (40%)" in shown
    assert "8 min at this rate" in shown
    assert "step 100, 60 min ago" in shown


def test_a_run_that_has_just_started_has_little_to_say(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {steps: 10}\n")
    found = run_status(tmp_path, NOW)
    assert (found.step, found.loss, found.left_s, found.last_checkpoint, found.silent_s) == (0, None, None, None, None)
    assert "none yet" in found.table().text()
    with pytest.raises(ValueError, match=r"not a run directory .*is run\.path right"):
        run_status(tmp_path / "elsewhere")
    (tmp_path / "produced_for").mkdir()
    with pytest.raises(ValueError, match="its ranks have not begun yet"):
        run_status(tmp_path / "produced_for")


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    with open(file, "wb") as sink:
        sink.truncate(1 << 33)  # a hole: read, it would be 8 GB of nothing
        sink.seek(0, os.SEEK_END)
        sink.write(b'\n{"step": 1}\nnot json\n{"step": 2}\n{"step": 3}\n')
    assert last_entries(file, 2) == [{"step": 2}, {"step": 3}]


def test_the_command_shows_it_and_speaks_json(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "status", f"run.path={run_dir}"]) == 0
    assert "160 of 400 (40%)" in capsys.readouterr().out
    assert main(["run", "status", "--json", f"run.path={run_dir}"]) == 0
    assert json.loads(capsys.readouterr().out)["last_checkpoint"] == 100
    assert main(["run", "status", f"run.path={run_dir / 'nothing'}"]) == 2
    assert "not a run directory" in capsys.readouterr().err


def test_a_checkpoint_may_be_retired_while_it_is_looked_at(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    retired = run_dir / "checkpoints" / "step-00000050" / "manifest.json"
    retired.parent.mkdir()
    retired.write_text("{}")
    look = Path.stat

    def stat(path: Path, **options: Any) -> os.stat_result:
        found = look(path, **options)
        if path == retired:  # right after the first look at it
            shutil.rmtree(retired.parent)
        return found

    monkeypatch.setattr(Path, "stat", stat)
    found = run_status(run_dir, NOW)
    assert not retired.parent.exists()
    assert (found.last_checkpoint, found.checkpoints) == (100, 1)
