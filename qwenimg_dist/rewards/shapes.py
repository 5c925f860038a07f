"""The judge of the demo's world: reads from the pixels which shape, in which colour, on which background.

Place in the flow: the demo's report counts its verdicts over sample grids; later it is the rule reward of
GRPO and the ranking of preference pairs. It looks at pixels only, never at latents or prompts. Refuses to
guess: what it cannot see clearly is None, so noise and the grids of an untrained model score near zero.

Method: the border gives the background; pixels far from it are the figure; their median gives the colour; the
figure's outline is compared by overlap with every known shape, drawn at the same centre and area.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from qwenimg_dist.demo.shapes import BACKGROUNDS, COLOURS, RGB, SHAPES, FloatArray, Scene, coverage

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


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the judge saw; None where it saw nothing clearly."""

    colour: str | None
    shape: str | None
    background: str | None


def _nearest(pixel: FloatArray, palette: dict[str, RGB], limit: float) -> str | None:
    distances = {name: float(np.linalg.norm(pixel - np.array(rgb))) for name, rgb in palette.items()}
    name = min(distances, key=lambda key: distances[key])
    return name if distances[name] <= limit else None


def _best_shape(alpha: FloatArray) -> str | None:
    """The shape that overlaps best with the soft mask (height, width), at the mask's own centre and area."""
    height, width = alpha.shape
    area = float(alpha.sum())
    centre = (
        float((alpha.sum(axis=0) * (np.arange(width) + 0.5)).sum()) / area,
        float((alpha.sum(axis=1) * (np.arange(height) + 0.5)).sum()) / area,
    )
    overlaps = {}
    for name in SHAPES:  # each has its centroid at its origin
        unit = coverage(name, size_px=(64, 64), centre_px=(32.0, 32.0), radius_px=20.0)
        radius = 20.0 * float(np.sqrt(area / unit.sum()))
        drawn = coverage(name, size_px=(width, height), centre_px=centre, radius_px=radius)
        overlaps[name] = float(np.minimum(alpha, drawn).sum() / np.maximum(alpha, drawn).sum())
    best = max(overlaps, key=lambda key: overlaps[key])
    return best if overlaps[best] >= _MIN_OVERLAP else None


def judge(image: Image.Image) -> Verdict:
    """Colour, shape and background of a picture of any size; each None where nothing is found."""
    image = image.convert("RGB")
    factor = _JUDGED_PX / min(image.size)
    size = (round(image.width * factor), round(image.height * factor))
    pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR), dtype=np.float64)
    margin = max(1, round(_BORDER_SHARE * _JUDGED_PX))
    inner = np.zeros(pixels.shape[:2], dtype=bool)
    inner[margin:-margin, margin:-margin] = True
    border = pixels[~inner]
    paper = np.median(border, axis=0)
    nothing = Verdict(colour=None, shape=None, background=None)
    if float(np.linalg.norm(border - paper, axis=1).mean()) > _MAX_BORDER_SPREAD:
        return nothing
    background = _nearest(paper, BACKGROUNDS, _MAX_BACKGROUND_DISTANCE)
    figure = (np.linalg.norm(pixels - paper, axis=2) > _MIN_CONTRAST) & inner
    share = float(figure.sum()) / _JUDGED_PX**2
    if not _FIGURE_SHARES[0] <= share <= _FIGURE_SHARES[1]:
        return Verdict(colour=None, shape=None, background=background)
    ink = np.median(pixels[figure], axis=0)
    axis = ink - paper
    alpha = np.clip((pixels - paper) @ axis / float(axis @ axis), 0.0, 1.0)
    alpha[alpha < 0.25] = 0.0  # residues of compression around the figure, which would blur its outline
    colour = _nearest(ink, COLOURS, _MAX_COLOUR_DISTANCE)
    return Verdict(colour=colour, shape=_best_shape(alpha), background=background)


def score(image: Image.Image, scene: Scene) -> tuple[bool, bool]:
    """(colour is right, shape is right) for the scene that was asked for; what is not found is not right."""
    verdict = judge(image)
    return verdict.colour == scene.colour, verdict.shape == scene.shape
