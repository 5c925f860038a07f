"""No step stands twice in the logs, whatever was killed when; W&B works without a network and never fails a run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image
from wandb_file import finished, offline_files

from qwenimg_dist.config import LoggerConfig
from qwenimg_dist.metrics import JsonLines, RunLog, peak_flops, truncate_after


def write(file: Path, steps: list[int], tail: str = "") -> None:
    file.write_text("".join(json.dumps({"step": step}) + "\n" for step in steps) + tail)


@pytest.mark.parametrize("tail", ["", '{"step": 9, "lo', "garbage\n", "\n"])
def test_cut_back_to_a_step(tmp_path: Path, tail: str) -> None:
    file = tmp_path / "metrics.jsonl"
    write(file, [1, 2, 3, 4, 5], tail)
    truncate_after(file, 3)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]
    assert file.read_text().endswith("\n")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_cut_to_nothing_and_of_nothing(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert truncate_after(file, 3) == 0
    write(file, [1, 2])
    assert truncate_after(file, 0) == 2
    assert file.read_text() == ""


def test_what_is_whole_is_not_rewritten(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    write(file, [1, 2])
    inode = file.stat().st_ino
    assert truncate_after(file, 2) == 0
    assert file.stat().st_ino == inode


class CountingFile(io.FileIO):
    """Counts the bytes that are read from it."""

    num_read = 0

    def read(self, size: int = -1, /) -> bytes:
        found = super().read(size)
        CountingFile.num_read += len(found)
        return found


def test_cutting_back_costs_what_is_dropped_and_not_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwenimg_dist.metrics._BLOCK_BYTES", 64)
    monkeypatch.setattr("qwenimg_dist.metrics.open", CountingFile, raising=False)
    read = []
    for num in (10, 20_000):
        file = tmp_path / f"{num}.jsonl"
        write(file, list(range(1, num + 4)), '{"step": 9')
        CountingFile.num_read = 0
        assert truncate_after(file, num) == 4
        read.append(CountingFile.num_read)
        assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == list(range(1, num + 1))
    assert read[1] <= read[0] + 64


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
def test_lines_longer_and_shorter_than_a_block(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwenimg_dist.metrics._BLOCK_BYTES", block)
    lines = [json.dumps({"step": step, "keys": "k" * (step * 13 % 50)}) + "\n" for step in range(1, 30)]
    for step in range(30):
        file = tmp_path / "samples.jsonl"
        file.write_text("".join(lines))
        assert truncate_after(file, step) == 29 - step
        assert file.read_text() == "".join(lines[:step])


def test_lines_are_readable_at_once_and_hold_no_nan(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "metrics.jsonl")
    log.write(1, {"train/loss": float("nan"), "train/lr": 0.1})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "train/loss": None, "train/lr": 0.1}
    log.close()


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H20", 148),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD EPYC", None),
    ],
)
def test_peak(name: str, tflops: float | None) -> None:
    peak = peak_flops(name)
    assert peak == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_offline_files_hold_metrics_pictures_and_tables_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    monkeypatch.setenv("HF_TOKEN", "hf_never_to_be_written")
    run_dir = tmp_path / "run-a"
    run_dir.mkdir()
    grid = run_dir / "grid.png"
    Image.new("RGB", (48, 32), "red").save(grid)
    config = LoggerConfig(wandb="offline", project="test")
    log = RunLog(config, run_dir, samples=True, wandb_id="of-an-online-attempt", values={"optim.lr": 1e-3}, say=print)
    log.metrics(1, {"train/loss": 2.0, "eval/bucket/64x32": 0.5, "norms/grad/all": 3.0})
    log.metrics(1, {"train/loss": 2.0})  # a resumed run repeats a step
    log.metrics(7, {"train/loss": 1.0} | {f"train/metric_{n}": n / 7 for n in range(2000)})  # longer than a block
    log.picture(7, "samples", grid)
    log.table(7, "worst_held_out", ("key", "loss"), [["row-a", 1.5], ["row-b", float("nan")]])
    log.prompts(7, "samples_by_prompt", ["a red circle"], [Image.new("RGB", (8, 8), "red")])
    log.samples(1, "64x64", ["a", "b"])
    assert log.wandb_id == "of-an-online-attempt"  # which a later one goes on with; this one cannot be continued
    assert [one for one in psutil.Process().children() if "wandb" in one.name()]
    log.close()
    assert [one for one in psutil.Process().children() if "wandb" in one.name()] == []
    assert json.loads((run_dir / "samples.jsonl").read_text()) == {"step": 1, "bucket": "64x64", "keys": ["a", "b"]}
    assert json.loads((run_dir / "tables.jsonl").read_text()) == {
        "step": 7,
        "table": "worst_held_out",
        "rows": [{"key": "row-a", "loss": 1.5}, {"key": "row-b", "loss": None}],
    }

    (file,) = offline_files(run_dir)
    found = finished(file)
    assert (found.run.project, found.run.run_group) == ("test", "run-a")
    assert {key: value for key, value in found.config.items() if key != "_wandb"} == {"optim.lr": "0.001"}
    assert [line["train/global_step"] for line in found.history] == [1, 1, 7, 7, 7, 7]
    assert found.history[0]["eval/bucket/64x32"] == 0.5
    assert found.history[2]["train/metric_1999"] == pytest.approx(1999 / 7)
    kinds = ("train/*", "eval/*", "norms/*", "reward/*")
    assert {name: found.metrics[name] for name in kinds} == dict.fromkeys(kinds, "train/global_step")
    picture, table = found.history[3], found.history[4]
    assert (picture["eval/samples/width"], picture["eval/samples/height"]) == (48, 32)
    assert (file.parent / "files" / picture["eval/samples/path"]).read_bytes() == grid.read_bytes()
    written = json.loads((file.parent / "files" / table["eval/worst_held_out/path"]).read_text())
    assert written["columns"] == ["key", "loss"]
    assert written["data"] == [["row-a", 1.5], ["row-b", None]]
    by_prompt = found.history[5]["eval/samples_by_prompt/path"]
    # The pictures themselves travel in an artifact of W&B's own; here stands what kind of value each cell has.
    assert json.loads((file.parent / "files" / by_prompt).read_text())["data"] == [["a red circle", "Image"]]
    assert {picture["eval/samples/path"], table["eval/worst_held_out/path"]} <= found.files
    for path in (run_dir / "wandb").rglob("*"):
        if path.is_file():
            assert not any(secret in path.read_bytes() for secret in (b"0123456789abcdef0123", b"hf_never")), path


def test_offline_attempts_of_a_run_share_a_group(tmp_path: Path) -> None:
    for step in (1, 2):
        log = RunLog(
            LoggerConfig(wandb="offline", project="t"), tmp_path, samples=False, wandb_id=None, values={}, say=print
        )
        log.metrics(step, {"train/loss": 1.0})
        log.close()
    found = [finished(file) for file in offline_files(tmp_path)]
    assert len({one.run.run_id for one in found}) == 2
    assert {one.run.run_group for one in found} == {tmp_path.name}


@pytest.mark.parametrize(("known", "resume"), [(None, None), ("abc", "must")])
def test_online_continues_the_run_of_the_checkpoint_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: str | None, resume: str | None
) -> None:
    """What W&B's server is asked for; there is none here."""
    import wandb

    asked: dict[str, Any] = {}
    logged: list[dict[str, Any]] = []

    class Run:
        id = known or "new"

        def define_metric(self, *_: str, **__: str) -> None: ...

        def log(self, values: dict[str, Any], **step: Any) -> None:
            assert not step  # W&B drops what is logged at an earlier step of its own
            logged.append(values)

        def finish(self) -> None: ...

    def init(**given: Any) -> Run:
        asked.update(given)
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    log = RunLog(LoggerConfig(wandb="online", group="g"), tmp_path, samples=False, wandb_id=known, values={}, say=print)
    log.metrics(5, {"train/loss": 1.0})
    assert (asked["id"], asked["resume"], asked["group"], asked["mode"]) == (known, resume, "g", "online")
    assert log.wandb_id == (known or "new")
    assert logged == [{"train/loss": 1.0, "train/global_step": 5}]
    monkeypatch.setattr(Run, "log", None)  # the server fails: the next attempt goes on with the same run
    log.metrics(6, {"train/loss": 1.0})
    log.metrics(7, {"train/loss": 1.0})
    assert log.wandb_id == (known or "new")


