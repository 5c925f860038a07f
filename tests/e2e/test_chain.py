"""The whole chain as a user runs it, with few steps: folder -> shards -> two ranks -> export -> grids -> report."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow.compute as pc
import pytest
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from PIL import Image
from wandb_file import finished, offline_files

from consumers.checkpoint_reader import open_checkpoint
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.models.transformer import build_transformer, load_transformer_config, predict_velocity
from qwenimg_dist.schema import ROWS

STEPS = 6
SMALL = (
    "demo.num_images=60",
    "curriculum.phases.low.steps=4",
    "curriculum.phases.high.steps=2",
    f"train.steps={STEPS}",
    "train.log_samples=true",
    "train.log_every=1",
    "checkpoint.every=2",
    "evaluate.every=3",
    "evaluate.grid_every=3",
    "evaluate.num_steps=2",
    "evaluate.weights=both",
    "logger=offline",
    "sample.num_steps=2",
)


def qwenimg(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "qwenimg_dist", *args]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=1180)


pytestmark = pytest.mark.timeout(1200)  # the whole chain takes two minutes, on a busy machine five times that


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("chain")
    done = qwenimg("demo", *SMALL, cwd=home)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return home / "demo"


def lines(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_file_of_the_folder_is_a_row_with_a_decision(demo: Path) -> None:
    dataset = Dataset.open(demo / "data")
    rows = dataset.read_unit(ROWS, 0)
    assert rows is not None
    files = [file for file in (demo / "pictures").iterdir() if file.name != "metadata.jsonl"]
    assert rows.num_rows == len(files)
    status = dict(zip(*(column.to_pylist() for column in pc.value_counts(rows["status"]).flatten())))
    assert status["kept"] == 60  # one of them stored sideways
    reasons = set(rows.filter(pc.not_equal(rows["status"], "kept"))["reason"].to_pylist())
    assert reasons == {"duplicate", "file_too_small", "empty_file", "truncated", "not_an_image"}


def test_stock_webdataset_reads_every_tar(demo: Path) -> None:
    tars = sorted(str(file) for file in (demo / "data").rglob("*.tar"))
    assert len(tars) >= 3
    program = (
        "import sys, webdataset, safetensors.torch as st\n"
        "for tar in sys.argv[1:]:\n"
        "    for sample in webdataset.WebDataset(tar, shardshuffle=False):\n"
        "        assert st.load(sample['safetensors']) and sample['json'], tar\n"
        "        print(tar, sample['__key__'])\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('qwenimg_dist', 'producers')]\n"
    )
    read = subprocess.run([sys.executable, "-c", program, *tars], capture_output=True, text=True, timeout=120)
    assert read.returncode == 0, read.stderr
    dataset = Dataset.open(demo / "data")
    committed = sum(
        dataset.read(part).num_rows
        for facet in dataset.facets()
        if facet.startswith(("text-", "latents-"))
        for part in dataset.parts(facet)
    )
    assert len(read.stdout.splitlines()) == committed


def test_the_logs_name_every_step_once_and_every_key_is_a_kept_row(demo: Path) -> None:
    samples = lines(demo / "run" / "samples.jsonl")
    assert [entry["step"] for entry in samples] == list(range(1, STEPS + 1))
    rows = Dataset.open(demo / "data").read_unit(ROWS, 0)
    assert rows is not None
    kept = set(rows.filter(pc.equal(rows["status"], "kept"))["key"].to_pylist())
    for entry in samples:
        keys = entry["keys"]
        assert isinstance(keys, Sequence)
        assert set(keys) <= kept
    steps = [entry["step"] for entry in lines(demo / "run" / "metrics.jsonl") if "train/loss" in entry]
    assert steps == sorted(set(steps))


def test_the_export_loads_in_the_stock_pipeline_with_the_checkpoint_s_velocity(demo: Path) -> None:
    pipeline = QwenImagePipeline.from_pretrained(demo / "pipeline")
    exported = pipeline.transformer
    assert isinstance(exported, QwenImageTransformer2DModel)
    reader = open_checkpoint(demo / "run")
    assert reader.step == STEPS
    trained = build_transformer(load_transformer_config(demo / "pipeline" / "transformer"))
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            parameter.copy_(reader.read(name, "ema"))
        generator = torch.Generator().manual_seed(0)
        noisy = torch.randn(2, 16, 8, 12, generator=generator)
        text = torch.randn(2, 7, trained.config.joint_attention_dim, generator=generator)
        sigma = torch.tensor([0.2, 0.9])
        ours = predict_velocity(trained.eval(), noisy, sigma, text, None)
        theirs = predict_velocity(exported.eval(), noisy, sigma, text, None)
    assert torch.equal(ours, theirs)
    assert float(ours.abs().max()) > 0


def test_the_export_has_its_checkpoint_s_certificate(demo: Path) -> None:
    checkpoint = open_checkpoint(demo / "run").path
    exported = demo / "pipeline" / "certificate.json"
    assert exported.read_bytes() == (checkpoint / "certificate.json").read_bytes()
    assert json.loads(exported.read_text())["step"] == STEPS
    assert json.loads((demo / "pipeline-64px" / "certificate.json").read_text())["step"] == 4


def test_grids_of_ema_and_raw_weights_and_what_wandb_got(demo: Path) -> None:
    grids = {file.name: file.read_bytes() for file in (demo / "run" / "samples").glob("*.png")}
    assert sorted(grids) == ["step-00000000.png"] + [
        f"step-{step:08d}{which}.png" for step in (3, 6) for which in ("-raw", "")
    ]
    assert grids["step-00000006.png"] != grids["step-00000006-raw.png"]
    with Image.open(io.BytesIO(grids["step-00000006-raw.png"])) as grid:
        assert max(grid.size) > 4 * 96
    (file,) = offline_files(demo / "run")
    found = finished(file)
    assert found.run.run_group == "run"
    pictures = [(line["train/global_step"], name) for line in found.history for name in line if name.endswith("/path")]
    every = ("samples", "samples_by_prompt", "samples-raw", "samples-raw_by_prompt", "worst_held_out")
    assert [one for one in pictures if one[1].startswith("eval/")] == [
        *((0, f"eval/{name}/path") for name in ("samples", "samples_by_prompt")),
        *((step, f"eval/{name}/path") for step in (3, 6) for name in every),
    ]
    assert [one for one in pictures if one[1].startswith("train/")] == [(at, "train/ranks/path") for at in (2, 4, 6)]
    logged = {line["train/global_step"]: line for line in found.history if "train/loss" in line}
    assert sorted(logged) == list(range(1, STEPS + 1))
    for line in lines(demo / "run" / "metrics.jsonl"):
        assert logged[line["step"]]["train/loss"] == line["train/loss"]
    assert {"eval/loss_64", "eval/loss_128", "eval/start_loss_128", "eval/raw/loss_64"} <= logged[3].keys()
    assert not [value for value in found.config.values() if str(demo) in value]  # no path, no name of this machine


def test_the_report_is_one_file_with_grids_and_commands(demo: Path) -> None:
    page = (demo / "report.html").read_text()
    assert page.count("data:image/") >= 5
    assert "http://" not in page.replace("http://www.w3.org", "")
    for word in ("qwenimg-dist produce", "qwenimg-dist train", "ckpt export", "duplicate"):
        assert word in page


def test_a_second_demo_repeats_nothing(demo: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in demo.rglob("*.tar")}
    log = (demo / "run" / "samples.jsonl").read_bytes()
    again = qwenimg("demo", *SMALL, cwd=demo.parent)
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-2000:]
    assert {file: file.stat().st_mtime_ns for file in demo.rglob("*.tar")} == before
    assert (demo / "run" / "samples.jsonl").read_bytes() == log
    assert "done before" in again.stdout
