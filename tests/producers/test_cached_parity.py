"""What lies in a data set's tars is what the stock classes compute for the same captions and the same pixels.

The whole unit pipeline writes it (listing, scan, decode, resize, batches, shards), only Ray is left out; the reference
shares nothing with it but the weights, Pillow, and the crop that the sample itself names.
"""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from producer_world import draw, load_config_once, make_plan_for, produce_here
from safetensors.torch import load as load_safetensors

from producers.encode import PipelineEncoders
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.models.tiny import tiny_pipeline_dir

PICTURES = {
    "a.png": ((96, 96), "a"),
    "b.png": ((80, 80), "a red circle on a blue background, and beside it two yellow squares of unequal size"),
    "c.png": ((150, 100), "line one\nline two 图像"),
    "d.png": ((96, 64), "far beyond the cut of 512 tokens " * 100),
}
"""Two aspect ratios, one shrunk by a fraction, one not resized; captions of 6 to 512 features."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    info: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def read_tars(dataset: Dataset, kind: str) -> list[Sample]:
    """All samples of the facet of this kind, by nothing but tar, JSON and safetensors."""
    facet = next(name for name in dataset.facets() if name.startswith(kind))
    members: dict[str, dict[str, bytes]] = {}
    for file in sorted((dataset.root / facet).glob("*.tar")):
        with tarfile.open(file) as tar:
            for member in tar:
                key, _, kind_of_file = member.name.partition(".")
                content = tar.extractfile(member)
                assert content is not None
                members.setdefault(key, {})[kind_of_file] = content.read()
    return [
        Sample(info=json.loads(files["json"]), tensors=load_safetensors(files["safetensors"]))
        for files in members.values()
    ]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Path, torch.dtype]:
    root = tmp_path_factory.mktemp("parity")
    for number, (name, (size, caption)) in enumerate(PICTURES.items()):
        draw(root / "source" / name, number, size, caption.strip())
    words = (
        f"encode.dtype={request.param}",
        "encode.compute_dtype=float32",
        "encode.posterior=mean_logvar",
        "filters.caption_length.enabled=false",  # one caption is long enough to be cut
        "filters.caption_validity.enabled=false",  # and repeats itself to be so
    )
    config = load_config_once(words)
    assert len(PICTURES) * (512 + 34) <= config.encode.text_batch_tokens, "the captions are to share a batch"
    dataset = Dataset.create(root / "data", 8)
    encoders = PipelineEncoders.load(tiny_pipeline_dir(), config)
    (report,) = produce_here(root / "source", dataset, make_plan_for(*words), encoders, *words)
    assert (report.num_kept, report.latents, report.captions) == (4, 4, 5)
    return dataset, root / "source", getattr(torch, request.param)


def assert_stored(stored: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """fp32: 2e-5 on values of order 1 (another order of batches and sums). bf16: rounded to nearest besides, 2^-8."""
    assert stored.dtype == dtype
    assert stored.shape == expected.shape
    rtol = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(stored.float(), expected, atol=2e-5, rtol=rtol)


@torch.no_grad()
def test_text_features_are_the_stock_pipeline_s(made: tuple[Dataset, Path, torch.dtype]) -> None:
    dataset, _, dtype = made
    samples = read_tars(dataset, "text-")
    captions = [sample.info["caption"] for sample in samples]
    assert sorted(captions) == sorted(["", *(caption.strip() for _, caption in PICTURES.values())])
    pipeline = QwenImagePipeline.from_pretrained(tiny_pipeline_dir(), vae=None, transformer=None)
    text, mask = pipeline.encode_prompt(captions, max_sequence_length=512)
    assert mask is not None
    lengths = set()
    for sample, row, valid in zip(samples, text, mask, strict=True):
        features = sample.tensors["features"]
        assert sample.info["num_tokens"] == len(features)
        assert_stored(features, row[valid.bool()], dtype)
        lengths.add(len(features))
    assert (min(lengths), max(lengths)) == (5, 512)
    assert len(lengths) == 5


@torch.no_grad()
def test_latents_are_the_stock_vae_s(made: tuple[Dataset, Path, torch.dtype]) -> None:
    dataset, source, dtype = made
    samples = read_tars(dataset, "latents-64-")
    vae = AutoencoderKLQwenImage.from_pretrained(tiny_pipeline_dir() / "vae").eval()
    mean, std = (torch.tensor(v).view(16, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    buckets = []
    for sample in samples:
        (height, width), (top, left) = sample.info["bucket"], sample.info["crop"]
        with Image.open(source / sample.info["uri"]) as opened:
            resized = opened.resize(sample.info["resized"][::-1], Image.Resampling.LANCZOS)
        pixels = VaeImageProcessor().preprocess(resized.crop((left, top, left + width, top + height)))
        posterior = vae.encode(pixels[:, :, None]).latent_dist
        assert_stored(sample.tensors["mean"], (posterior.mode()[0, :, 0] - mean) / std, dtype)
        assert_stored(sample.tensors["logvar"], posterior.logvar[0, :, 0] - 2 * std.log(), dtype)
        buckets.append((height, width))
    assert len(buckets) == 4
    assert len(set(buckets)) == 2
