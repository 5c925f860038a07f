"""`Encoders` whose models live in another process of the same machine: the loader's side of an `EncoderActor`.

Place in the flow: a loader makes one per unit; `write.py` asks it as it would ask the models themselves, with the same
batches in the same order, so the same bytes come out. Arrays pass through the shared memory of Ray's object store, and
only so many at a time: one batch of pictures is being encoded while the next is filled, one batch of captions is asked
for when the one before it is written. A loader that is ahead of its encoder waits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, overload

import ray
from ray.exceptions import GetTimeoutError, RayError

from producers.deaths import machine_died, why_died
from producers.messages import EncoderFailedError, EncoderGoneError, Failure
from producers.pictures import Pixels
from producers.write import EditPrompt
from qwenimg_dist.data.shards import RawTensor


class RemoteEncoders:
    """`Encoders` by an actor handle. Raises `EncoderGoneError` if it dies, or is silent at `deadline` (monotonic
    seconds), and `EncoderFailedError` with what it says."""

    def __init__(self, encoder: Any, *, deadline: float) -> None:
        self._encoder = encoder
        self._deadline = deadline

    def latents(self, pixels: Pixels) -> Sequence[dict[str, RawTensor]]:
        """Begun at once, waited for at the first look at the result."""
        return _Later(self, self._encoder.latents.remote(pixels), len(pixels))

    def text(self, captions: Sequence[str]) -> Iterator[tuple[str, RawTensor]]:
        """See `Encoders.text`."""
        batches: list[list[str]] = self.answer(self._encoder.text_batches.remote(list(captions)))
        for batch in batches:
            yield from zip(batch, self.answer(self._encoder.text_batch.remote(batch)), strict=True)

    def edit_text(self, prompts: Sequence[EditPrompt]) -> list[RawTensor]:
        """See `Encoders.edit_text`."""
        features: list[RawTensor] = self.answer(self._encoder.edit_text.remote(list(prompts)))
        return features

    def answer(self, reference: Any) -> Any:
        """What a call came to."""
        try:
            answer = ray.get(reference, timeout=max(0.1, self._deadline - time.monotonic()))
        except GetTimeoutError as error:
            raise EncoderGoneError("the encoder did not answer within cluster.unit_timeout_s") from error
        except RayError as error:
            less = "lower encode.image_batch_pixels or encode.text_batch_tokens"
            why = why_died(error, who="the encoder", less_memory=less)
            raise EncoderGoneError(why, machine=machine_died(error)) from error
        if isinstance(answer, Failure):
            raise EncoderFailedError(answer)
        return answer


class _Later(Sequence[dict[str, RawTensor]]):
    """The tensors of a batch that may still be in work."""

    def __init__(self, encoders: RemoteEncoders, reference: Any, num: int) -> None:
        self._encoders, self._reference, self._num = encoders, reference, num

    def __len__(self) -> int:
        return self._num

    @overload
    def __getitem__(self, index: int) -> dict[str, RawTensor]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, RawTensor]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, RawTensor] | list[dict[str, RawTensor]]:
        return self._found[index]

    @cached_property
    def _found(self) -> list[dict[str, RawTensor]]:
        found: list[dict[str, RawTensor]] = self._encoders.answer(self._reference)
        return found
