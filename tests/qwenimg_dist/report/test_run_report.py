"""A run's metrics become curves: what is there is drawn, what is not is left out, damage is named."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure as Figure_
from omegaconf import OmegaConf
from PIL import Image

from qwenimg_dist.commands.main import main
from qwenimg_dist.report.curves import MAX_POINTS, Line, Mark, Panel, _draw_panel, averaged, draw, smoothed, thinned
from qwenimg_dist.report.metrics_file import read_metrics
from qwenimg_dist.report.page import Figure, KeyFigures, Paragraph, Pictures, Section, report_html
from qwenimg_dist.report.run_curves import class_lines, held_out_lines, phase_marks, rewards
from qwenimg_dist.report.run_events import checkpoints
from qwenimg_dist.report.run_report import data_paths, data_sections, run_sections, write_run_report
from qwenimg_dist.report.table import Table
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
    sections = run_sections(run, [made.dataset.root])
    assert [section.title for section in sections] == [
        "Run",
        "Loss",
        "Samples along the way",
        "Steps and speed",
        "Data",
        "Settings and versions",
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
    lines = {line.label: line for line in held_out_lines(read_metrics(tmp_path / "metrics.jsonl"))}
    assert list(lines) == ["q 0.1", "q 0.9", "mean", "starting model"]
    assert lines["starting model"].dashed
    assert lines["starting model"].values.tolist() == [1.25] * 4
    assert lines["mean"].steps.tolist() == [0, 20, 40, 60]
    assert lines["mean"].values.tolist() == [1.25, 0.5, 0.5, 0.5]


def test_rewards_are_drawn_by_component_where_there_are_some(tmp_path: Path) -> None:
    lines = example_lines()
    write_metrics(tmp_path / "without.jsonl", lines)
    assert rewards(read_metrics(tmp_path / "without.jsonl"), []) == ()
    for line in lines:
        line |= {"reward/total": 0.5, "reward/total_std": 0.1, "reward/ocr": 0.4, "reward/ocr_std": 0.2}
        line |= {"reward/group_std": 0.1, "reward/failures": 0, "train/clip_fraction": 0.2}
    write_metrics(tmp_path / "with.jsonl", lines)
    by_component, policy = rewards(read_metrics(tmp_path / "with.jsonl"), [])
    assert isinstance(by_component, Figure)
    assert isinstance(policy, Figure)
    assert all(f"<!-- {name} -->" in by_component.svg for name in ("ocr", "total"))
    assert "failures" not in by_component.svg


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


def test_many_points_are_thinned_and_a_single_spike_and_gap_stay() -> None:
    steps, values = np.arange(1, 100_001), np.sin(np.arange(100_000) / 9000) + 2.0
    values[40_123], values[77_000], values[-1] = 50.0, -3.0, 2.5
    values[20_000:21_000] = np.nan
    few, shown = thinned(steps, values)
    assert len(few) <= MAX_POINTS + 1
    assert np.all(np.diff(few) > 0)
    assert np.nanmax(shown) == 50.0
    assert few[np.nanargmax(shown)] == 40_124
    assert np.nanmin(shown) == -3.0
    assert (few[-1], shown[-1]) == (100_000, 2.5)
    assert np.isnan(shown[(few > 20_200) & (few < 20_900)]).all()
    _, means = averaged(steps, values)
    assert len(means) <= MAX_POINTS
    assert np.nanmax(means) < 3.5
    assert np.nanmean(means) == pytest.approx(np.nanmean(values), abs=0.01)
    short = np.arange(10), np.ones(10)
    assert thinned(*short) == short == averaged(*short)


def test_the_mean_begins_anew_with_a_phase() -> None:
    steps, values = np.arange(2000), np.where(np.arange(2000) < 1000, 10.0, 1.0)
    panel = Panel(title="t", lines=(Line(label="a", steps=steps, values=values, smooth=100.0),))
    drawn: dict[bool, list[float]] = {}
    for marked in (False, True):
        figure = Figure_()
        axes = figure.subplots()
        _draw_panel(axes, panel, [Mark(step=1000, label="p")] if marked else [])
        drawn[marked] = [y for x, y in axes.lines[1].get_xydata() if 1001 < x < 1100]
    assert max(drawn[True]) == 1.0
    assert max(drawn[False]) > 5.0


def test_a_hundred_thousand_steps_give_a_page_that_opens(tmp_path: Path) -> None:
    names = [f"train/{name}" for name in ("loss", "grad_norm", "lr", "images_per_s", "step_s", "mfu")]
    random = np.random.default_rng(0)
    with open(tmp_path / "metrics.jsonl", "w") as sink:
        for step in range(1, 100_001):
            values = dict(zip(names, random.random(len(names)).round(4).tolist()))
            sink.write(json.dumps({"step": step, **values}) + "\n")
    page = write_run_report(tmp_path).read_text()
    assert len(page) < 2_000_000
    assert "100,000" in page
    assert "http://" not in page and "https://" not in page  # noqa: PT018
    assert "<script" not in page


def test_what_happened_to_a_run_is_told(tmp_path: Path) -> None:
    lines = [{"step": s, "train/loss": 1.0, "train/skipped_steps": float(s >= 7) + float(s >= 9)} for s in range(1, 12)]
    write_metrics(tmp_path / "metrics.jsonl", lines)
    starts = [{"time": "t0", "step": 0, "ranks": 2}, {"time": "t1", "step": 4, "ranks": 3}]
    starts[1]["skipped_checkpoints"] = ["step 6: torn <b>"]
    (tmp_path / "starts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in starts) + '{"torn')
    dump = tmp_path / "faults" / "step-00000007-rank-00001"
    dump.mkdir(parents=True)
    told = {"step": 7, "rank": 1, "bucket": "64x64", "samples": [{"key": "bad-one", "latents_not_finite": True}]}
    (dump / "batch.json").write_text(json.dumps({**told, "samples": [*told["samples"], {"key": "fine-one"}]}))
    broken = tmp_path / "faults" / "step-00000009-rank-00000"
    broken.mkdir()
    (tmp_path / "bad_samples.jsonl").write_text(json.dumps({"step": 3, "samples": [{"key": "gone", "problem": "cut"}]}))
    sections = {section.title: section.pieces for section in run_sections(tmp_path)}
    page = report_html(title="run", sections=[Section(title="f", pieces=sections["Faults survived"])])
    for words in (
        "Started 2 times",
        "step 6: torn &lt;b&gt;",
        "2 step(s) were not finite",
        "at 7, 9.",
        "bad-one",
        "cut",
    ):
        assert words in page
    assert "fine-one" not in page
    tiles = sections["Run"][0]
    assert isinstance(tiles, KeyFigures)
    assert {tile.label: tile.value for tile in tiles.figures}["restarts"] == "1"


def test_nothing_happened_says_nothing(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.jsonl", [{"step": 1, "train/loss": 1.0, "train/skipped_steps": 0}])
    (tmp_path / "starts.jsonl").write_text('{"time": "t", "step": 0, "ranks": 2}\n')
    assert "Faults survived" not in [section.title for section in run_sections(tmp_path)]


def test_checkpoints_are_listed_with_their_certificates(tmp_path: Path) -> None:
    for step, told in ((5, None), (10, {"images": 80, "data": {"fingerprint": "abcd"}})):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"files": {"x": {"size_bytes": 3_000_000_000}}}))
        if told:
            parity = {"measured": True, "max_difference": 1.5e-7, "max_velocity": 1.25}
            (folder / "certificate.json").write_text(json.dumps({**told, "parity": parity}))
    (tmp_path / "checkpoints" / ".tmp-step-00000015-x").mkdir()
    table = checkpoints(tmp_path)[0]
    assert isinstance(table, Table)
    assert [row[0] for row in table.rows] == [5, 10]
    assert table.rows[0][-1] == "-"
    assert table.rows[1][2:5] == ("3.000 GB", 80, "abcd")
    assert table.rows[1][-1] == "1.5e-07 (of 1.2)"


def test_the_guard_s_curves_are_by_class_each_with_its_start(tmp_path: Path) -> None:
    lines = [
        {"step": s, "eval/loss_64": 0.5 - s / 100, "eval/start_loss_64": 0.5, "eval/loss_128": 0.7} for s in (10, 20)
    ]
    write_metrics(tmp_path / "metrics.jsonl", lines)
    found = class_lines(read_metrics(tmp_path / "metrics.jsonl"))
    assert [(line.label, line.dashed) for line in found] == [
        ("64 px", False),
        ("64 px at start", True),
        ("128 px", False),
    ]
    assert found[0].colour == found[1].colour
    assert found[0].values.tolist() == pytest.approx([0.5, 0.4, 0.3])


def test_data_are_counted_anew_only_when_they_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, cache = make_picture_dataset(tmp_path, rows=20, source=False), tmp_path / "cache.json"
    first = data_sections([made.dataset.root], cache)
    monkeypatch.setattr("qwenimg_dist.report.run_report.funnel", lambda dataset: pytest.fail("counted again"))
    again = data_sections([made.dataset.root], cache)
    assert [piece.html() for piece in again[0].pieces] == [piece.html() for piece in first[0].pieces]
    made.dataset.parquet(made.dataset.parts("rows")[-1]).unlink()
    with pytest.raises(pytest.fail.Exception):
        data_sections([made.dataset.root], cache)
    gone = data_sections([tmp_path / "nowhere"], cache)[0].pieces[0]
    assert isinstance(gone, Paragraph)
    assert "could not be read" in gone.text


def test_the_data_sets_of_a_mix_are_those_that_are_shown() -> None:
    assert data_paths(OmegaConf.create({"data": {"path": "/a", "mix": {}}})) == [Path("/a")]
    mix = {"photos": {"path": "/p", "weight": 3}, "text": {"path": "/t", "weight": 1}, "again": {"path": "/p"}}
    assert data_paths(OmegaConf.create({"data": {"path": None, "mix": mix}})) == [Path("/p"), Path("/t")]
    assert data_paths(OmegaConf.create({})) == []


def test_the_command_refuses_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", f"run.path={tmp_path}"]) == 2
    assert "is not a run directory" in capsys.readouterr().err
    write_metrics(tmp_path / "metrics.jsonl", example_lines())
    assert main(["report", f"run.path={tmp_path}"]) == 0
    assert "<svg" not in (tmp_path / "report.html").read_text()  # drawings are pictures: ids do not meet
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")


def test_zero_on_a_log_axis_is_drawn_linear() -> None:
    line = Line(label="a", steps=np.arange(3), values=np.array([0.0, 1.0, np.nan]))
    assert draw([Panel(title="t", lines=(line,), log=True)])
