"""The pictures of a row: where each goes, and the further ones opened. One place for what the kinds differ in.

    image       one picture, in its bucket
    preference  chosen in its bucket, rejected in the same one: the two must be compared pixel by pixel
    edit        target in its bucket; conditions whole, at an area of their own, sides multiples of 32
    prompt      none

Place in the flow: `decide.py` asks which classes take the row, `unit.py` opens the pictures and cuts them by this,
`write.py` encodes the cuts. Filters look at a row's own picture alone; the further ones must be readable, unchanged
since the scan, and large enough. Refuses to fit a rejected picture by distorting it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from producers.load import ImageFault, Loaded, load_image, render
from producers.plan import Plan
from producers.scan import read_or_fault
from producers.state import Further, Row
from qwenimg_dist.data.buckets import Placement, place
from qwenimg_dist.debug import picture_point
from qwenimg_dist.schema import EDIT, PREFERENCE, PROMPT, Bucket, role_of

Pixels = npt.NDArray[np.uint8]

CHANGED_FILE: Final = "changed_file"
CONDITION_MULTIPLE: Final = 32
_NO_PIXELS: Final[Pixels] = np.empty((0, 0, 3), dtype=np.uint8)


@dataclass(frozen=True, kw_only=True)
class FurtherCut:
    """A further picture, ready to be encoded."""

    name: str
    """Of its tensor: `rejected`, `condition_0`."""
    uri: str
    placement: Placement
    pixels: Pixels


@dataclass(frozen=True, kw_only=True)
class Cut:
    """All pictures of a row for one resolution class."""

    row: Row
    resolution: int
    placement: Placement
    pixels: Pixels
    """(H, W, 3) of the bucket."""
    further: tuple[FurtherCut, ...] = ()

    def without_pixels(self) -> Cut:
        """What is left to say of it once its pictures are encoded."""
        return replace(self, pixels=_NO_PIXELS, further=tuple(replace(one, pixels=_NO_PIXELS) for one in self.further))

    @property
    def num_pixels(self) -> int:
        """Of all pictures together."""
        return sum(pixels.shape[0] * pixels.shape[1] for pixels in (self.pixels, *(one.pixels for one in self.further)))


def placements(row: Row, plan: Plan) -> dict[int, Placement]:
    """Resolution class -> how the row's own picture goes in; of the classes that all its pictures are large enough for.

    Those without latents of any kind (prompts) have none.
    """
    if row.kind == PROMPT:
        return {}
    found = plan.placements(row.height, row.width)
    if row.kind == PREFERENCE:
        return {r: own for r, own in found.items() if _beside(row, own, plan) is not None}
    return found


def too_small(row: Row, plan: Plan) -> str:
    """Why `placements` is empty."""
    classes = ", ".join(f"{resolution} px" for resolution in plan.buckets)
    if row.kind == PREFERENCE and plan.placements(row.height, row.width):
        rejected = row.others[0]
        return f"rejected: {rejected.width}x{rejected.height} is smaller than the chosen one's bucket at {classes}"
    return f"{row.width}x{row.height} is smaller than its bucket at {classes}"


def open_verified(root: str, uri: str, sha256: str | None) -> Loaded:
    """Decode a picture that was scanned. Raises `ImageFault`, also where the bytes are others by now."""
    data = read_or_fault(root, uri)
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ImageFault(CHANGED_FILE, "not the bytes that were scanned: give a changed picture a new name")
    picture_point("decode", found)
    return load_image(data)


def open_further(row: Row, root: str) -> tuple[Image.Image, ...]:
    """The further pictures, in order. Raises `ImageFault`; its detail names which one it is."""
    return tuple(_open_one(row, index, root) for index in range(len(row.others)))


def cut(
    row: Row, image: Image.Image, others: Sequence[Image.Image], own: dict[int, Placement], plan: Plan
) -> Iterator[Cut]:
    """The pictures for each class of `own`."""
    for resolution, placement in own.items():
        further = (
            FurtherCut(name=role_of(row.kind, index + 1), uri=one.uri, placement=into, pixels=render(other, into))
            for index, (one, other) in enumerate(zip(row.others, others, strict=True))
            if (into := _further_placement(row, index, resolution, placement, plan)) is not None
        )
        yield Cut(
            row=row,
            resolution=resolution,
            placement=placement,
            pixels=render(image, placement),
            further=tuple(further),
        )


def area_size(height: int, width: int, side: int, multiple: int = CONDITION_MULTIPLE) -> tuple[int, int]:
    """(h, w) of about side^2 pixels and the picture's aspect, both multiples of `multiple`: the rule of diffusers'
    `calculate_dimensions`, which rounds each side and so may bend the aspect by half a multiple."""
    ideal_width = math.sqrt(side * side * (width / height))
    ideal_height = ideal_width / (width / height)
    return tuple(max(multiple, round(one / multiple) * multiple) for one in (ideal_height, ideal_width))  # type: ignore[return-value]


def vision_pixels(row: Row, others: Sequence[Image.Image], plan: Plan) -> tuple[Pixels, ...]:
    """The condition pictures at the area that the text encoder sees them at."""
    whole = (_whole(one, plan.edit.vision_side) for one in row.others)
    return tuple(render(image, placement) for image, placement in zip(others, whole, strict=True))


def _whole(picture: Further, side: int) -> Placement:
    height, width = area_size(picture.height, picture.width, side)
    return Placement(bucket=Bucket(height=height, width=width), resized=(height, width), crop=(0, 0))


def _open_one(row: Row, index: int, root: str) -> Image.Image:
    one = row.others[index]
    try:
        return open_verified(root, one.uri, one.sha256).image
    except ImageFault as fault:
        raise ImageFault(fault.reason, f"{role_of(row.kind, index + 1)}: {fault.detail}") from fault


def _further_placement(row: Row, index: int, resolution: int, own: Placement, plan: Plan) -> Placement | None:
    if row.kind == EDIT:
        one = row.others[index]
        return _whole(one, plan.edit.condition_side or resolution)
    return _beside(row, own, plan)


def _beside(row: Row, own: Placement, plan: Plan) -> Placement | None:
    """The rejected picture in the chosen one's bucket; None if it is too small."""
    rejected = row.others[0]
    return place(rejected.height, rejected.width, (own.bucket,), upscale=plan.upscale)
