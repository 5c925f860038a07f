"""Each classical filter on pixels: milliseconds per picture, against decoding the picture.

Photographs of scikit-image, enlarged to a long side of 1536 px and stored as JPEG, one core. The preview (512 px) and
its grey version are made once for all filters and stand on their own line.

    python tests/bench/filters.py [--quick] [--out FILE]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import cv2
from harness import Figures, Report, interleaved, num_repeats, parser, timed
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))
from hostile_folder import encoded
from photographs import PHOTOGRAPHS, bound, photograph

from producers.filters import FILTERS
from producers.filters.base import Facts
from producers.load import load_image

SIDE = 1536


def large(name: str) -> bytes:
    """The photograph as JPEG with a long side of 1536 px."""
    image = Image.fromarray(photograph(name))
    factor = SIDE / max(image.size)
    return encoded(image.resize((round(image.width * factor), round(image.height * factor))), "JPEG", quality=90)


def facts_of(data: bytes) -> Facts:
    image = load_image(data).image
    return Facts(num_bytes=len(data), width=image.width, height=image.height, num_frames=1, image=image)


def main() -> int:
    args = parser(__doc__, repeats=5).parse_args()
    cv2.setNumThreads(1)
    files = [large(name) for name in (PHOTOGRAPHS[:4] if args.quick else PHOTOGRAPHS)]
    ready = [facts_of(data) for data in files]
    for facts in ready:
        assert facts.grey.size > 0  # makes the preview too

    def per_picture(work: Callable[[int], object]) -> Callable[[], Figures]:
        def run() -> Figures:
            with timed() as clock:
                for index in range(len(files)):
                    work(index)
            return {"CPU ms per picture": 1000 * clock.cpu_s / len(files)}

        return run

    variants = {"decode": per_picture(lambda index: load_image(files[index]))}
    variants["preview and grey"] = per_picture(lambda index: bare(ready[index]).grey)
    classical = [name for name, one in FILTERS.items() if one.looks_at == "pixels" and one.score is not None]
    for name in classical:
        one = bound(name)
        variants[name] = per_picture(lambda index, one=one: one.score(ready[index]))  # type: ignore[misc]
    report = Report(name="filters", what="classical filters against decoding a 1536 px JPEG")
    report.settings = {"pictures": len(files), "side_px": SIDE}
    for name, repeats in interleaved(variants, repeats=num_repeats(args)).items():
        report.add(name, repeats)
    for name in ("preview and grey", *classical):
        report.add_ratio(f"{name} / decode", "CPU ms per picture", name, "decode")
    return report.finish(args)


def bare(facts: Facts) -> Facts:
    """The same picture, nothing made of it yet."""
    return Facts(num_bytes=facts.num_bytes, width=facts.width, height=facts.height, image=facts.image)


if __name__ == "__main__":
    sys.exit(main())
