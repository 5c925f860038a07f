"""Preference pairs and edits as a user makes data sets of them: real `produce`, real Ray, the tiny pipeline."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from photo_folder import photo
from produce_command import produce
from producer_world import rows_of
from safetensors.torch import load as load_safetensors

from qwenimg_dist.commands.main import main
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.schema import ROWS, edit_caption_key

RESOLUTIONS = "encode.resolutions=[64]"


def png(number: int) -> bytes:
    sink = io.BytesIO()
    photo(number, 150, 110).save(sink, "PNG")
    return sink.getvalue()


def samples(dataset: Dataset, prefix: str) -> dict[str, Any]:
    """All samples of a facet through stock webdataset, by key."""
    tars = [str(file) for file in sorted(dataset.root.glob(f"{prefix}*/*.tar"))]
    return {one["__key__"]: one for one in webdataset.WebDataset(tars, shardshuffle=False)}


@pytest.mark.slow
def test_pairs_of_a_parquet_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = pa.table(
        {
            "caption": [f"prompt {number}" for number in range(5)],
            "jpg_0": [png(number) for number in range(5)],
            "jpg_1": [png(number + 10) for number in range(4)] + [b"no picture"],
            "label_0": [1.0, 0.0, 0.5, 1.0, 0.0],
            "label_1": [0.0, 1.0, 0.5, 0.0, 1.0],
        }
    )
    (tmp_path / "source").mkdir()
    pq.write_table(table, tmp_path / "source" / "train-00000.parquet", row_group_size=2)
    words = ["source=pairs", f"source.path={tmp_path / 'source'}", f"data.path={tmp_path / 'data'}", RESOLUTIONS]
    done = produce(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dropped 1 ties" in done.stdout
    dataset = Dataset.open(tmp_path / "data")
    decided = rows_of(dataset, ROWS)
    assert [entry["reason"] or entry["status"] for entry in decided.values()] == ["kept"] * 3 + ["not_an_image"]
    assert decided[3]["detail"].startswith("chosen: ")
    found = samples(dataset, "latents-64-")
    assert found.keys() == {entry["key"] for entry in decided.values() if entry["status"] == "kept"}
    for sample in found.values():
        tensors = load_safetensors(sample["safetensors"])
        assert tensors["mean"].shape == tensors["rejected"].shape
        assert not tensors["mean"].equal(tensors["rejected"])
    assert main(["data", "verify", f"data.path={tmp_path / 'data'}"]) == 0
    again = produce(*words)
    assert "nothing to do" in again.stdout
    other = produce(f"source.path={tmp_path / 'source'}", f"data.path={tmp_path / 'data'}", "source=manifest")
    assert other.returncode == 2
    photo(0, 100, 100).save(tmp_path / "source" / "a.png")
    (tmp_path / "source" / "a.txt").write_text("an image")
    mixed = produce(f"source.path={tmp_path / 'source'}", f"data.path={tmp_path / 'data'}", RESOLUTIONS)
    assert mixed.returncode == 2
    assert "holds rows of kind preference, this source gives image: choose another data.path" in mixed.stderr


@pytest.mark.slow
def test_edits_of_a_jsonl_table(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number, size in enumerate([(150, 110), (90, 140), (100, 100), (120, 80)]):
        photo(number, *size).save(source / f"{number}.png")
    rows = [
        {"source": "0.png", "instruction": "make it red", "target": "1.png"},
        {"source": ["2.png", "3.png"], "instruction": ["join", "put together"], "target": "0.png"},
        {"source": "gone.png", "instruction": "x", "target": "2.png"},
    ]
    (source / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = produce(
        "source=edits", f"source.path={source / 'edits.jsonl'}", f"data.path={tmp_path / 'data'}", RESOLUTIONS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    dataset = Dataset.open(tmp_path / "data")
    decided = rows_of(dataset, ROWS)
    assert [entry["reason"] or entry["status"] for entry in decided.values()] == ["kept", "kept", "missing_file"]
    assert decided[2]["detail"].startswith("condition_0: ")
    latents, texts = samples(dataset, "latents-64-"), samples(dataset, "text-")
    for row, num_pictures in ((0, 1), (1, 2)):
        sample = latents[decided[row]["key"]]
        tensors = load_safetensors(sample["safetensors"])
        assert sorted(tensors) == [*(f"condition_{index}" for index in range(num_pictures)), "mean"]
        info = json.loads(sample["json"])
        named = rows[row]["source"] if num_pictures > 1 else [rows[row]["source"]]
        assert [one["uri"] for one in info["further"].values()] == named
    assert sum(key.startswith("e") for key in texts) == 2 + 3
    first = next(json.loads(one["json"]) for key, one in texts.items() if json.loads(one["json"])["caption"] == "join")
    assert edit_caption_key("join", first["pictures"]) in texts
    assert main(["data", "verify", f"data.path={tmp_path / 'data'}"]) == 0
