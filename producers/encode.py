"""The real encoders: the pipeline's own VAE and text encoder, in batches that fit, out as raw tensors for shards.

Place in the flow: a worker makes one on its first unit to encode; `unit.py` sees only the `Encoders` protocol. The
only file of the producers that imports torch. Batches follow the data alone (one bucket; captions by length), so a
repeated unit is encoded alike. A batch that does not fit into GPU memory is halved, down to one picture; then the error
says what to change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import torch

from producers.halving import halving
from producers.pictures import Pixels
from producers.write import EditPrompt
from qwenimg_dist.config import Config
from qwenimg_dist.data.shards import RawTensor
from qwenimg_dist.models.edit_encoder import EditEncoder
from qwenimg_dist.models.template import DROP
from qwenimg_dist.models.text_encoder import TextEncoder
from qwenimg_dist.models.vae import LatentCodec

_DTYPES: Final = {"bfloat16": torch.bfloat16, "float32": torch.float32}

Item = TypeVar("Item")


class PipelineEncoders:
    """`Encoders` of one pipeline directory, on one device."""

    def __init__(self, codec: LatentCodec, text_encoder: TextEncoder, config: Config, pipeline_dir: Path) -> None:
        self._codec = codec
        self._text_encoder = text_encoder
        self._pipeline_dir = pipeline_dir
        self._template = config.encode.edit.template
        self._edit_encoder: EditEncoder | None = None
        self._posterior = config.encode.posterior
        self._dtype = config.encode.dtype
        self._text_batch_tokens = config.encode.text_batch_tokens

    @classmethod
    def load(cls, pipeline_dir: Path, config: Config) -> PipelineEncoders:
        """Load both frozen models. Raises ValueError or WeightsError for an unusable pipeline directory."""
        dtype, device = _DTYPES[config.encode.compute_dtype], config.cluster.device
        return cls(
            LatentCodec.load(pipeline_dir, dtype=dtype, device=device, collapse=config.encode.collapse_vae),
            TextEncoder.load(
                pipeline_dir, dtype=dtype, device=device, max_sequence_length=config.model.max_text_tokens
            ),
            config,
            pipeline_dir,
        )

    def latents(self, pixels: Pixels) -> list[dict[str, RawTensor]]:
        """(B, H, W, 3) uint8 sRGB -> per picture the normalised posterior (16, H/8, W/8)."""
        return halving(self._latents, list(pixels))

    def text(self, captions: Sequence[str]) -> Iterator[tuple[str, RawTensor]]:
        """Captions by length, shortest first, each with its features (T, D), valid tokens only."""
        for batch in self.text_batches(captions):
            yield from zip(batch, self.text_batch(batch), strict=True)

    def text_batches(self, captions: Sequence[str]) -> list[list[str]]:
        """The captions by length, shortest first, cut into batches that the text encoder takes."""
        lengths = dict(zip(captions, self._text_encoder.num_tokens(captions), strict=True))
        ordered = sorted(captions, key=lambda caption: (lengths[caption], caption))
        return list(token_batches(ordered, [lengths[one] + DROP for one in ordered], self._text_batch_tokens))

    def text_batch(self, captions: Sequence[str]) -> list[RawTensor]:
        """Features (T, D) of each caption of one batch."""
        return [raw_tensor(one, self._dtype) for one in halving(self._text_encoder.encode, captions)]

    def edit_text(self, prompts: Sequence[EditPrompt]) -> list[RawTensor]:
        """Features (T, D) of each instruction, its pictures seen; loads the vision tower at the first call."""
        if self._edit_encoder is None:
            self._edit_encoder = EditEncoder.load(self._pipeline_dir, self._text_encoder, template=self._template)
        encoder = self._edit_encoder
        tokens = [encoder.tokenize(one.text, one.pictures) for one in prompts]
        order = sorted(range(len(tokens)), key=lambda index: len(tokens[index].ids))
        found: dict[int, RawTensor] = {}
        for batch in token_batches(order, [len(tokens[index].ids) for index in order], self._text_batch_tokens):
            features = halving(encoder.encode, [tokens[index] for index in batch])
            found |= {index: raw_tensor(one, self._dtype) for index, one in zip(batch, features, strict=True)}
        return [found[index] for index in range(len(prompts))]

    def _latents(self, pictures: Sequence[Pixels]) -> list[dict[str, RawTensor]]:
        pixels = torch.from_numpy(np.stack(pictures)).to(self._codec.vae.device)
        mean, logvar = self._codec.encode(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0)
        samples = [{"mean": raw_tensor(one, self._dtype)} for one in mean]
        if self._posterior == "mean_logvar":
            for sample, one in zip(samples, logvar, strict=True):
                sample["logvar"] = raw_tensor(one, self._dtype)
        return samples


def token_batches(items: Sequence[Item], lengths: Sequence[int], max_tokens: int) -> Iterator[list[Item]]:
    """Cut `items`, given by ascending length, into runs whose padded size (count * longest) is at most `max_tokens`;
    an item longer than that stands alone."""
    batch: list[Item] = []
    for item, length in zip(items, lengths, strict=True):
        if batch and (len(batch) + 1) * length > max_tokens:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def raw_tensor(tensor: torch.Tensor, dtype: str) -> RawTensor:
    """A tensor as the shard writer takes it; bf16 as the uint16 of its bits, since numpy has none."""
    stored = tensor.to("cpu", _DTYPES[dtype]).contiguous()
    if dtype == "bfloat16":
        return RawTensor(data=stored.view(torch.int16).numpy().view(np.uint16), dtype=dtype)
    return RawTensor(data=stored.numpy(), dtype=dtype)
