"""The hash: copies differ in few bits, other pictures in many, flat ones have none, and no file becomes a fault."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from producers.load import load_small_grey, open_file
from producers.perceptual_hash import hash_grey, perceptual_hash
from producers.scan import scan_row
from qwenimg_dist.demo.shapes import all_scenes, render

NEAR = 6


def stored(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def scene(number: int, size: tuple[int, int] = (450, 300)) -> Image.Image:
    """Edges and slopes at several scales, another at each number."""
    rng = np.random.default_rng(number)
    pixels = np.zeros((size[1], size[0], 3))
    for cells, weight in ((4, 90), (9, 60), (32, 50), (100, 40)):
        grid = rng.uniform(0, weight, (cells, cells, 3)).astype(np.uint8)
        pixels += np.asarray(Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC), dtype=np.float64)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def scanned(root: Path, uri: str) -> dict[str, Any]:
    return scan_row(str(root), {"row": 0, "uri": uri, "caption_fault": None})


def between(one: int | None, other: int | None) -> int:
    assert one is not None
    assert other is not None
    return ((one ^ other) & (2**64 - 1)).bit_count()


def test_other_pictures_are_far_and_copies_near() -> None:
    pictures = [scene(number) for number in range(6)]
    hashes = [perceptual_hash(stored(picture, quality=92)) for picture in pictures]
    for number, picture in enumerate(pictures):
        assert all(between(hashes[number], hashes[other]) > 16 for other in range(number))
        width, height = picture.size
        copies = {
            "quality 20": stored(picture, quality=20),
            "half": stored(picture.resize((width // 2, height // 2), Image.Resampling.LANCZOS)),
            "width 130": stored(picture.resize((130, 130 * height // width), Image.Resampling.LANCZOS)),
            "twice": stored(picture.resize((2 * width, 2 * height), Image.Resampling.BICUBIC)),
            "progressive": stored(picture, progressive=True),
            "grey": stored(picture.convert("L")),
            "cut by 2 %": stored(picture.crop((6, 4, width - 6, height - 4))),
        }
        for name, copy in copies.items():
            assert between(perceptual_hash(copy), hashes[number]) <= NEAR, (number, name)


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("PNG", "RGB", {}),
        ("PNG", "P", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "LA", {}),
        ("PNG", "I;16", {}),
        ("WEBP", "RGB", {"quality": 80}),
        ("TIFF", "CMYK", {}),
        ("JPEG", "CMYK", {}),
        ("GIF", "P", {}),
        ("BMP", "RGB", {}),
    ],
)
def test_every_format_and_mode_gives_the_jpeg_s_hash(kind: str, mode: str, options: dict[str, Any]) -> None:
    picture = scene(3)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    else:
        image = picture.convert(mode)
    assert between(perceptual_hash(stored(image, kind, **options)), perceptual_hash(stored(picture))) <= 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stored_turned_has_the_upright_hash(kind: str, orientation: int) -> None:
    inverse = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    turned = scene(5) if inverse is None else scene(5).transpose(Image.Transpose(inverse))
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = perceptual_hash(stored(scene(5)))
    assert between(perceptual_hash(stored(turned, kind, exif=exif)), upright) <= 4
    if orientation > 1:
        assert between(perceptual_hash(stored(turned, kind)), upright) > NEAR


def test_what_is_too_plain_has_no_hash() -> None:
    for colour in ((0, 0, 0), (255, 255, 255), (200, 30, 60)):
        assert perceptual_hash(stored(Image.new("RGB", (300, 200), colour))) is None
    for number, one in enumerate(all_scenes()):
        shape = render(one, [64, 160, 512][number % 3], np.random.default_rng(number))
        assert perceptual_hash(stored(shape, "PNG")) is None, one
        assert perceptual_hash(stored(shape, quality=[95, 60][number % 2])) is None, one
    slope = np.linspace(0, 255, 300).astype(np.uint8)
    for way in (np.tile(slope, (200, 1)), np.tile(slope[::-1, None], (1, 200))):
        assert perceptual_hash(stored(Image.fromarray(way), "PNG")) is None
        assert perceptual_hash(stored(Image.fromarray(way), quality=75)) is None
    page = Image.new("RGB", (768, 1024), "white")
    for line in range(20):
        place = (60, 60 + 44 * line)
        ImageDraw.Draw(page).text(place, "the quick brown fox jumps", fill="black", font=ImageFont.load_default(28))
    assert perceptual_hash(stored(page)) is None


def test_nothing_that_is_wrong_with_a_file_makes_a_fault(tmp_path: Path) -> None:
    whole = stored(scene(1))
    for number, data in enumerate((whole[: len(whole) // 2], whole[:-400], stored(scene(1), "PNG")[:-300])):
        (tmp_path / f"{number}.jpg").write_bytes(data)
        entry = scanned(tmp_path, f"{number}.jpg")
        assert entry.get("fault") is None  # the header is sound: the decode will tell
        assert entry["phash"] is None
    assert all(perceptual_hash(data) is None for data in (b"", b"text", b"GIF89a" + bytes(40)))
    noise = np.random.default_rng(0).integers(0, 255, (15, 200, 3)).astype(np.uint8)
    assert perceptual_hash(stored(Image.fromarray(noise), "PNG")) is None


def test_the_scan_stores_it(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(stored(scene(1)))
    assert scanned(tmp_path, "a.jpg")["phash"] == perceptual_hash(stored(scene(1)))
    hashes = [perceptual_hash(stored(scene(number))) for number in range(8)]
    assert all(-(2**63) <= one < 2**63 for one in hashes if one is not None)
    assert {one < 0 for one in hashes if one is not None} == {True, False}  # the sign is a bit like any other


def test_jpeg_is_decoded_at_reduced_scale() -> None:
    assert load_small_grey(open_file(stored(scene(1, (1024, 1024)))), 128).shape == (128, 128)
    assert load_small_grey(open_file(stored(scene(1, (1500, 1000)), "PNG")), 128).shape == (143, 215)
    assert hash_grey(np.zeros((200, 200), dtype=np.uint8)) is None
