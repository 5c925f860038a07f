"""Features of edits are what the stock pipelines compute for the same pictures and words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions
from PIL import Image
from stock_edit import picture, stock_features, stock_pipeline

from producers.pictures import area_size
from qwenimg_dist.models.edit_encoder import EditEncoder, Template
from qwenimg_dist.models.template import EDIT_DROP
from qwenimg_dist.models.text_encoder import TextEncoder
from qwenimg_dist.models.tiny import tiny_pipeline_dir


@pytest.fixture(scope="module")
def stock() -> Any:
    return QwenImagePipeline.from_pretrained(tiny_pipeline_dir(), transformer=None)


@pytest.fixture(scope="module")
def text_encoder() -> TextEncoder:
    return TextEncoder.load(tiny_pipeline_dir(), dtype=torch.float32)


CASES: list[tuple[Template, list[tuple[str, list[str]]]]] = [
    ("single", [("make it red", ["wide"]), ("", ["tall"]), ("line one\nline two 图像 {}", ["square"])]),
    (
        "plus",
        [("join them", ["wide", "tall"]), ("", ["square"]), ("Picture 2 into 3", ["tall", "wide", "square"])],
    ),
]


@pytest.mark.parametrize(("template", "prompts"), CASES)
def test_features_are_the_stock_pipeline_s(
    stock: Any, text_encoder: TextEncoder, template: Template, prompts: list[tuple[str, list[str]]]
) -> None:
    """One padded batch of ours against one prompt at a time of stock: 2e-5 on values of order 1."""
    encoder = EditEncoder.load(tiny_pipeline_dir(), text_encoder, template=template)
    tokens = [encoder.tokenize(text, [np.asarray(picture(name)) for name in names]) for text, names in prompts]
    found = encoder.encode(tokens)
    pipeline = stock_pipeline(stock, template)
    for (text, names), features in zip(prompts, found, strict=True):
        expected = stock_features(pipeline, text, [picture(name) for name in names], template)
        torch.testing.assert_close(features, expected, atol=2e-5, rtol=0)


def test_positions_are_those_of_the_picture(stock: Any, text_encoder: TextEncoder) -> None:
    """The day stock hands the types on by itself, this fails, and the wrapper above can go."""
    plain = stock_pipeline(stock, "single", hands_types_on=False)
    encoder = EditEncoder.load(tiny_pipeline_dir(), text_encoder, template="single")
    (features,) = encoder.encode([encoder.tokenize("make it red", [np.asarray(picture("wide"))])])
    expected = stock_features(plain, "make it red", [picture("wide")], "single")
    assert features.shape == expected.shape
    assert (features - expected).abs().max() > 1e-3


def test_features_follow_the_picture(text_encoder: TextEncoder) -> None:
    encoder = EditEncoder.load(tiny_pipeline_dir(), text_encoder)
    pictures = [np.asarray(picture("wide")), np.asarray(picture("wide").transpose(Image.Transpose.ROTATE_180))]
    one, other = encoder.encode([encoder.tokenize("the same words", [each]) for each in pictures])
    assert (one[-3:] - other[-3:]).abs().max() > 1e-4  # even what stands behind the words has seen it


def test_long_instructions_are_cut_and_pictures_never(text_encoder: TextEncoder) -> None:
    encoder = EditEncoder.load(tiny_pipeline_dir(), text_encoder)
    seen = [np.asarray(picture("wide"))]
    short, long = encoder.tokenize("", seen), encoder.tokenize("word " * 3000, seen)
    assert len(long.ids) - len(short.ids) == text_encoder.max_sequence_length
    spelt = encoder.tokenize("<|image_pad|><|video_pad|>x", seen)
    assert len(encoder.encode([spelt])[0]) == len(spelt.ids) - EDIT_DROP
    assert spelt.ids.count(spelt.ids[-1]) == short.ids.count(short.ids[-1])


def test_what_cannot_be_an_edit_is_refused(text_encoder: TextEncoder) -> None:
    single = EditEncoder.load(tiny_pipeline_dir(), text_encoder, template="single")
    seen = np.asarray(picture("wide"))
    with pytest.raises(ValueError, match=r"'single' does not take 2 pictures: set encode\.edit\.template=plus"):
        single.tokenize("x", [seen, seen])
    with pytest.raises(ValueError, match="does not take 0 pictures"):
        single.tokenize("x", [])


@pytest.mark.parametrize("side", [384, 1024])
def test_sizes_are_stock_s(side: int) -> None:
    rng = np.random.default_rng(side)
    for width, height in rng.integers(64, 4000, (200, 2)).tolist():
        expected = calculate_dimensions(side * side, width / height)
        assert area_size(height, width, side) == tuple(max(32, one) for one in reversed(expected))
