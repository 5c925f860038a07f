"""The filter `bits_per_pixel`: blank files of any size are rejected, photographs in any format are not."""

from __future__ import annotations

import pytest
from hostile_folder import encoded
from photographs import PHOTOGRAPHS, bound, photograph
from PIL import Image

from producers.filters.base import Facts


def judge(image: Image.Image, kind: str, **options: int) -> str | None:
    one = bound("bits_per_pixel")
    facts = Facts(num_bytes=len(encoded(image, kind, **options)), width=image.width, height=image.height)
    rejection = one.admit(one.score(facts))
    return rejection.reason if rejection else None


@pytest.mark.parametrize("photo", PHOTOGRAPHS)
def test_hard_pressed_photographs_pass(photo: str) -> None:
    assert judge(Image.fromarray(photograph(photo)), "JPEG", quality=10) is None
    assert judge(Image.fromarray(photograph(photo)), "WEBP", quality=10) is None


@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_blank_pictures_and_bombs_do_not(mode: str) -> None:
    assert judge(Image.new(mode, (3000, 2000), 1), "PNG") == "too_few_bits"
