"""Pictures of every kind of oddity: upright sRGB comes out, or a fault with a name."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from producers.load import MAX_PIXELS, ImageFault, load_image, open_file, render
from producers.scan import scan_row
from qwenimg_dist.data.buckets import buckets, place


def quadrants(width: int = 48, height: int = 32) -> Image.Image:
    """Red, green / blue, white: any flip or turn shows."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    pixels[: height // 2, width // 2 :] = (0, 255, 0)
    pixels[height // 2 :, : width // 2] = (0, 0, 255)
    pixels[height // 2 :, width // 2 :] = (255, 255, 255)
    return Image.fromarray(pixels)


def stored(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def listed(row: int, uri: str) -> dict[str, Any]:
    return {"row": row, "uri": uri, "caption_fault": None}


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    width, height = image.size
    spots = [(4, 4), (width - 5, 4), (4, height - 5), (width - 5, height - 5)]
    return [tuple(int(v) for v in np.asarray(image)[y, x]) for x, y in spots]


UPRIGHT = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientations_come_out_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    inverse = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    turned = quadrants() if inverse is None else quadrants().transpose(Image.Transpose(inverse))
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    data = stored(turned, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else options))
    header, loaded = open_file(data).header, load_image(data)
    assert (header.width, header.height) == loaded.image.size == (48, 32)
    assert np.allclose(corners(loaded.image), UPRIGHT, atol=25 if kind == "AVIF" else 6)
    stock = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(np.asarray(stock), np.asarray(loaded.image))


def sixteen_bit() -> bytes:
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (16, 1))
    return stored(Image.fromarray(ramp))


def with_hidden_colour(mode: str) -> bytes:
    """Red, but wholly transparent on the left half."""
    image = Image.new("RGBA", (32, 16), (255, 0, 0, 255))
    image.paste((10, 20, 30, 0), (0, 0, 16, 16))
    if mode == "P":
        return stored(image.convert("P"), "PNG", transparency=image.convert("P").getpixel((2, 2)))
    return stored(image.convert(mode))


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    pixels = np.asarray(load_image(sixteen_bit()).image)[0, :, 0]
    assert np.abs(pixels.astype(int) - np.linspace(0, 255, 64)).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha_lies_on_white(mode: str) -> None:
    picture = load_image(with_hidden_colour(mode)).image
    assert picture.mode == "RGB"
    assert picture.getpixel((4, 8)) == (255, 255, 255)
    assert picture.getpixel((28, 8)) != (255, 255, 255)


def test_transparency_of_one_colour_lies_on_white() -> None:
    data = stored(Image.new("RGB", (8, 8), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert load_image(data).image.getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_plain_modes_keep_the_picture(mode: str) -> None:
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    data = stored(quadrants().convert(mode), kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    picture = load_image(data).image
    assert picture.mode == "RGB"
    got, wanted = (
        corners(picture),
        UPRIGHT if mode not in ("1", "L") else corners(quadrants().convert("L").convert("RGB")),
    )
    assert np.allclose(got, wanted, atol=10 if mode != "1" else 255)


def test_an_embedded_profile_is_applied() -> None:
    linear = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ"))
    lab = Image.new("LAB", (8, 8), (128, 128, 128))
    assert load_image(stored(lab, "TIFF")).image.getpixel((4, 4)) == pytest.approx((119, 119, 119), abs=3)
    data = stored(quadrants(), "PNG", icc_profile=linear.tobytes())
    assert load_image(data).image.size == (48, 32)  # a profile of another colour space is ignored, as browsers do


def test_a_damaged_profile_does_not_cost_the_picture() -> None:
    data = stored(quadrants(), "PNG", icc_profile=b"no profile at all")
    assert corners(load_image(data).image) == UPRIGHT


def test_frames_are_counted_and_the_first_is_taken() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        data = stored(frames[0], kind, save_all=True, append_images=frames[1:])
        loaded = load_image(data)
        assert loaded.num_frames == 3
        red, green, _ = loaded.image.getpixel((8, 8))  # type: ignore[misc]
        assert red > 200 > 60 > green


def bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


JPEG = stored(quadrants(640, 480), "JPEG")
FAULTS = {
    "zero bytes": (b"", "empty_file"),
    "text named jpg": (b"this is a text, not a picture\n" * 9, "not_an_image"),
    "html": (b"<html><body>404</body></html>", "not_an_image"),
    "one byte": (b"\xff", "not_an_image"),
    "bomb over the limit": (bomb(20000, 10000), "too_many_pixels"),
    "bomb far over it": (bomb(60000, 60000), "too_many_pixels"),
    "truncated jpeg": (JPEG[: len(JPEG) // 2], "truncated"),
    "truncated png": (stored(quadrants(320, 240))[:-60], "truncated"),
    "truncated webp": (stored(quadrants(320, 240), "WEBP")[:-40], "truncated"),
    "the beginning of a jpeg": (JPEG[:400], "truncated"),
    "a riff of another kind": (b"RIFF\xff\0\0\0WAVEfmt " + bytes(99), "not_an_image"),
    "no pixel data": (bomb(100, 100), "truncated"),
    "eps runs programs": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not_an_image"),
    "floats of unknown range": (stored(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), "unsupported_mode"),
    "32-bit integers": (stored(Image.fromarray(np.full((8, 8), 1 << 20, np.int32)), "TIFF"), "unsupported_mode"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_have_names(name: str) -> None:
    data, reason = FAULTS[name]
    with pytest.raises(ImageFault) as caught:
        load_image(data)
    assert caught.value.reason == reason
    assert caught.value.detail
    assert "0x" not in caught.value.detail  # addresses differ at each run, and decisions must not


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seed", range(30))
def test_flipped_bytes_end_in_a_picture_or_a_fault(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for whole in (JPEG, stored(quadrants(64, 64)), stored(quadrants(64, 64), "GIF"), stored(quadrants(64, 64), "TIFF")):
        data = bytearray(whole)
        for position in rng.integers(0, min(len(data), 600), 6):
            data[position] = rng.integers(256)
        # Anything but a picture or this fault fails the test.
        with contextlib.suppress(ImageFault):
            assert load_image(bytes(data)).image.mode == "RGB"


def damaged_avif(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    data = bytearray(stored(quadrants(64, 64), "AVIF"))
    for position in rng.integers(0, len(data), 3):
        data[position] = rng.integers(256)
    return bytes(data)


def test_damaged_avif_is_a_fault_of_the_file_though_its_decoder_raises_runtime_errors(tmp_path: Any) -> None:
    odd = 0
    for seed in range(200):
        data = damaged_avif(seed)
        try:
            Image.open(io.BytesIO(data)).load()
        except RuntimeError:
            odd += 1
        except Exception:
            continue
        (tmp_path / "a.avif").write_bytes(data)
        scan_row(str(tmp_path), listed(seed, "a.avif"))
        with contextlib.suppress(ImageFault):
            load_image(data)
    assert odd > 5  # else nothing was tried


def test_a_decoder_without_memory_says_nothing_about_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Any) -> None:
        raise RuntimeError("Failed to decode frame 0: Out of memory")

    data = stored(quadrants(), "AVIF")
    monkeypatch.setattr("PIL.AvifImagePlugin.AvifImageFile.load", load)
    with pytest.raises(MemoryError, match="AVIF, 48x32"):
        load_image(data)


def test_truncation_is_only_seen_by_the_decode(tmp_path: Any) -> None:
    (tmp_path / "cut.jpg").write_bytes(JPEG[: len(JPEG) // 2])
    scanned = scan_row(str(tmp_path), listed(0, "cut.jpg"))
    assert scanned.get("fault") is None
    assert (scanned["width"], scanned["height"], scanned["format"]) == (640, 480, "JPEG")
    assert scan_row(str(tmp_path), listed(1, "gone.jpg"))["fault"] == "missing_file"
    assert scan_row(str(tmp_path), listed(2, "a\0b.jpg"))["fault"] == "missing_file"
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    for name in ("folder.jpg", "pipe.jpg", "/dev/zero"):
        assert scan_row(str(tmp_path), listed(3, name))["fault"] == "unreadable"


def test_the_limit_is_what_the_filters_default_to() -> None:
    assert MAX_PIXELS == 178_956_970


def test_render_keeps_shapes_round() -> None:
    """A disc in a wide picture stays a disc in a square bucket."""
    y, x = np.mgrid[:200, :400]
    disc = ((x - 200) ** 2 + (y - 100) ** 2 < 80**2).astype(np.uint8) * 255
    placement = place(200, 400, buckets(64, ("1:1",)), upscale=False)
    assert placement is not None
    pixels = render(Image.fromarray(np.stack([disc] * 3, axis=-1)), placement)
    assert pixels.shape == (64, 64, 3)
    inside = pixels[..., 0] > 127
    assert abs(int(inside.any(axis=0).sum()) - int(inside.any(axis=1).sum())) <= 1
