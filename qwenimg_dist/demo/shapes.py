"""The demo's world: one coloured shape on a plain background, and the sentence that says so.

Place in the flow: `demo` writes a folder of these pictures and hands it to `produce` like anybody's photos;
`rewards.shapes` later reads the pixels of what the trained model drew. Variance is low on purpose (position
jitter 3 %, radius 0.26-0.30 of the short side, no words): a 2.5 M transformer learns this world in minutes on
a CPU, and a wider one it does not. Refuses: prompts that do not name exactly one colour, one shape and one
background; to write into a folder that holds anything.
"""

import io
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

RGB = tuple[int, int, int]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

COLOURS: dict[str, RGB] = {
    "red": (214, 38, 40),
    "orange": (245, 140, 20),
    "yellow": (240, 220, 50),
    "green": (40, 160, 60),
    "blue": (40, 80, 215),
    "purple": (140, 50, 170),
}
"""What a shape is painted with; far enough apart to survive the tiny VAE."""

BACKGROUNDS: dict[str, RGB] = {"white": (246, 246, 246), "grey": (128, 128, 128), "black": (14, 14, 14)}
"""Achromatic, and no word in common with `COLOURS`: so a prompt needs no grammar to be parsed."""

POSITION_JITTER = 0.03
"""Largest offset of the centre on each axis, in units of the short side."""
RADIUS_RANGE = (0.26, 0.30)
"""Radius of the circle, in units of the short side; the other shapes are scaled to look as large."""
COLOUR_JITTER = 4
"""Largest offset per channel (of 255): makes equal bytes by accident practically impossible."""

_CROSS_ARM, _CROSS_REACH = 0.34, 1.08
_SQUARE_HALF_SIDE = 0.87
_TRIANGLE_INRADIUS = 0.62
_SUPERSAMPLE = 4


def _circle(x: FloatArray, y: FloatArray) -> BoolArray:
    inside: BoolArray = x**2 + y**2 <= 1.0
    return inside


def _square(x: FloatArray, y: FloatArray) -> BoolArray:
    inside: BoolArray = np.maximum(np.abs(x), np.abs(y)) <= _SQUARE_HALF_SIDE
    return inside


def _triangle(x: FloatArray, y: FloatArray) -> BoolArray:
    slanted_edges = np.sqrt(3.0) / 2.0 * np.abs(x) - 0.5 * y
    inside: BoolArray = np.maximum(y, slanted_edges) <= _TRIANGLE_INRADIUS
    return inside


def _cross(x: FloatArray, y: FloatArray) -> BoolArray:
    near, far = np.minimum(np.abs(x), np.abs(y)), np.maximum(np.abs(x), np.abs(y))
    inside: BoolArray = (near <= _CROSS_ARM) & (far <= _CROSS_REACH)
    return inside


