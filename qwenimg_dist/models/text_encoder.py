"""Captions to text features, as stock `QwenImagePipeline` computes them, but unpadded and without dead
weight.

Place in the flow: producers encode each caption once with it; sampling encodes prompts with it.

Text-to-image needs neither the vision tower nor the language head of Qwen2.5-VL (1.2 of 8.3 B parameters):
only the language tower is built, and its tensors are read one by one from the component's safetensors.

Refuses: a tokenizer under which the template's prefix is not 34 tokens (dropping 34 would then cut or leak),
prompts with pictures (another template, another encoder path), pickled weights.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig, Qwen2Tokenizer
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from qwenimg_dist.models.safetensors_directory import SafetensorsDirectory, WeightsError
from qwenimg_dist.models.template import DROP, TEMPLATE

MAX_SEQUENCE_LENGTH = 512
"""The pipeline's default; the model was trained on no more. The hard cap is 1024."""

# How releases of transformers have named the language tower's tensors in a Qwen2.5-VL checkpoint.
LANGUAGE_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")


class TextEncoder:
    """The frozen language tower with its tokenizer and template."""

    def __init__(self, model: Any, tokenizer: Any, *, max_sequence_length: int) -> None:
        if not 1 <= max_sequence_length <= 1024:
            raise ValueError(f"max_sequence_length must be in 1..1024, got {max_sequence_length}")
        prefix = TEMPLATE.split("{}")[0]
        num_prefix = len(tokenizer(prefix).input_ids)
        if num_prefix != DROP:
            raise ValueError(
                f"the tokenizer cuts the template's prefix into {num_prefix} tokens, not {DROP}: "
                "it does not belong to a Qwen-Image text encoder"
            )
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_sequence_length = max_sequence_length

    @classmethod
    def load(
        cls,
        pipeline_dir: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        max_sequence_length: int = MAX_SEQUENCE_LENGTH,
    ) -> "TextEncoder":
        """Load PIPELINE/text_encoder (language tower only) and PIPELINE/tokenizer.

        Raises WeightsError if a tensor is missing or has another shape than the config says.
        """
        folder = Path(pipeline_dir)
        return cls(
            _load_language_tower(folder / "text_encoder", dtype, torch.device(device)),
            Qwen2Tokenizer.from_pretrained(folder / "tokenizer"),
            max_sequence_length=max_sequence_length,
        )

    def num_tokens(self, captions: Sequence[str]) -> list[int]:
        """How many features each caption gives (T_i, after dropping and cutting), without running the
        model.
        """
        return [len(ids) - DROP for ids in self._tokenize(captions)]

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[torch.Tensor]:
        """Features [(T_i, D)] of the captions, on the model's device in its dtype, valid tokens only.

        The last hidden state after the final norm, without the first 34 tokens; the suffix tokens stay, so an
        empty caption gives 5. All captions run as one batch, padded on the right: causal attention keeps
        padding out of the valid tokens, so the batch changes features only by rounding.
        """
        ids = self._tokenize(captions)
        if not ids:
            return []
        device = self.model.embed_tokens.weight.device
        longest = max(len(row) for row in ids)
        pad = self.tokenizer.pad_token_id or 0
        input_ids = torch.tensor([row + [pad] * (longest - len(row)) for row in ids], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=device)
        hidden = self.model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        return [hidden[i, DROP : len(row)].clone() for i, row in enumerate(ids)]

    def _tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        # Stock cuts the features to max_sequence_length after running up to 1058 tokens. Attention is causal,
        # so cutting the tokens beforehand gives the same features for less work.
        if not captions:
            return []
        texts = [TEMPLATE.format(caption) for caption in captions]
        batch = self.tokenizer(texts, max_length=self.max_sequence_length + DROP, truncation=True)
        rows: list[list[int]] = batch.input_ids
        return rows


def _load_language_tower(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """`Qwen2_5_VLTextModel` with the component's weights; peak memory is the tower plus one tensor."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{file}: missing; expected the text_encoder folder of a diffusers pipeline")
    model_type = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    if model_type != "qwen2_5_vl":
        raise ValueError(f"{file}: model_type is {model_type!r}, expected 'qwen2_5_vl'")
    config = Qwen2_5_VLConfig.from_pretrained(folder).text_config
    with torch.device("meta"):
        model: Any = Qwen2_5_VLTextModel(config)
    # Its frequencies are computed, not stored, and must be fp32 whatever the weights are.
    model.rotary_emb = type(model.rotary_emb)(config=config).to(device)
    weights = SafetensorsDirectory(folder)
    prefix = _language_prefix(weights)
    weights.load_into(model, prefix, dtype=dtype, device=device)
    return model


def _language_prefix(weights: SafetensorsDirectory) -> str:
    for prefix in LANGUAGE_PREFIXES:
        if f"{prefix}embed_tokens.weight" in weights.entries:
            return prefix
    raise WeightsError(
        f"{weights.path}: holds no language tower: none of {', '.join(LANGUAGE_PREFIXES)}embed_tokens.weight"
    )
