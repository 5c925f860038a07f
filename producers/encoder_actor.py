"""The Ray actor that only encodes: pixels and captions in, tensors out. It opens no file of the source.

Place in the flow: with `cluster.loaders_per_producer`, `encoder_group.py` makes one per producer, on the GPU where
there is one; the loaders on its machine (`actor.py`) read, decode, filter, resize, and write what it gives back. One
call at a time, each of one batch, and nothing is kept between calls: a call may be repeated, and an encoder replaced,
at any time. Refuses to decode pictures: what kills a decoder kills a loader, never the process with the models.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from producers.actor import Job, on_its_device
from producers.messages import Failure, Seat, describe_failure, own_seat
from producers.pictures import Pixels
from producers.write import EditPrompt
from qwenimg_dist.config import Config
from qwenimg_dist.data.shards import RawTensor
from qwenimg_dist.debug import fault_point

if TYPE_CHECKING:
    from producers.encode import PipelineEncoders

Given = TypeVar("Given")


class EncoderActor:
    """`Encoders` for other processes (`remote_encoders.py`). Both models are loaded at the first call."""

    def __init__(self, job: Job) -> None:
        os.environ["OMP_NUM_THREADS"] = str(job.num_threads)  # before torch is imported, which reads it once
        self._job = job
        self._encoders: PipelineEncoders | None = None

    def ready(self) -> Seat:
        """Answers once the actor is placed and made."""
        return own_seat()

    def latents(self, pixels: Pixels) -> list[dict[str, RawTensor]] | Failure:
        """See `PipelineEncoders.latents`."""
        return self._answer(lambda encoders: encoders.latents(pixels))

    def text_batches(self, captions: Sequence[str]) -> list[list[str]] | Failure:
        """See `PipelineEncoders.text_batches`."""
        return self._answer(lambda encoders: encoders.text_batches(captions))

    def text_batch(self, captions: Sequence[str]) -> list[RawTensor] | Failure:
        """See `PipelineEncoders.text_batch`."""
        return self._answer(lambda encoders: encoders.text_batch(captions))

    def edit_text(self, prompts: Sequence[EditPrompt]) -> list[RawTensor] | Failure:
        """See `PipelineEncoders.edit_text`."""
        return self._answer(lambda encoders: encoders.edit_text(prompts))

    def _answer(self, ask: Callable[[PipelineEncoders], Given]) -> Given | Failure:
        try:
            fault_point("encoder_call")
            return ask(self._load())
        except Exception as error:
            return describe_failure(error)

    def _load(self) -> PipelineEncoders:
        if self._encoders is None:
            import torch

            from producers.encode import PipelineEncoders

            torch.set_num_threads(self._job.num_threads)
            config = on_its_device(Config.model_validate_json(self._job.config_json), self._job)
            self._encoders = PipelineEncoders.load(Path(self._job.pipeline_dir), config)
        return self._encoders
