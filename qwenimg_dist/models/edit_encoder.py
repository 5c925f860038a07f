"""Instructions with their pictures to text features, as stock `QwenImageEditPipeline` and `QwenImageEditPlusPipeline`
compute them, but unpadded.

Place in the flow: producers make one beside their `TextEncoder` at the first edit; the language tower is shared, only
the vision tower (0.7 of 8.3 B parameters) is loaded besides. Pictures come in at the size that they are to be seen at;
the processor then rounds their sides to its patches.

Positions are Qwen2.5-VL's own, in three dimensions over a picture, which the released models were trained with. Stock
diffusers (up to 0.42) does not hand `mm_token_type_ids` on, without which transformers 5 silently counts a picture's
tokens like words (diffusers issue 14194): compare with a pipeline that hands them on.

Refuses: several pictures under the template for one, a tokenizer under which the template's prefix is not 64 tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2VLImageProcessorPil
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLModel,
)

from qwenimg_dist.models.safetensors_directory import SafetensorsDirectory, WeightsError
from qwenimg_dist.models.template import EDIT_DROP, EDIT_PICTURE, EDIT_PREFIX, EDIT_SUFFIX
from qwenimg_dist.models.text_encoder import TextEncoder

# How releases of transformers have named the vision tower's tensors in a Qwen2.5-VL checkpoint.
VISION_PREFIXES = ("model.visual.", "visual.")

Template = Literal["plus", "single"]
Pictures = Sequence[npt.NDArray[np.uint8]]


@dataclass(frozen=True, kw_only=True)
class EditTokens:
    """A prompt as the model reads it."""

    ids: list[int]
    pictures: Pictures


class EditEncoder:
    """The frozen vision and language towers with processor and template."""

    def __init__(self, text_encoder: TextEncoder, vision: Any, config: Any, processor: Any, template: Template) -> None:
        self._tokenizer = text_encoder.tokenizer
        self._max_text_tokens = text_encoder.max_sequence_length
        self._processor = processor
        self._template = template
        num_prefix = len(self._tokenizer(EDIT_PREFIX).input_ids)
        if num_prefix != EDIT_DROP:
            raise ValueError(
                f"the tokenizer cuts the edit template's prefix into {num_prefix} tokens, not {EDIT_DROP}: "
                "it does not belong to a Qwen-Image text encoder"
            )
        with torch.device("meta"):
            model: Any = Qwen2_5_VLModel(config)
        model.visual = vision
        model.language_model = text_encoder.model
        self._model = model.eval().requires_grad_(False)
        self._image_id, self._video_id = config.image_token_id, config.video_token_id
        self._takes_types = "mm_token_type_ids" in inspect.signature(model.forward).parameters

    @classmethod
    def load(cls, pipeline_dir: str | Path, text_encoder: TextEncoder, *, template: Template = "plus") -> EditEncoder:
        """Load the vision tower of PIPELINE/text_encoder, and PIPELINE/processor where there is one (Qwen2.5-VL's
        defaults where not: text-to-image pipelines come without). Device and type are the text encoder's."""
        folder = Path(pipeline_dir)
        config = Qwen2_5_VLConfig.from_pretrained(folder / "text_encoder")
        weight = text_encoder.model.embed_tokens.weight
        vision = _load_vision_tower(folder / "text_encoder", config.vision_config, weight.dtype, weight.device)
        if (folder / "processor" / "preprocessor_config.json").is_file():
            processor = Qwen2VLImageProcessorPil.from_pretrained(folder / "processor")
        else:
            patches = config.vision_config
            processor = Qwen2VLImageProcessorPil(
                patch_size=patches.patch_size,
                temporal_patch_size=patches.temporal_patch_size,
                merge_size=patches.spatial_merge_size,
            )
        return cls(text_encoder, vision, config, processor, template)

    def tokenize(self, instruction: str, pictures: Pictures) -> EditTokens:
        """The prompt's tokens, a picture's place filled with as many as it has. The instruction is cut to the text
        encoder's longest caption; pictures never are. Raises ValueError for pictures that the template cannot take."""
        if not pictures or (self._template == "single" and len(pictures) > 1):
            raise ValueError(
                f"the edit template {self._template!r} does not take {len(pictures)} pictures: set "
                "encode.edit.template=plus"
            )
        head = EDIT_PREFIX + "".join(
            EDIT_PICTURE[self._template].format(number) for number in range(1, len(pictures) + 1)
        )
        counts = iter([self._num_tokens(one) for one in pictures])
        ids: list[int] = []
        for token in self._tokenizer(head).input_ids:
            ids += [token] * (next(counts) if token == self._image_id else 1)
        words = self._tokenizer(instruction).input_ids[: self._max_text_tokens]
        # An instruction that spells the placeholder of a picture must not pass for one.
        ids += [token for token in words if token not in (self._image_id, self._video_id)]
        return EditTokens(ids=ids + self._tokenizer(EDIT_SUFFIX).input_ids, pictures=pictures)

    @torch.no_grad()
    def encode(self, prompts: Sequence[EditTokens]) -> list[torch.Tensor]:
        """Features [(T_i, D)], without the first 64 tokens: the last hidden state after the final norm. One batch."""
        if not prompts:
            return []
        device = self._model.language_model.embed_tokens.weight.device
        longest = max(len(one.ids) for one in prompts)
        pad = self._tokenizer.pad_token_id or 0
        ids = torch.tensor([one.ids + [pad] * (longest - len(one.ids)) for one in prompts], device=device)
        mask = torch.tensor([[1] * len(one.ids) + [0] * (longest - len(one.ids)) for one in prompts], device=device)
        images = [Image.fromarray(picture) for one in prompts for picture in one.pictures]
        seen = self._processor(images=images, return_tensors="pt").to(device)
        types = {"mm_token_type_ids": (ids == self._image_id).int()} if self._takes_types else {}
        hidden = self._model(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=seen["pixel_values"],
            image_grid_thw=seen["image_grid_thw"],
            use_cache=False,
            **types,
        ).last_hidden_state
        return [hidden[index, EDIT_DROP : len(one.ids)].clone() for index, one in enumerate(prompts)]

    def _num_tokens(self, picture: npt.NDArray[np.uint8]) -> int:
        height, width, _ = picture.shape
        num_patches = int(self._processor.get_number_of_image_patches(height, width, {}))
        return num_patches // int(self._processor.merge_size) ** 2


def _load_vision_tower(folder: Path, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """The vision transformer with the component's weights; peak memory is the tower plus one tensor."""
    with torch.device("meta"):
        model: Any = Qwen2_5_VisionTransformerPretrainedModel(config)
    # What is computed and not stored (rotary frequencies, always fp32) comes from a tower without blocks.
    shallow_config = type(config).from_dict({**config.to_dict(), "depth": 0})
    for name, buffer in Qwen2_5_VisionTransformerPretrainedModel(shallow_config).named_buffers():
        module, _, leaf = name.rpartition(".")
        model.get_submodule(module).register_buffer(leaf, buffer.to(device), persistent=False)
    weights = SafetensorsDirectory(folder)
    prefix = next((p for p in VISION_PREFIXES if any(name.startswith(p) for name in weights.entries)), None)
    if prefix is None:
        raise WeightsError(
            f"{weights.path}: holds no vision tower (none of {', '.join(VISION_PREFIXES)}...), which edits need: use "
            "the text encoder of a Qwen-Image pipeline as it was published"
        )
    weights.load_into(model, prefix, dtype=dtype, device=device)
    return model
