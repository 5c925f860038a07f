"""Encoders that compute elsewhere: batches are begun before the one before them is written, and never more than two
are open; what is written does not depend on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from producer_world import FakeEncoders, assert_same, draw, make_plan_for, produce_here

from producers.pictures import Pixels
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.data.shards import RawTensor

PLAN = make_plan_for("encode.image_batch_pixels=8192")  # two pictures of 64 px


class _Later(Sequence[dict[str, RawTensor]]):
    """Tensors that are there at the first look, as those of another process are."""

    def __init__(self, encoders: Elsewhere, pixels: Pixels) -> None:
        self._encoders, self._pixels = encoders, pixels
        self._found: list[dict[str, RawTensor]] | None = None

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: Any) -> Any:
        if self._found is None:
            self._found = self._encoders.finish(self._pixels)
        return self._found[index]


class Elsewhere(FakeEncoders):
    def __init__(self) -> None:
        super().__init__()
        self.open = self.most_open = self.most_pictures = 0

    def latents(self, pixels: Pixels) -> Any:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        self.most_pictures = max(self.most_pictures, len(pixels))
        return _Later(self, pixels)

    def finish(self, pixels: Pixels) -> list[dict[str, RawTensor]]:
        self.open -= 1
        return super().latents(pixels)


def test_one_batch_is_begun_while_the_next_is_filled(tmp_path: Path) -> None:
    for number in range(13):
        draw(tmp_path / "source" / f"{number:02d}.png", number, (80, 80 if number % 3 else 120), f"caption {number}")
    calm, fed = Dataset.create(tmp_path / "calm", 13), Dataset.create(tmp_path / "fed", 13)
    produce_here(tmp_path / "source", calm, PLAN, FakeEncoders())
    elsewhere = Elsewhere()
    produce_here(tmp_path / "source", fed, PLAN, elsewhere)
    assert_same(fed, calm, PLAN)
    assert elsewhere.num_pictures == 13
    assert (elsewhere.open, elsewhere.most_open, elsewhere.most_pictures) == (0, 2, 2)
