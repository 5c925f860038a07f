"""A run's metrics become curves: what is there is drawn, what is not is left out, damage is named."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwenimg_dist.report.curves import Line, Mark, Panel, draw, smoothed
from qwenimg_dist.report.metrics_file import read_metrics
from qwenimg_dist.report.page import Figure, KeyFigures, Paragraph, Pictures, report_html
from qwenimg_dist.report.run_report import phase_marks, run_sections
from tests.helpers.picture_dataset import make_picture_dataset


def write_metrics(file: Path, lines: list[dict[str, Any]], tail: str = "") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


def example_lines() -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(1, 61):
        phase = int(step > 40)
        lines.append({"step": step, "train/loss": 1.0 / step, "train/grad_norm": 0.5, "train/lr": 1e-3})
        lines[-1] |= {
            "train/phase": phase,
            "train/resolution": 64 * 2**phase,
            "train/images_per_s": 100.0 + step,
            "train/data_wait_s": 0.0,
        }
        if step % 20 == 0:
            held_out = {"eval/loss": 0.5, "eval/loss_q0.1": 0.9, "eval/loss_q0.9": 0.2, "eval/start_loss": 1.25}
            lines.append({"step": step, **held_out})
    return lines


def test_a_full_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_metrics(run / "metrics.jsonl", example_lines())
    (run / "samples").mkdir()
    for step in range(0, 61, 3):
        Image.new("RGB", (32, 16), (step, 0, 0)).save(run / "samples" / f"step-{step:08d}-64x64.png")
    (run / "config.yaml").write_text("stage: pretrain\ncurriculum: {phases: [{name: low}, {name: high}]}\n")
    made = make_picture_dataset(tmp_path, rows=20, source=False)
    sections = run_sections(run, made.dataset.root)
    assert [section.title for section in sections] == [
        "Run",
        "Loss",
        "Samples along the way",
        "Steps and speed",
        "Data",
        "Settings",
    ]
    tiles = sections[0].pieces[0]
    assert isinstance(tiles, KeyFigures)
    told = {tile.label: (tile.value, tile.note) for tile in tiles.figures}
    assert told["steps"] == ("60", "2 phases")
    assert told["held-out loss"] == ("0.5", "starting model 1.25")
    grids = sections[2].pieces[1]
    assert isinstance(grids, Pictures)
    assert (len(grids.pictures), grids.columns) == (12, 4)
    assert grids.pictures[0].caption == "step 0"
    assert grids.pictures[-1].caption == "step 60, high, 128 px"
    page = report_html(title="run", sections=sections)
    assert "12 of 21 grids shown" in page
    assert "stage: pretrain" in page


def test_an_empty_run_says_so(tmp_path: Path) -> None:
    assert [section.pieces for section in run_sections(tmp_path)] == [(Paragraph(text="No step was logged yet."),)]


def test_the_starting_model_and_every_quantile_are_drawn(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.jsonl", example_lines())
    from qwenimg_dist.report.run_report import _held_out_lines

    lines = {line.label: line for line in _held_out_lines(read_metrics(tmp_path / "metrics.jsonl"))}
    assert list(lines) == ["q 0.1", "q 0.9", "mean", "starting model"]
    assert lines["starting model"].dashed
    assert lines["starting model"].values.tolist() == [1.25] * 4
    assert lines["mean"].steps.tolist() == [0, 20, 40, 60]
    assert lines["mean"].values.tolist() == [1.25, 0.5, 0.5, 0.5]


def test_phase_changes_are_marked_where_they_happen(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.jsonl", example_lines())
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert phase_marks(metrics) == [Mark(step=41, label="phase 1, 128 px")]
    assert phase_marks(metrics, ["low", "high"]) == [Mark(step=41, label="high, 128 px")]
    del metrics["train/resolution"]
    assert phase_marks(metrics, ["low", "high"]) == [Mark(step=41, label="high")]


def test_a_degraded_model_is_said_to_be_one(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.jsonl", [{"step": 9, "train/loss": 1, "eval/loss": 0.6, "eval/start_loss": 0.5}])
    tiles = run_sections(tmp_path)[0].pieces[0]
    assert isinstance(tiles, KeyFigures)
    assert tiles.figures[-1].note == "starting model 0.5: it was better"


def test_a_torn_last_line_is_passed_over_other_damage_is_named(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    write_metrics(file, [{"step": 1, "train/loss": 1.0}], tail='{"step": 2, "train/lo')
    assert read_metrics(file)["train/loss"].steps.tolist() == [1]
    write_metrics(file, [{"step": 1, "train/loss": 1.0}], tail='{"st\n{"step": 3, "train/loss": 1.0}\n')
    with pytest.raises(ValueError, match="line 2 is damaged"):
        read_metrics(file)


def test_not_a_number_is_a_gap(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a": NaN}\n{"step": 3, "a": null}\n{"step": 4, "a": 2}\n')
    column = read_metrics(file)["a"]
    assert np.isnan(column.values).tolist() == [False, True, True, False]
    assert smoothed(column.values, 3.0)[1] == smoothed(column.values, 3.0)[0]


def test_smoothing_is_unbiased_from_the_first_value() -> None:
    flat = np.full(20, 3.0)
    np.testing.assert_allclose(smoothed(flat, 4.0), flat)
    step = np.concatenate([np.zeros(100), np.ones(4)])
    assert smoothed(step, 4.0)[-1] == pytest.approx(0.5)


def test_a_drawing_is_svg_and_the_same_each_time() -> None:
    steps = np.arange(50)
    line = Line(label="a", steps=steps, values=np.exp(-steps / 20.0), smooth=4.0)
    panel = Panel(title="t", lines=(line,), log=True)
    once = draw([panel], [Mark(step=20, label="phase 1")])
    assert once == draw([panel], [Mark(step=20, label="phase 1")])
    assert ET.fromstring(once).tag.endswith("svg")
    assert once != draw([panel])
    assert "href" not in Figure(svg=once).html()


def test_zero_on_a_log_axis_is_drawn_linear() -> None:
    line = Line(label="a", steps=np.arange(3), values=np.array([0.0, 1.0, np.nan]))
    assert draw([Panel(title="t", lines=(line,), log=True)])
