"""What reading a picture's text costs on one core: the engine of the filter `ocr` with its defaults, one thread.

Pictures are a photograph (scikit-image's astronaut) at preview size and at 1328 px, alone and with lines of text on it.

python tests/bench/ocr.py [--quick] [--repeats 5] [--out FILE]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import matplotlib
from harness import Figures, Report, interleaved, num_repeats, parser, timed
from PIL import Image, ImageDraw, ImageFont
from skimage import data

from qwenimg_dist.models.ocr import OcrEngine

FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def picture(side: int, num_lines: int) -> Image.Image:
    """The photograph with this many lines of about 24 letters over it."""
    image = Image.fromarray(data.astronaut()).resize((side, side), Image.Resampling.BICUBIC)
    font = ImageFont.truetype(str(FONT), side // 26)
    for number in range(num_lines):
        at = (side // 20, int(side * (0.03 + 0.95 * number / max(1, num_lines))))
        ImageDraw.Draw(image).text(at, f"line {number} of what is written", fill="white", stroke_width=2, font=font)
    return image


def reading(engine: OcrEngine, image: Image.Image, times: int) -> Callable[[], Figures]:
    def once() -> Figures:
        with timed() as clock:
            for _ in range(times):
                found = engine.read(image)
        return {"lines": float(len(found)), "CPU ms": 1000 * clock.cpu_s / times}

    return once


def main() -> int:
    args = parser(__doc__, repeats=5).parse_args()
    cv2.setNumThreads(1)
    engine = OcrEngine(num_threads=1)
    sides, lines = ((512,), (0, 2)) if args.quick else ((512, 1328), (0, 2, 12))
    variants = {
        f"{side} px, {num} lines": reading(engine, picture(side, num), times=1 if args.quick else 2)
        for side in sides
        for num in lines
    }
    report = Report(name="ocr", what="CPU time to find and read the text of one picture, one thread")
    for name, repeats in interleaved(variants, repeats=num_repeats(args)).items():
        report.add(name, repeats)
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(main())