SHAPES: dict[str, Callable[[FloatArray, FloatArray], BoolArray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
}
"""Name -> is the point (x right, y down, unit radius) inside the shape?"""

HELD_OUT_PAIRS: frozenset[tuple[str, str]] = frozenset(
    {("red", "triangle"), ("yellow", "cross"), ("green", "circle"), ("blue", "square")}
)
"""(colour, shape) never shown in training, on any background; every colour and shape is seen otherwise."""

_TEMPLATES = (
    "{a} {colour} {shape} on a {background} background",
    "{a} {colour} {shape}, {background} background",
    "a picture of {a} {colour} {shape} on a {background} background",
)


@dataclass(frozen=True, order=True)
class Scene:
    """What is in a picture: keys of `COLOURS`, `SHAPES` and `BACKGROUNDS`."""

    colour: str
    shape: str
    background: str

    def __post_init__(self) -> None:
        named = (("colour", self.colour, COLOURS), ("shape", self.shape, SHAPES))
        for kind, name, known in (*named, ("background", self.background, BACKGROUNDS)):
            if name not in known:
                raise ValueError(f"{kind} {name!r} is unknown: choose one of {', '.join(known)}")


def all_scenes() -> list[Scene]:
    """Every combination, in a fixed order."""
    return [Scene(*words) for words in product(COLOURS, SHAPES, BACKGROUNDS)]


def split() -> tuple[list[Scene], list[Scene]]:
    """(seen, held out): held-out scenes combine a colour and a shape that training never shows together."""
    seen = [scene for scene in all_scenes() if (scene.colour, scene.shape) not in HELD_OUT_PAIRS]
    held_out = [scene for scene in all_scenes() if (scene.colour, scene.shape) in HELD_OUT_PAIRS]
    return seen, held_out


def _worded(template: str, scene: Scene) -> str:
    article = "an" if scene.colour[0] in "aeiou" else "a"
    return template.format(a=article, colour=scene.colour, shape=scene.shape, background=scene.background)


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """A sentence for the scene; with `rng`, one of several wordings of unequal length, else the first one."""
    template = _TEMPLATES[0] if rng is None else _TEMPLATES[int(rng.integers(len(_TEMPLATES)))]
    article = "an" if scene.colour[0] in "aeiou" else "a"
    return template.format(a=article, colour=scene.colour, shape=scene.shape, background=scene.background)


def all_captions() -> list[str]:
    """Every wording of every scene, in a fixed order."""
    return [_worded(template, scene) for scene in all_scenes() for template in _TEMPLATES]


def parse(prompt: str) -> Scene:
    """The scene that a prompt names. Raises ValueError if a word is missing or ambiguous."""
    words = prompt.lower().replace(",", " ").replace(".", " ").split()

    def only(kind: str, known: dict[str, object]) -> str:
        found = sorted({word for word in words if word in known})
        if len(found) != 1:
            raise ValueError(
                f"prompt {prompt!r} names {len(found)} {kind}s ({', '.join(found) or 'none'}): "
                f"name exactly one of {', '.join(known)}"
            )
        return found[0]

    return Scene(only("colour", dict(COLOURS)), only("shape", dict(SHAPES)), only("background", dict(BACKGROUNDS)))


def coverage(shape: str, *, size_px: tuple[int, int], centre_px: tuple[float, float], radius_px: float) -> FloatArray:
    """Share of each pixel that lies inside the shape: (height, width) in [0, 1].

    `size_px` is (width, height), `centre_px` is (x, y); sampled on a 4 x 4 grid per pixel.
    """
    width, height = size_px
    xs = (np.arange(width * _SUPERSAMPLE) + 0.5) / _SUPERSAMPLE
    ys = (np.arange(height * _SUPERSAMPLE) + 0.5) / _SUPERSAMPLE
    x = ((xs - centre_px[0]) / radius_px)[None, :]
    y = ((ys - centre_px[1]) / radius_px)[:, None]
    inside = SHAPES[shape](*np.broadcast_arrays(x, y)).astype(np.float64)
    blocks = inside.reshape(height, _SUPERSAMPLE, width, _SUPERSAMPLE)
    return np.asarray(blocks.mean(axis=(1, 3)), dtype=np.float64)


def render(scene: Scene, size_px: int | tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """An antialiased RGB picture; `size_px` is the side, or (width, height).

    Lengths scale with the short side, so that a circle stays round in any aspect ratio.
    """
    width, height = (size_px, size_px) if isinstance(size_px, int) else size_px
    if min(width, height) < 1:
        raise ValueError(f"size_px must be positive, got {size_px}")
    side = min(width, height)
    offset = rng.uniform(-POSITION_JITTER, POSITION_JITTER, size=2) * side
    radius_px = float(rng.uniform(*RADIUS_RANGE)) * side
    jitter = rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, size=(2, 3))
    ink = np.array(COLOURS[scene.colour], dtype=np.float64) + jitter[0]
    paper = np.array(BACKGROUNDS[scene.background], dtype=np.float64) + jitter[1]
    centre_px = (width / 2 + float(offset[0]), height / 2 + float(offset[1]))
    alpha = coverage(scene.shape, size_px=(width, height), centre_px=centre_px, radius_px=radius_px)[..., None]
    pixels = alpha * ink + (1.0 - alpha) * paper
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8), mode="RGB")


_FORMATS: dict[str, dict[str, object]] = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 95},
    ".webp": {"format": "WEBP", "quality": 95},
}
_OTHER_ASPECT_SHARE = 0.12
_TOO_SMALL_PX = 24
_EXIF_ORIENTATION, _ROTATE_TO_SEE = 0x0112, 6
"""Tag 0x0112 with value 6: whoever shows the file turns it by 90 degrees clockwise."""


