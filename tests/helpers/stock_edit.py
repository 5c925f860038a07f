"""Stock edit pipelines on the tiny twin, and pictures for them.

Stock diffusers (up to 0.42) forgets to hand `mm_token_type_ids` to the text encoder, see `edit_encoder.py`; here it is
handed on, as releases of transformers did by themselves when the models were trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from PIL import Image
from transformers import Qwen2Tokenizer, Qwen2VLImageProcessorPil, Qwen2VLProcessor

from qwenimg_dist.models.edit_encoder import Template

STOCK = {"single": QwenImageEditPipeline, "plus": QwenImageEditPlusPipeline}
SIZES = {"wide": (112, 70), "tall": (60, 150), "square": (84, 84)}


class StillProcessor(Qwen2VLProcessor):  # type: ignore[misc]  # its package tells no types
    """The stock processor without its part for videos, which needs torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


def picture(name: str) -> Image.Image:
    rng = np.random.default_rng(sum(SIZES[name]))
    coarse = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
    return coarse.resize(SIZES[name], Image.Resampling.BICUBIC)


def stock_pipeline(stock: Any, template: Template, *, hands_types_on: bool = True) -> Any:
    tokenizer = stock.tokenizer
    processor = StillProcessor(image_processor=Qwen2VLImageProcessorPil(), tokenizer=tokenizer)
    pipeline = STOCK[template](
        scheduler=stock.scheduler,
        vae=stock.vae,
        text_encoder=stock.text_encoder,
        tokenizer=tokenizer,
        processor=processor,
        transformer=None,
    )
    if hands_types_on:
        hand_types_on(pipeline, stock.text_encoder)
    return pipeline


def load_stock(folder: Path, template: Template) -> Any:
    """The stock pipeline of an export, which loads every part but its processor, for the reason above."""
    tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
    images = Qwen2VLImageProcessorPil.from_pretrained(folder / "processor")
    pipeline = STOCK[template].from_pretrained(
        folder, processor=StillProcessor(image_processor=images, tokenizer=tokenizer)
    )
    hand_types_on(pipeline, pipeline.text_encoder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def first_call(transformer: Any) -> Iterator[dict[str, Any]]:
    """What a transformer is first asked within, and its `answer`."""
    kept: dict[str, Any] = {}

    def keep(module: Any, args: Any, given: dict[str, Any], output: Any) -> None:
        if not kept:
            kept.update(given, answer=output[0])

    handle = transformer.register_forward_hook(keep, with_kwargs=True)
    try:
        yield kept
    finally:
        handle.remove()


def hand_types_on(pipeline: Any, text_encoder: Any) -> None:
    """Let a stock edit pipeline tell its text encoder which tokens are a picture's."""
    image_id = text_encoder.config.image_token_id

    class Encoder:
        dtype = text_encoder.dtype
        device = text_encoder.device

        def __call__(self, input_ids: torch.Tensor, **given: Any) -> Any:
            types = (input_ids == image_id).int()
            return text_encoder(input_ids=input_ids, mm_token_type_ids=types, **given)

    object.__setattr__(pipeline, "text_encoder", Encoder())


def stock_features(pipeline: Any, text: str, images: Sequence[Image.Image], template: Template) -> torch.Tensor:
    with torch.no_grad():
        features, mask = pipeline._get_qwen_prompt_embeds(
            [text], list(images) if template == "plus" else images[0], "cpu"
        )
    assert mask.bool().all()
    first: torch.Tensor = features[0]
    return first
