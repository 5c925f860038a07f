"""A 64-bit hash of how a picture looks: near copies differ in few bits, other pictures in about 32.

Place in the flow: the scan makes it from the bytes that it has read anyway; `near.py` settles near duplicates by it.
The bits say which of the 8x8 lowest DCT frequencies of the upright luma are above their median: pHash, but taken from
the reduced decode directly, without a resize in between. `tests/bench/near_duplicates.py` measures it beside
`imagehash`.

Refuses (no hash, never a fault): what does not decode, pictures under 16 px, and those of mostly flat areas: plain
shapes, drawings, pages of text. Their few low frequencies are alike though they show different things, and a kept near
copy costs less than a lost picture. Another hash one day would be another column: hashes compare only with their own.
"""

from __future__ import annotations

import functools
from typing import Final

import numpy as np
import numpy.typing as npt

from producers.load import ImageFault, load_small_grey

_SIDE: Final = 128
"""px; half of the pictures' detail above this is in no bit."""
_FREQUENCIES: Final = 8
_MIN_SIDE: Final = 16
_FLAT_STEP: Final = 2
"""Levels of 255 between neighbours that count as no step; JPEG moves flat areas by one."""
_MAX_FLAT: Final = 0.75
"""Share of such neighbours. Seen: photographs 0.1 to 0.75, pages of text 0.77 to 0.96, plain shapes over 0.87."""


def perceptual_hash(data: bytes) -> int | None:
    """The file's hash as a signed 64-bit number; None where the picture has none."""
    try:
        grey = load_small_grey(data, _SIDE)
    except ImageFault:
        return None
    return hash_grey(grey)


def hash_grey(grey: npt.NDArray[np.uint8]) -> int | None:
    """Hash of (h, w) luma; None if it is too small or mostly flat."""
    if min(grey.shape) < _MIN_SIDE:
        return None
    levels = grey.astype(np.float32)
    if _flat_share(levels) > _MAX_FLAT:
        return None
    height, width = levels.shape
    coefficients = _dct(height) @ levels @ _dct(width).T
    lowest = coefficients[:_FREQUENCIES, :_FREQUENCIES].copy()
    lowest[0, 0] = coefficients[0, _FREQUENCIES]  # the mean would give the same bit for every picture
    bits = np.packbits(lowest > np.median(lowest))
    return int.from_bytes(bits.tobytes(), "big", signed=True)


def _flat_share(levels: npt.NDArray[np.float32]) -> float:
    """Share of neighbours, down and across, with hardly a step between them."""
    down = np.abs(levels[1:] - levels[:-1]) <= _FLAT_STEP
    across = np.abs(levels[:, 1:] - levels[:, :-1]) <= _FLAT_STEP
    return (float(down.mean()) + float(across.mean())) / 2


@functools.lru_cache(maxsize=1024)
def _dct(side: int) -> npt.NDArray[np.float32]:
    """(9, side): the lowest rows of the DCT-II, scaled by 1 / side so that pictures of all sizes compare."""
    frequency, position = np.arange(_FREQUENCIES + 1)[:, None], np.arange(side)[None]
    rows: npt.NDArray[np.float32] = (np.cos(np.pi * (2 * position + 1) * frequency / (2 * side)) / side).astype(
        np.float32
    )
    return rows
