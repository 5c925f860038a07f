"""Bytes of unknown origin -> an upright 8-bit sRGB picture, or a named fault. Never a guess in between.

Place in the flow: `scan.py` opens a file with `open_file` and hashes what `load_small_grey` gives; the unit
pipeline decodes each admitted picture once with `load_image` and cuts every resolution from that with `render`. The
order matters: allow-listed formats -> size gate on the header -> full decode -> first frame -> EXIF transpose ->
explicit mode table -> ICC to sRGB -> alpha on white. Refuses truncated files (`LOAD_TRUNCATED_IMAGES` is never set),
formats that run programs (EPS), and modes whose range of values is unknown.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from qwenimg_dist.data.buckets import Placement

MAX_PIXELS: Final = 178_956_970
"""No picture above this is decoded, whatever the filters say (1 GB as RGBA with its copies)."""

# MPO comes with JPEG: it has no entry of its own, and naming it makes `Image.open` fail on all that follow.
FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "TGA", "AVIF", "JPEG2000")

_TRANSPOSE: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG: Final = 0x0112
_WHITE: Final = (255, 255, 255, 255)

# What decoders raise on hostile bytes; anything else is a bug and stays loud.
_DECODE_ERRORS: Final = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    AttributeError,
    struct.error,
    zlib.error,
    RuntimeError,  # libavif, of most damage
)


class ImageFault(Exception):
    """This file gives no picture. `reason` is a code for the index, `detail` says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, kw_only=True)
class Header:
    """What the header says; sides are upright (after EXIF orientation), px."""

    format: str
    mode: str
    width: int
    height: int
    orientation: int