def test_a_failing_tracker_does_not_fail_the_run_and_is_said_where_it_is_heard(tmp_path: Path) -> None:
    said: list[str] = []
    config = LoggerConfig(wandb="offline", project="test")
    log = RunLog(config, tmp_path, samples=False, wandb_id=None, values={}, say=said.append)
    assert log._wandb is not None
    log._wandb.close()
    log._wandb._run = None  # type: ignore[assignment]
    log.metrics(1, {"train/loss": 1.0})
    log.metrics(2, {"train/loss": 1.0})
    log.close()
    assert [line.split(" (")[0] for line in said] == ["warning: W&B failed and is off from here on"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_run_that_was_tracked_goes_on_without_a_tracker_that_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def unreachable(**_: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(wandb, "init", unreachable)
    said: list[str] = []
    config = LoggerConfig(wandb="online", project="test")
    log = RunLog(config, tmp_path, samples=False, wandb_id="known", values={}, say=said.append)
    assert said == ["warning: W&B does not start (ConnectionError: no route); the run goes on without it"]
    assert log.wandb_id == "known"
    with pytest.raises(ValueError, match="logger=offline"):
        RunLog(config, tmp_path, samples=False, wandb_id=None, values={}, say=said.append)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_remembered_for_the_trainer_and_nothing_is_written_after_it(tmp_path: Path) -> None:
    (tmp_path / "tables.jsonl").symlink_to("/dev/full")
    log = RunLog(LoggerConfig(), tmp_path, samples=True, wandb_id=None, values={}, say=print)
    log.metrics(1, {"train/loss": 1.0})
    assert log.problem == ""
    log.table(2, "worst_held_out", ("key",), [["a"]])
    assert log.problem == f"{tmp_path / 'tables.jsonl'}: No space left on device"
    log.metrics(3, {"train/loss": 1.0})
    log.sync()
    log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1]
