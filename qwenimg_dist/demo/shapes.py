"""The demo's world: one coloured shape on a plain background, and the sentence that says so.

Place in the flow: `demo` renders a folder of these pictures and hands it to `produce` like anybody's photos;
`rewards.shapes` later reads the pixels of what the trained model drew. Variance is low on purpose (position jitter 3 %,
radius 0.26-0.30 of the short side, no words): a 2.5 M transformer learns this world in minutes on a CPU, and a wider
one it does not. Refuses: prompts that do not name exactly one colour, one shape and one background.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

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
    return x**2 + y**2 <= 1.0


def _square(x: FloatArray, y: FloatArray) -> BoolArray:
    return np.maximum(np.abs(x), np.abs(y)) <= _SQUARE_HALF_SIDE


def _triangle(x: FloatArray, y: FloatArray) -> BoolArray:
    slanted_edges = np.sqrt(3.0) / 2.0 * np.abs(x) - 0.5 * y
    return np.maximum(y, slanted_edges) <= _TRIANGLE_INRADIUS


def _cross(x: FloatArray, y: FloatArray) -> BoolArray:
    near, far = np.minimum(np.abs(x), np.abs(y)), np.maximum(np.abs(x), np.abs(y))
    return (near <= _CROSS_ARM) & (far <= _CROSS_REACH)


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
"""(colour, shape) never shown in training, on any background; each colour and each shape is seen otherwise."""

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
    """(seen, held out): the held-out scenes combine a colour and a shape that training never shows together."""
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

    return Scene(
        only("colour", dict(COLOURS)), only("shape", dict(SHAPES)), only("background", dict(BACKGROUNDS))
    )


def coverage(
    shape: str, *, size_px: tuple[int, int], centre_px: tuple[float, float], radius_px: float
) -> FloatArray:
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
    alpha = coverage(scene.shape, size_px=(width, height), centre_px=centre_px, radius_px=radius_px)[
        ..., None
    ]
    pixels = alpha * ink + (1.0 - alpha) * paper
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8), mode="RGB")
