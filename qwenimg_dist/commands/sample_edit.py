"""The condition pictures of `sample`: opened and sized as producers do, so that drawing sees what training saw.

Place in the flow: `sample.py` asks here when `sample.images` names pictures. Text features come from `EditEncoder`, as
producers compute them (and not from the stock pipeline, whose positions of a picture's tokens differ with
transformers 5, see there); given these features, the picture is the stock edit pipelines'. Refuses files that are no
pictures, by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from producers.load import ImageFault, load_image, render
from producers.pictures import area_size
from qwenimg_dist.config import EditEncodeConfig
from qwenimg_dist.data.buckets import SIDE_MULTIPLE, Placement
from qwenimg_dist.schema import Bucket

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from qwenimg_dist.models.text_encoder import TextEncoder
    from qwenimg_dist.models.vae import LatentCodec


def open_images(names: Sequence[str]) -> list[Image.Image]:
    """Upright sRGB pictures. Raises ValueError naming a file that is none."""
    opened = []
    for name in names:
        try:
            opened.append(load_image(Path(name).read_bytes()).image)
        except (OSError, ImageFault) as error:
            raise ValueError(f"sample.images: {name} cannot be opened ({error})") from error
    return opened


def size_of_edit(images: Sequence[Image.Image], side: int) -> tuple[int, int]:
    """(height, width) of about side^2 pixels in the last picture's shape, as the stock pipelines choose it."""
    return area_size(images[-1].height, images[-1].width, side, SIDE_MULTIPLE)


def edit_features(
    encode: EditEncodeConfig, folder: Path, encoder: TextEncoder, images: Sequence[Image.Image], texts: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Instruction -> its features (T, D), the pictures seen."""
    from qwenimg_dist.models.edit_encoder import EditEncoder

    edit_encoder = EditEncoder.load(folder, encoder, template=encode.template)
    seen = [_at_area(image, encode.vision_side) for image in images]
    return {text: edit_encoder.encode([edit_encoder.tokenize(text, seen)])[0] for text in texts}


def condition_latents(codec: LatentCodec, images: Sequence[Image.Image], side: int) -> list[torch.Tensor]:
    """Normalised latents (16, h, w) of each picture, at about side^2 pixels."""
    import torch

    found = []
    for pixels in (_at_area(image, side) for image in images):
        tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1.0
        found.append(codec.encode(tensor.to(codec.vae.device))[0][0])
    return found


def _at_area(image: Image.Image, side: int) -> npt.NDArray[np.uint8]:
    height, width = area_size(image.height, image.width, side)
    bucket = Bucket(height=height, width=width)
    return render(image, Placement(bucket=bucket, resized=(height, width), crop=(0, 0)))
