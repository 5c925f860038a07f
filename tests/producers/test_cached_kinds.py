"""What lies in the tars of pairs and edits is what the stock classes compute for the same pictures and words.

The real encoders through the whole unit pipeline; only Ray is left out. Beside them stand stock's own VAE, edit
pipelines and image processor, on the files of the source.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions
from PIL import Image
from producer_world import draw, load_config_once, make_plan_for, produce_here, rows_of
from safetensors.torch import load_file
from stock_edit import stock_features, stock_pipeline

from producers.encode import PipelineEncoders
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.models.edit_encoder import Template
from qwenimg_dist.models.tiny import tiny_pipeline_dir
from qwenimg_dist.schema import ROWS, SCAN, edit_caption_key

SIZES = {0: (96, 96), 1: (150, 100), 2: (90, 140), 3: (120, 100)}
WORDS = ("encode.dtype=float32", "encode.compute_dtype=float32")


@pytest.fixture(scope="module")
def stock() -> Any:
    return QwenImagePipeline.from_pretrained(tiny_pipeline_dir(), transformer=None)


def make(root: Path, source: str, lines: list[dict[str, Any]], *words: str) -> Dataset:
    for number, size in SIZES.items():
        draw(root / "source" / f"{number}.png", number, size)
    table = root / "source" / "table.jsonl"
    table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    dataset = Dataset.create(root / "data", 8)
    words = (*WORDS, *words)
    encoders = PipelineEncoders.load(tiny_pipeline_dir(), load_config_once(words))
    produce_here(table, dataset, make_plan_for(*words), encoders, f"source={source}", *words)
    assert {entry["status"] for entry in rows_of(dataset, ROWS).values()} == {"kept"}
    return dataset


def tensors(dataset: Dataset, kind: str, key: str, folder: Path) -> dict[str, torch.Tensor]:
    """A sample of the facet of this kind, by nothing but tar and safetensors."""
    for file in sorted(dataset.root.glob(f"{kind}*/*.tar")):
        with tarfile.open(file) as tar:
            if f"{key}.safetensors" in tar.getnames():
                tar.extract(f"{key}.safetensors", folder, filter="data")
                return load_file(folder / f"{key}.safetensors")
    raise KeyError(key)


def latents(pipeline: Any, image: Image.Image) -> torch.Tensor:
    """Stock's own normalised latents of a whole picture."""
    pixels = pipeline.image_processor.preprocess(image, image.height, image.width).unsqueeze(2)
    with torch.no_grad():
        encoded: torch.Tensor = pipeline._encode_vae_image(image=pixels, generator=None)
    return encoded[0, :, 0]


def close(stored: torch.Tensor, expected: torch.Tensor) -> None:
    """Another order of batches and sums: 2e-5 on values of order 1."""
    torch.testing.assert_close(stored, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("template", ["plus", "single"])
def test_edits(stock: Any, tmp_path: Path, template: Template) -> None:
    several = template == "plus"
    lines = [
        {"source": "1.png", "instruction": ["make it red", "red, please"], "target": "0.png"},
        {"source": ["1.png", "2.png"] if several else "2.png", "instruction": "join them", "target": "3.png"},
    ]
    dataset = make(tmp_path, "edits", lines, f"encode.edit.template={template}", "encode.edit.vision_side=96")
    pipeline = stock_pipeline(stock, template)
    scans = rows_of(dataset, SCAN)
    for row, line in enumerate(lines):
        named = line["source"] if isinstance(line["source"], list) else [line["source"]]
        images = [Image.open(tmp_path / "source" / name).convert("RGB") for name in named]

        def sized(image: Image.Image, side: int) -> Image.Image:
            width, height = calculate_dimensions(side * side, image.width / image.height)
            resized: Image.Image = pipeline.image_processor.resize(image, height, width)
            return resized

        for text in ("", *([line["instruction"]] if isinstance(line["instruction"], str) else line["instruction"])):
            key = edit_caption_key(text, [one["sha256"] for one in scans[row]["others"]])
            expected = stock_features(pipeline, text, [sized(image, 96) for image in images], template)
            close(tensors(dataset, "text-", key, tmp_path)["features"], expected)
        sample = tensors(dataset, "latents-64-", rows_of(dataset, ROWS)[row]["key"], tmp_path)
        assert sorted(sample) == sorted(["mean", *(f"condition_{index}" for index in range(len(images)))])
        for index, image in enumerate(images):
            close(sample[f"condition_{index}"], latents(pipeline, sized(image, 64)))


def test_pairs(stock: Any, tmp_path: Path) -> None:
    lines = [
        {"prompt": "a", "chosen": "1.png", "rejected": "0.png"},
        {"prompt": "b", "chosen": "0.png", "rejected": "2.png"},
    ]
    dataset = make(tmp_path, "pairs", lines, "encode.posterior=mean_logvar")
    pipeline = stock_pipeline(stock, "plus")
    facet = next(name for name in dataset.facets() if name.startswith("latents-64-"))
    for row, line in enumerate(lines):
        sample = tensors(dataset, "latents-64-", rows_of(dataset, ROWS)[row]["key"], tmp_path)
        assert sorted(sample) == ["logvar", "mean", "rejected", "rejected_logvar"]
        entry = rows_of(dataset, facet)[row]
        height, width = entry["bucket_height"], entry["bucket_width"]
        for name, role in (("mean", "chosen"), ("rejected", "rejected")):
            with Image.open(tmp_path / "source" / line[role]) as opened:
                scale = max(height / opened.height, width / opened.width)
                size = (max(width, round(opened.width * scale)), max(height, round(opened.height * scale)))
                resized = opened.convert("RGB").resize(size, Image.Resampling.LANCZOS)
            left, top = (size[0] - width) // 2, (size[1] - height) // 2
            close(sample[name], latents(pipeline, resized.crop((left, top, left + width, top + height))))


def test_the_vision_tower_is_loaded_for_edits_alone(tmp_path: Path) -> None:
    encoders = PipelineEncoders.load(tiny_pipeline_dir(), load_config_once(WORDS))
    list(encoders.text(["words"]))
    assert encoders._edit_encoder is None
    assert not any("visual" in name for name, _ in encoders._text_encoder.model.named_parameters())
