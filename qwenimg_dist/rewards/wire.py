"""Messages between a rewards' process and who asked it: a length, a JSON header, the pictures' bytes.

Place in the flow: `service.py` writes requests and reads replies with a deadline, `process.py` the other way round.
No pickle: nothing that comes over the wire is run.
"""

from __future__ import annotations

import json
import os
import select
import struct
import time
from collections.abc import Sequence
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from qwenimg_dist.rewards.base import Prompt

Pixels = npt.NDArray[np.uint8]
"""(height, width, 3)."""

_LENGTHS: Final = struct.Struct("<QQ")
"""Bytes of the header, bytes after it."""
_CHUNK: Final = 1 << 20


def to_pixels(image: Image.Image) -> Pixels:
    return np.ascontiguousarray(np.asarray(image.convert("RGB"), dtype=np.uint8))


def pack(header: dict[str, Any], payload: bytes = b"") -> bytes:
    head = json.dumps(header, default=str).encode()
    return _LENGTHS.pack(len(head), len(payload)) + head + payload


def pack_request(reward: str, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> bytes:
    pixels = [to_pixels(image) for image in images]
    header = {
        "reward": reward,
        "sizes": [one.shape[:2] for one in pixels],
        "prompts": [{"text": one.text, "metadata": dict(one.metadata)} for one in prompts],
    }
    return pack(header, b"".join(one.tobytes() for one in pixels))


def unpack_request(header: dict[str, Any], payload: bytes) -> tuple[list[Image.Image], list[Prompt]]:
    images, start = [], 0
    for height, width in header["sizes"]:
        pixels = np.frombuffer(payload, np.uint8, height * width * 3, start).reshape(height, width, 3)
        images.append(Image.fromarray(pixels, mode="RGB"))
        start += height * width * 3
    return images, [Prompt(text=one["text"], metadata=one["metadata"]) for one in header["prompts"]]


def read(source: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """The next message, waiting for it; None at the end."""
    lengths = source.read(_LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        return None
    head, payload = _LENGTHS.unpack(lengths)
    return json.loads(source.read(head)), source.read(payload)


class Late(Exception):
    """The deadline passed."""


def send(handle: int, message: bytes, deadline: float) -> None:
    """Write to a non-blocking pipe. Raises `Late` at the deadline (monotonic), OSError if nobody reads any more."""
    view = memoryview(message)
    while view:
        _wait(deadline, write=handle)
        view = view[os.write(handle, view[:_CHUNK]) :]


def receive(handle: int, deadline: float) -> dict[str, Any] | None:
    """The header of the next message from a non-blocking pipe, None at its end. Raises `Late` at the deadline."""
    lengths = _exactly(handle, _LENGTHS.size, deadline)
    if lengths is None:
        return None
    head, payload = _LENGTHS.unpack(lengths)
    body = _exactly(handle, head + payload, deadline)
    if body is None:
        return None
    header: dict[str, Any] = json.loads(body[:head])
    return header


def _exactly(handle: int, num_bytes: int, deadline: float) -> bytes | None:
    parts = bytearray()
    while len(parts) < num_bytes:
        _wait(deadline, read=handle)
        part = os.read(handle, min(_CHUNK, num_bytes - len(parts)))
        if not part:
            return None
        parts += part
    return bytes(parts)


def _wait(deadline: float, *, read: int | None = None, write: int | None = None) -> None:
    """Until the pipe is ready. `poll`, since `select` fails for handles above 1023, of which a rank has many."""
    ready = select.poll()
    ready.register(read if read is not None else write or 0, select.POLLIN if read is not None else select.POLLOUT)
    left = deadline - time.monotonic()
    if left <= 0 or not ready.poll(left * 1000):
        raise Late
