"""The judge of the demo's world: reads from the pixels which shape, in which colour, on which background.

Place in the flow: the demo's report counts its verdicts over sample grids; as the reward `shapes` it grades colour and
shape for GRPO and preference pairs. It looks at pixels only, never at latents. Refuses to guess: what it cannot see
clearly is None, so noise and the grids of an untrained model score near zero.

Method: the border gives the background; pixels far from it are the figure; their median gives the colour; the
figure's outline is compared by overlap with every known shape, drawn at the same centre and area. The grade has slopes
where verdicts have steps: a group of pictures that are all wrong still has better and worse ones to learn from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from qwenimg_dist.demo.shapes import BACKGROUNDS, COLOURS, RGB, SHAPES, FloatArray, Scene, coverage, parse
from qwenimg_dist.rewards.base import Prompt
from qwenimg_dist.rewards.kind import Judge, Kind, Resources, RewardParams

_JUDGED_PX = 96
"""Pictures are brought to this short side: enough for an outline, and the same thresholds at all sizes."""
_BORDER_SHARE = 0.06
_MAX_BORDER_SPREAD = 24.0
"""Mean distance (of 255 per channel) of the border from its median above which there is no plain background."""
_MAX_BACKGROUND_DISTANCE = 70.0
_MAX_COLOUR_DISTANCE = 90.0
_MIN_CONTRAST = 60.0
"""Distance from the background at which a pixel may belong to the figure."""
_FIGURE_SHARES = (0.05, 0.45)
"""Smallest and largest area of a figure, in units of the squared short side; true ones have 0.13 to 0.29."""
_MIN_OVERLAP = 0.70
"""Least soft intersection over union with a shape."""
_PLAIN_COLOUR_DISTANCE = 30.0
"""Up to here a colour is wholly right: closer is the VAE's and the jitter's doing."""
_MARGIN = 0.1
"""By how much the asked shape must overlap better than any other to be wholly right, and worse to be wholly wrong."""
_FAINT_OVERLAP = 0.5
"""An outline that overlaps no more than this is none."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the judge saw; None where it saw nothing clearly."""

    colour: str | None
    shape: str | None
    background: str | None


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What was measured; None where there is no plain background, or no figure on it."""

    paper: FloatArray | None = None
    ink: FloatArray | None = None
    overlaps: dict[str, float] | None = None
    """Shape -> soft intersection over union."""


def _nearest(pixel: FloatArray, palette: dict[str, RGB], limit: float) -> str | None:
    distances = {name: float(np.linalg.norm(pixel - np.array(rgb))) for name, rgb in palette.items()}
    name = min(distances, key=lambda key: distances[key])
    return name if distances[name] <= limit else None


def _overlaps(alpha: FloatArray) -> dict[str, float]:
    """Of the soft mask (height, width) with every shape, at the mask's own centre and area."""
    height, width = alpha.shape
    area = float(alpha.sum())
    centre = (
        float((alpha.sum(axis=0) * (np.arange(width) + 0.5)).sum()) / area,
        float((alpha.sum(axis=1) * (np.arange(height) + 0.5)).sum()) / area,
    )
    overlaps = {}
    for name in SHAPES:  # each has its centroid at its origin
        radius = 20.0 * float(np.sqrt(area / _area_at_20(name)))
        drawn = coverage(name, size_px=(width, height), centre_px=centre, radius_px=radius)
        overlaps[name] = float(np.minimum(alpha, drawn).sum() / np.maximum(alpha, drawn).sum())
    return overlaps


@cache
def _area_at_20(shape: str) -> float:
    """Pixels that the shape covers at a radius of 20."""
    return float(coverage(shape, size_px=(64, 64), centre_px=(32.0, 32.0), radius_px=20.0).sum())


