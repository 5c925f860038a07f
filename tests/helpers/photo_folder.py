"""A folder as people have them: mixed sizes, formats, orientations and caption styles, with damage among it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qwenimg_dist.demo.photos import generic_picture


@dataclass
class PhotoFolder:
    """What was written: `upright` is what a person sees, `reasons` why the others must be lost; both by path."""

    root: Path
    upright: dict[str, Image.Image] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    num_files: int = 0


def photo(number: int, width: int, height: int) -> Image.Image:
    return generic_picture(np.random.default_rng(number), max(width, height)).crop((0, 0, width, height))


def write_photo_folder(root: Path) -> PhotoFolder:
    made = PhotoFolder(root=root)
    (root / "trip").mkdir(parents=True)
    _write_sound(made)
    _write_damaged(made)
    with open(root / "trip" / "metadata.jsonl", "w") as lines:
        for name, captions in {"list.png": ["two captions", "of one picture"], "gone.jpg": ["nobody home"]}.items():
            lines.write(json.dumps({"file_name": name, "captions": captions}) + "\n")
    made.reasons["trip/gone.jpg"] = "missing_file"
    made.num_files = len([f for f in root.rglob("*") if f.is_file() and f.suffix not in (".txt", ".jsonl", ".md")])
    (root / "README.md").write_text("no picture")
    return made


def _write_sound(made: PhotoFolder) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: stored turned, 90 degrees clockwise to be turned back
    pictures: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("plain.jpg", photo(1, 200, 150), {"quality": 95}),
        ("SHOUTING.JPG", photo(2, 160, 240), {"quality": 95}),
        ("lossless.png", photo(3, 256, 144), {}),
        ("web.webp", photo(4, 150, 150), {"quality": 95}),
        ("scan.tif", photo(5, 180, 180), {}),
        ("old.bmp", photo(6, 140, 200), {}),
        ("trip/list.png", photo(7, 300, 200), {}),
        (os.fsdecode(b"na\xefve.png"), photo(8, 144, 144), {}),
    ]
    for name, picture, options in pictures:
        picture.save(made.root / name, **options)
        made.upright[name] = picture
    sideways = photo(9, 150, 220)
    sideways.transpose(Image.Transpose.ROTATE_90).save(made.root / "phone.jpg", quality=95, exif=exif)
    made.upright["phone.jpg"] = sideways
    photo(10, 160, 160).convert("CMYK").save(made.root / "print.jpg", quality=95)
    made.upright["print.jpg"] = Image.open(made.root / "print.jpg").convert("RGB")
    clear = photo(11, 160, 160).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize((160, 160)))
    clear.save(made.root / "logo.png")
    made.upright["logo.png"] = Image.composite(
        clear.convert("RGB"), Image.new("RGB", (160, 160), "white"), clear.getchannel("A")
    )
    grey = photo(12, 160, 160).convert("L")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(made.root / "xray.png")
    made.upright["xray.png"] = grey.convert("RGB")
    for name in made.upright:
        if name != "trip/list.png":
            (made.root / name).with_suffix(".txt").write_text(f"a picture called {Path(name).stem!a}")


def _write_damaged(made: PhotoFolder) -> None:
    whole = (made.root / "plain.jpg").read_bytes()
    frames = [photo(20, 100, 100), photo(21, 100, 100)]
    frames[0].save(made.root / "moving.gif", save_all=True, append_images=frames[1:])
    photo(22, 40, 40).save(made.root / "small.png")
    photo(23, 800, 100).save(made.root / "strip.png")
    photo(24, 128, 128).save(made.root / "nameless.png")
    damaged = {
        "copy.jpg": whole,
        "cut.jpg": whole[: len(whole) // 2],
        "zero.jpg": b"",
        "letter.jpg": b"dear all, " * 99,
    }
    for name, data in damaged.items():
        (made.root / name).write_bytes(data)
    made.reasons |= {
        "moving.gif": "animated",
        "small.png": "too_small",
        "strip.png": "extreme_aspect",
        "nameless.png": "no_caption",
        "cut.jpg": "truncated",
        "zero.jpg": "empty_file",
        "letter.jpg": "not_an_image",
        "plain.jpg": "duplicate",  # of copy.jpg, which comes before it
    }
    for name in made.reasons:
        if name != "nameless.png":
            (made.root / name).with_suffix(".txt").write_text(f"a damaged picture called {Path(name).stem}")
    (made.root / "copy.txt").write_text("a copy")
    made.upright["copy.jpg"] = made.upright.pop("plain.jpg")
