"""Aspect buckets of a resolution class, and how a picture is laid into one: cover, then centre crop.

Place in the flow: producers ask where a picture goes before they decode it, so the answer depends on its upright size
and the config alone. The class 1328 gives the model's own seven buckets; other classes follow the same aspects at an
area of about resolution^2. Refuses to distort a picture, and to enlarge one unless asked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

from qwenimg_dist.schema import Bucket

SIDE_MULTIPLE: Final = 16
"""Eightfold VAE times the transformer's 2 x 2 patches."""

_ASPECT: Final = re.compile(r"^(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)$")

# What Qwen-Image-2512 was trained on (FACTS of the model card); no formula gives them. Aspect -> (width, height).
_OFFICIAL: Final[dict[int, dict[str, tuple[int, int]]]] = {
    1328: {
        "1:1": (1328, 1328),
        "16:9": (1664, 928),
        "9:16": (928, 1664),
        "4:3": (1472, 1104),
        "3:4": (1104, 1472),
        "3:2": (1584, 1056),
        "2:3": (1056, 1584),
    }
}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A picture's way into a bucket: resized to `resized` (h, w), then cropped at `crop` (top, left), all px."""

    bucket: Bucket
    resized: tuple[int, int]
    crop: tuple[int, int]


def parse_aspect(aspect: str, key: str = "encode.aspects") -> float:
    """`"16:9"` -> width / height. Raises ValueError, naming the config's `key`, for anything else."""
    match = _ASPECT.match(aspect)
    if match is None or float(match[1]) == 0 or float(match[2]) == 0:
        raise ValueError(f"{key}: {aspect!r} is not an aspect ratio; write width:height, for example 16:9")
    return float(match[1]) / float(match[2])


def buckets(resolution: int, aspects: Sequence[str], key: str = "encode.aspects") -> tuple[Bucket, ...]:
    """The distinct buckets of a class, sorted. Small classes have fewer buckets than aspects, since sides are coarse.
    `key` is where the config names the aspects.

    Raises ValueError for a resolution below 16 px, an empty list of aspects, or one that is no aspect.
    """
    if resolution < SIDE_MULTIPLE:
        raise ValueError(f"encode.resolutions: {resolution} px is below the smallest side, {SIDE_MULTIPLE}")
    if not aspects:
        raise ValueError(f"{key} is empty: name at least one, for example 1:1")
    official = _OFFICIAL.get(resolution, {})
    found = set()
    for aspect in aspects:
        ratio = parse_aspect(aspect, key)
        width, height = official.get(aspect) or _sides(resolution, ratio)
        found.add(Bucket(height=height, width=width))
    return tuple(sorted(found))


def nearest_bucket(height: int, width: int, choices: Sequence[Bucket]) -> Bucket:
    """The bucket whose aspect is nearest on a log scale, so that portrait and landscape are treated alike."""
    aspect = math.log(width / height)
    return min(choices, key=lambda bucket: (round(abs(math.log(bucket.width / bucket.height) - aspect), 9), bucket))


def place(height: int, width: int, choices: Sequence[Bucket], *, upscale: bool) -> Placement | None:
    """How an upright picture of this size (px) fills its nearest bucket; None if it is too small and may not grow."""
    bucket = nearest_bucket(height, width, choices)
    scale = max(bucket.height / height, bucket.width / width)
    if scale > 1 and not upscale:
        return None
    # Rounding may not undercut the bucket.
    resized = (max(bucket.height, round(height * scale)), max(bucket.width, round(width * scale)))
    crop = ((resized[0] - bucket.height) // 2, (resized[1] - bucket.width) // 2)
    return Placement(bucket=bucket, resized=resized, crop=crop)


def _sides(resolution: int, ratio: float) -> tuple[int, int]:
    """(width, height), multiples of 16, near `ratio` and resolution^2; a wrong shape weighs twice a wrong area."""
    ideal_width, ideal_height = resolution * math.sqrt(ratio), resolution / math.sqrt(ratio)

    def misfit(sides: tuple[int, int]) -> tuple[float, int]:
        width, height = sides
        shape = abs(math.log(width / height / ratio))
        area = abs(math.log(width * height / resolution**2))
        return round(2 * shape + area, 9), -width * height

    return min(product(_around(ideal_width), _around(ideal_height)), key=misfit)


def _around(side: float) -> tuple[int, int]:
    below = max(SIDE_MULTIPLE, int(side // SIDE_MULTIPLE) * SIDE_MULTIPLE)
    return below, below + SIDE_MULTIPLE