@dataclass(frozen=True, kw_only=True)
class OpenFile:
    """A file whose header was read. Its picture can be decoded once."""

    header: Header
    image: Image.Image
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A decoded picture: mode RGB, upright, sRGB; the first frame where there are several."""

    image: Image.Image
    num_frames: int


def open_file(data: bytes) -> OpenFile:
    """The header alone is read. Raises `ImageFault` (`empty_file`, `not_an_image`, `truncated`, `too_many_pixels`)."""
    header, image = _header(data)
    return OpenFile(header=header, image=image, num_bytes=len(data))


def load_image(data: bytes) -> Loaded:
    """Decode wholly. Raises `ImageFault`; besides the header's: `decode_error`, `unsupported_mode`.

    MemoryError passes: how much there is to be had says something about the moment, not yet about the picture.
    """
    header, image = _header(data)
    try:
        num_frames = 1 if header.format == "MPO" else int(getattr(image, "n_frames", 1))
        image.load()
        upright = image.transpose(_TRANSPOSE[header.orientation]) if header.orientation in _TRANSPOSE else image
        picture = _to_srgb(upright, image.info.get("icc_profile"))
    except _DECODE_ERRORS as error:
        if isinstance(error, RuntimeError) and "out of memory" in str(error).lower():  # libavif's way to say so
            raise MemoryError(f"{header.format}, {header.width}x{header.height}: {error}") from error
        reason = "truncated" if "truncated" in str(error) or isinstance(error, EOFError) else "decode_error"
        raise ImageFault(reason, f"{header.format}: {error}"[:200]) from error
    if picture.size != (header.width, header.height):
        raise ImageFault("decode_error", f"header says {header.width}x{header.height}, decoded {picture.size}")
    return Loaded(image=picture, num_frames=num_frames)


def load_small_grey(file: OpenFile, side: int) -> npt.NDArray[np.uint8]:
    """(h, w) upright luma, reduced by a whole factor while both sides stay at least `side`; ICC profiles are ignored.

    JPEG is decoded at the reduced scale (8 times less work at 1/8), other formats wholly. Raises `ImageFault`.
    """
    header, image = file.header, file.image
    try:
        if header.format in ("JPEG", "MPO"):
            image.draft("L", (side, side))
            image.decodermaxblock = file.num_bytes + 1  # type: ignore[attr-defined]  # in one piece, not 64 KB at a time
        image.load()
        if image.mode in ("RGB", "RGBA", "L", "LA", "CMYK"):  # reduced first: the mode table then costs next to nothing
            image = _reduced(image, side)
        grey = _reduced(image if image.mode == "L" else _to_srgb(image, None).convert("L"), side)
        upright = grey.transpose(_TRANSPOSE[header.orientation]) if header.orientation in _TRANSPOSE else grey
    except MemoryError as error:
        raise ImageFault("too_many_pixels", f"{header.width}x{header.height} does not fit in memory") from error
    except _DECODE_ERRORS as error:
        raise ImageFault("decode_error", f"{header.format}: {error}"[:200]) from error
    return np.asarray(upright, dtype=np.uint8)


def _reduced(image: Image.Image, side: int) -> Image.Image:
    factor = min(image.size) // side
    return image.reduce(factor) if factor > 1 else image


def render(image: Image.Image, placement: Placement) -> npt.NDArray[np.uint8]:
    """The picture in its bucket: (H, W, 3) uint8, resized without distortion, then cropped."""
    height, width = placement.resized
    if image.size != (width, height):
        # The gap lets a box filter halve huge pictures first: several times faster, within a level of the full filter.
        image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    top, left = placement.crop
    bucket = placement.bucket
    image = image.crop((left, top, left + bucket.width, top + bucket.height))
    return np.asarray(image, dtype=np.uint8)


def _header(data: bytes) -> tuple[Header, Image.Image]:
    if not data:
        raise ImageFault("empty_file", "0 bytes")
    # Both are process-wide in Pillow; set at each use, since others may have changed them.
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        orientation = _orientation(image, data)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageFault("too_many_pixels", str(error)[:200]) from error
    except _DECODE_ERRORS as error:
        cut = "truncated" in str(error).lower() or _is_cut_webp(data)
        raise ImageFault("truncated" if cut else "not_an_image", _first_line(error)) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageFault("too_many_pixels", f"{width}x{height} is over {MAX_PIXELS} pixels")
    if width < 1 or height < 1:
        raise ImageFault("not_an_image", f"{width}x{height} has no pixels")
    if orientation >= 5:
        width, height = height, width
    header = Header(format=str(image.format), mode=image.mode, width=width, height=height, orientation=orientation)
    return header, image


def _is_cut_webp(data: bytes) -> bool:
    """Whether a WebP ends before its header says; Pillow takes a part of one for no picture at all."""
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    return is_webp and int.from_bytes(data[4:8], "little") + 8 > len(data)


def _orientation(image: Image.Image, data: bytes) -> int:
    """EXIF orientation that is left for us to undo, 1 where there is none.

    Pillow turns TIFF by itself, already in `size`. For PNG it would decode the whole file to be sure: so it is asked
    only if something in the bytes speaks of EXIF.
    """
    if image.format == "TIFF":
        return 1
    if image.format == "PNG" and not any(word in data for word in (b"eXIf", b"exif", b"Orientation")):
        return 1
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _DECODE_ERRORS:  # damaged EXIF on a sound picture; a damaged picture is found when it is decoded
        return 1
    return int(value) if isinstance(value, int) and 1 <= value <= 8 else 1


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The mode table. Raises `ImageFault("unsupported_mode")`."""
    alpha: Image.Image | None = None
    if image.mode.startswith("I;16") or image.mode == "I":
        return _sixteen_bit(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")  # also from P, PA, La, and from `transparency` of L and RGB
        alpha, image = rgba.getchannel("A"), rgba.convert("RGB")
    elif image.mode in ("1", "P") or image.mode in ("RGBX", "YCbCr", "HSV"):
        image = image.convert("RGB")
    elif image.mode not in ("L", "RGB", "CMYK", "LAB"):
        raise ImageFault("unsupported_mode", f"mode {image.mode}: the range of its values is not known")
    picture = _apply_profile(image, profile)
    if alpha is None:
        return picture
    picture.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", picture.size, _WHITE), picture).convert("RGB")


def _sixteen_bit(image: Image.Image) -> Image.Image:
    """16-bit grey, scaled; Pillow's own conversion would clip everything above 255 to white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ImageFault("unsupported_mode", f"mode {image.mode} with values {values.min()}..{values.max()}")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")


def _apply_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    """To sRGB by the embedded ICC profile; without a usable one, as browsers do: the values are taken as sRGB."""
    if image.mode == "LAB":
        transform = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        converted = ImageCms.applyTransform(image, transform)
        assert converted is not None  # None is for in-place calls
        return converted
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "srgb" not in ImageCms.getProfileDescription(source).lower():
                converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
                assert converted is not None
                return converted
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):  # damaged, or made for another mode
            pass
    return image if image.mode == "RGB" else image.convert("RGB")  # converted to its own mode it would be copied


def _first_line(error: BaseException) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    # Pillow names the buffer's address, which differs at each run.
    return text.split(" <_io")[0][:200]