def _look(image: Image.Image) -> _Seen:
    image = image.convert("RGB")
    factor = _JUDGED_PX / min(image.size)
    size = (round(image.width * factor), round(image.height * factor))
    pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR), dtype=np.float64)
    margin = max(1, round(_BORDER_SHARE * _JUDGED_PX))
    inner = np.zeros(pixels.shape[:2], dtype=bool)
    inner[margin:-margin, margin:-margin] = True
    border = pixels[~inner]
    paper = np.median(border, axis=0)
    if float(np.linalg.norm(border - paper, axis=1).mean()) > _MAX_BORDER_SPREAD:
        return _Seen()
    figure = (np.linalg.norm(pixels - paper, axis=2) > _MIN_CONTRAST) & inner
    share = float(figure.sum()) / _JUDGED_PX**2
    if not _FIGURE_SHARES[0] <= share <= _FIGURE_SHARES[1]:
        return _Seen(paper=paper)
    ink = np.median(pixels[figure], axis=0)
    axis = ink - paper
    alpha = np.clip((pixels - paper) @ axis / float(axis @ axis), 0.0, 1.0)
    alpha[alpha < 0.25] = 0.0  # residues of compression around the figure, which would blur its outline
    return _Seen(paper=paper, ink=ink, overlaps=_overlaps(alpha))


def judge(image: Image.Image) -> Verdict:
    """Colour, shape and background of a picture of any size; each None where nothing is found."""
    seen = _look(image)
    if seen.paper is None:
        return Verdict(colour=None, shape=None, background=None)
    background = _nearest(seen.paper, BACKGROUNDS, _MAX_BACKGROUND_DISTANCE)
    if seen.ink is None or seen.overlaps is None:
        return Verdict(colour=None, shape=None, background=background)
    best = max(seen.overlaps, key=seen.overlaps.__getitem__)
    return Verdict(
        colour=_nearest(seen.ink, COLOURS, _MAX_COLOUR_DISTANCE),
        shape=best if seen.overlaps[best] >= _MIN_OVERLAP else None,
        background=background,
    )


def score(image: Image.Image, scene: Scene) -> tuple[bool, bool]:
    """(colour is right, shape is right) for the scene that was asked for; what is not found is not right."""
    verdict = judge(image)
    return verdict.colour == scene.colour, verdict.shape == scene.shape


def grade(image: Image.Image, colour: str, shape: str) -> float:
    """0 to 1: the mean of how right the colour and the shape are. Both halves count, since a colour alone is learned by
    painting it over everything.

    Colour: 1 near the asked one, falling to 0 at the distance at which the judge no longer calls it that. Shape: 1
    where it overlaps better than every other shape by a margin, 0 where worse by one, times how clear its outline is.
    """
    seen = _look(image)
    if seen.ink is None or seen.overlaps is None:
        return 0.0
    distance = float(np.linalg.norm(seen.ink - np.array(COLOURS[colour])))
    right_colour = _ramp(distance, _MAX_COLOUR_DISTANCE, _PLAIN_COLOUR_DISTANCE)
    overlap = seen.overlaps[shape]
    lead = overlap - max(other for name, other in seen.overlaps.items() if name != shape)
    right_shape = _ramp(lead, -_MARGIN, _MARGIN) * _ramp(overlap, _FAINT_OVERLAP, _MIN_OVERLAP)
    return (right_colour + right_shape) / 2


def _ramp(value: float, zero: float, one: float) -> float:
    """0 at `zero`, 1 at `one`, straight between them, and not beyond."""
    return min(1.0, max(0.0, (value - zero) / (one - zero)))


def asked_for(prompt: Prompt) -> tuple[str, str]:
    """(colour, shape): of the metadata `colour` and `shape` where both are there, else of the prompt's own words.

    Raises ValueError for words that this world does not know.
    """
    colour, shape = prompt.metadata.get("colour"), prompt.metadata.get("shape")
    if colour is None or shape is None:
        scene = parse(prompt.text)
        return scene.colour, scene.shape
    if colour not in COLOURS or shape not in SHAPES:
        raise ValueError(f"metadata names {colour!r} and {shape!r}: choose of {', '.join([*COLOURS, *SHAPES])}")
    return str(colour), str(shape)


def _load(params: RewardParams, resources: Resources) -> Judge:
    def judge_all(images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[float]:
        return [grade(image, *asked_for(prompt)) for image, prompt in zip(images, prompts, strict=True)]

    return judge_all


def _refuse(prompt: Prompt, params: RewardParams) -> str | None:
    try:
        asked_for(prompt)
    except ValueError as error:
        return str(error)
    return None


REWARD = Kind(params=RewardParams, load=_load, refuse=_refuse)
