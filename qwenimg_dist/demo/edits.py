"""Edits of the demo's world: a picture of a shape, "make the shape red", and the same picture with the shape in red.

Place in the flow: `write_edits` makes a folder for `source=edits`, `is_done` reads from the pixels whether a picture is
what was asked for. Source and target differ in the shape's colour alone: place, size, outline and background are the
same to the pixel, so that a model which copies what it sees and recolours it is right. Held out are targets of
`HELD_OUT_PAIRS`: colour and shape that training never shows together, neither as source nor as target.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from qwenimg_dist.demo.shapes import COLOURS, HELD_OUT_PAIRS, Scene, render, split
from qwenimg_dist.rewards.shapes import judge

_INSTRUCTIONS = ("make the shape {colour}", "paint it {colour}", "change the colour to {colour}")


@dataclass(frozen=True, kw_only=True)
class Recolour:
    """A source and the colour that its shape is to have."""

    source: Scene
    colour: str

    @property
    def target(self) -> Scene:
        return replace(self.source, colour=self.colour)

    @property
    def instruction(self) -> str:
        """The first wording."""
        return _INSTRUCTIONS[0].format(colour=self.colour)

    def draw(self, size_px: int, seed: int) -> tuple[Image.Image, Image.Image]:
        """Source and target, alike but for the colour; the same seed gives the same pictures."""
        first, second = (render(scene, size_px, np.random.default_rng(seed)) for scene in (self.source, self.target))
        return first, second


def recolours() -> tuple[list[Recolour], list[Recolour]]:
    """(seen, held out), every source of the seen scenes in every other colour, in a fixed order."""
    sources, _ = split()
    found = [
        Recolour(source=source, colour=colour) for source in sources for colour in COLOURS if colour != source.colour
    ]
    held_out = [one for one in found if (one.colour, one.source.shape) in HELD_OUT_PAIRS]
    return [one for one in found if one not in held_out], held_out


def write_edits(path: Path, *, num_edits: int, seed: int, size_px: int = 64) -> None:
    """`num_edits` seen edits with pictures as PNG, and `edits.jsonl` for `source=edits`; the same arguments give the
    same bytes. Raises FileExistsError if `path` is there."""
    path.mkdir(parents=True)
    seen, _ = recolours()
    rng = np.random.default_rng(seed)
    order: list[Recolour] = []
    with (path / "edits.jsonl").open("w", encoding="utf-8") as table:
        for number in range(num_edits):
            if not order:  # every edit equally often
                order = [seen[index] for index in rng.permutation(len(seen))]
            one = order.pop()
            names = [f"{number:05d}-{role}.png" for role in ("source", "target")]
            for name, picture in zip(names, one.draw(size_px, int(rng.integers(1 << 31))), strict=True):
                picture.save(path / name)
            words = _INSTRUCTIONS[int(rng.integers(len(_INSTRUCTIONS)))].format(colour=one.colour)
            table.write(json.dumps({"source": names[0], "instruction": words, "target": names[1]}) + "\n")


def is_done(image: Image.Image, edit: Recolour) -> bool:
    """Whether the picture shows the source's shape and background in the colour that was asked for."""
    seen = judge(image)
    return (seen.colour, seen.shape, seen.background) == (edit.colour, edit.source.shape, edit.source.background)


def share_done(images: Sequence[Image.Image], edits: Sequence[Recolour]) -> float:
    """Share of edits that are done."""
    return sum(is_done(image, edit) for image, edit in zip(images, edits, strict=True)) / len(edits)