def _encoded(image: Image.Image, suffix: str, exif: Image.Exif | None = None) -> bytes:
    buffer = io.BytesIO()
    options = dict(_FORMATS[suffix])
    if exif is not None:
        options["exif"] = exif
    image.save(buffer, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def _picture(scene: Scene, size_px: int, rng: np.random.Generator) -> tuple[str, bytes]:
    """(suffix, file): mostly square, sometimes 4:3 or 3:4 with the shape undistorted; any of the formats."""
    suffix = str(rng.choice(list(_FORMATS)))
    size = (size_px, size_px)
    if rng.random() < _OTHER_ASPECT_SHARE:
        longer, shorter = round(size_px * 1.2), round(size_px * 0.9)
        size = (longer, shorter) if rng.random() < 0.5 else (shorter, longer)
    return suffix, _encoded(render(scene, size, rng), suffix)


def _rotated_picture(scene: Scene, size_px: int, rng: np.random.Generator) -> tuple[str, bytes]:
    """A camera held sideways: stored turned, with the EXIF orientation that turns it back."""
    upright = render(scene, size_px, rng)
    exif = Image.Exif()
    exif[_EXIF_ORIENTATION] = _ROTATE_TO_SEE
    return ".jpg", _encoded(upright.transpose(Image.Transpose.ROTATE_90), ".jpg", exif)


def _file(kind: str, scene: Scene, size_px: int, rng: np.random.Generator) -> tuple[str, bytes]:
    """(suffix, file) of any kind but a duplicate."""
    if kind == "picture":
        return _picture(scene, size_px, rng)
    if kind == "exif_rotated":
        return _rotated_picture(scene, size_px, rng)
    if kind == "truncated":
        whole = _encoded(render(scene, size_px, rng), ".jpg")
        return ".jpg", whole[: len(whole) // 2]
    if kind == "empty":
        return ".png", b""
    if kind == "not_an_image":
        return ".jpg", f"This is a text about {caption(scene)} (number {rng.integers(1 << 30)}).\n".encode()
    if kind == "too_small":
        return ".png", _encoded(render(scene, _TOO_SMALL_PX, rng), ".png")
    raise ValueError(f"unknown kind of file {kind!r}")


def write_folder(path: Path, *, num_images: int, seed: int, size_px: int = 160) -> dict[str, int]:
    """Write a Hugging Face imagefolder of seen scenes: pictures, and the junk that real folders have.

    `num_images` good pictures of `size_px` (>= 128; other aspects keep every side >= 0.9 `size_px`), one of
    them stored sideways with an EXIF orientation; and besides, 2 % each of truncated JPEGs, texts named .jpg,
    exact duplicates and too small pictures, and one empty file (an empty file equals every other, so a second
    would be a duplicate). `metadata.jsonl` (file_name, text) names every file. The same arguments give the
    same bytes. Returns files per kind. The folder appears complete or not at all. Raises FileExistsError if
    `path` holds anything, ValueError for sizes that make no sense.
    """
    if num_images < 2 or size_px < 128:
        raise ValueError(f"need num_images >= 2 and size_px >= 128, got {num_images} and {size_px}")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} is not empty: give a new folder, or remove it")
    rng = np.random.default_rng(seed)
    num_junk = max(1, round(num_images * 0.02))
    kinds = ["picture"] * (num_images - 1) + ["exif_rotated", "empty"]
    for kind in ("truncated", "not_an_image", "duplicate", "too_small"):
        kinds += [kind] * num_junk
    kinds = [str(kind) for kind in rng.permutation(kinds)]
    first = kinds.index("picture")  # what is duplicated must come before its duplicates
    kinds[0], kinds[first] = kinds[first], kinds[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=".tmp", dir=path.parent))
    try:
        scratch.chmod(0o755)  # mkdtemp makes it private, and the folder outlives this process
        _fill(scratch, kinds, size_px, rng)
        scratch.rename(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return dict(sorted(Counter(kinds).items()))


def _fill(path: Path, kinds: list[str], size_px: int, rng: np.random.Generator) -> None:
    seen, _ = split()
    order: list[Scene] = []
    written: list[tuple[str, bytes, str]] = []
    with (path / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for i, kind in enumerate(kinds):
            if kind == "duplicate":
                suffix, data, text = written[int(rng.integers(len(written)))]
            else:
                if not order:  # every scene equally often: one shuffled round after the other
                    order = [seen[j] for j in rng.permutation(len(seen))]
                scene = order.pop()
                text = caption(scene, rng)
                suffix, data = _file(kind, scene, size_px, rng)
                if kind == "picture":
                    written.append((suffix, data, text))
            name = f"{i:05d}{suffix}"
            (path / name).write_bytes(data)
            metadata.write(json.dumps({"file_name": name, "text": text}) + "\n")
