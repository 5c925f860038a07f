"""Reads the text of a picture with RapidOCR (PP-OCR, English and Chinese), line by line, on the CPU.

Place in the flow: the `ocr` filter measures text with it, and a reward on rendered text reads what was drawn. The
models are those that the `rapidocr` wheel carries; nothing is downloaded. Vertical and upside-down lines are found, but
read badly; a line in another script is found and not read. Refuses a wheel with other models than `MODELS`: it would
read otherwise.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

MODELS: Final = "PP-OCRv6"
"""Other models read otherwise: the filter's `version` is to be raised with it."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of text."""

    text: str | None
    """What was read, perhaps nothing; None if it was not tried."""
    confidence: float
    """Of the reading, 0 to 1."""
    found: float
    """The detector's confidence that there is text, 0 to 1."""
    corners: npt.NDArray[np.float32]
    """(4, 2) x, y in shares of the picture's width and height; from the text's top left, clockwise."""
    height: float
    """Shorter side of the box, in shares of the picture's shorter side."""

    @property
    def area(self) -> float:
        """Share of the picture that the box covers (shoelace formula)."""
        x, y = self.corners.T
        return float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)


def model_files() -> tuple[Path, Path]:
    """The detector and the reader that the installed wheel carries. Raises ValueError saying what to install."""
    found = importlib.util.find_spec("rapidocr")
    if found is None or found.origin is None:
        raise ValueError("rapidocr is not installed: pip install 'qwenimg-dist[ocr]'")
    folder = Path(found.origin).parent / "models"
    detectors, readers = (sorted(folder.glob(f"{MODELS}_{kind}_*.onnx")) for kind in ("det", "rec"))
    if len(detectors) != 1 or len(readers) != 1:
        there = ", ".join(file.name for file in sorted(folder.glob("*.onnx"))) or "none"
        raise ValueError(
            f"{folder}: expected one detector and one reader of {MODELS}, found {there}; "
            "pip install --force-reinstall 'qwenimg-dist[ocr]'"
        )
    return detectors[0], readers[0]


class OcrEngine:
    """The loaded models. `read` may be called for one picture after the other, not from several threads."""

    def __init__(self, *, num_threads: int = 1, detect_side: int = 736, read_side: int = 1536, max_lines: int = 48):
        """Text is looked for at a long side of `detect_side` px and read at one of at most `read_side` px. Of more than
        `max_lines` lines the highest are read: each costs about a tenth of what a small picture without text costs.

        Raises ValueError if the models are not there.
        """
        detector, reader = model_files()
        from rapidocr import RapidOCR

        self._read_side = read_side
        self._max_lines = max_lines
        self._engine: Any = RapidOCR(
            params={
                "Global.log_level": "error",
                "Global.use_vertical_padding": False,  # boxes stay those of the given picture
                "Det.model_path": str(detector),
                "Det.limit_type": "max",
                "Det.limit_side_len": detect_side,
                "Rec.model_path": str(reader),
                # More than the machine has would be ignored, and mean all of them.
                "EngineConfig.onnxruntime.intra_op_num_threads": min(num_threads, os.cpu_count() or 1),
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    def read(self, image: Image.Image) -> list[Line]:
        """The lines of an RGB picture, roughly from top to bottom and left to right."""
        from rapidocr.main import RapidOCRError

        small = image
        if max(image.size) > self._read_side:
            small = image.copy()
            small.thumbnail((self._read_side, self._read_side), Image.Resampling.BICUBIC, reducing_gap=2.0)
        pixels = np.ascontiguousarray(np.asarray(small.convert("RGB"))[:, :, ::-1])
        try:
            crops, found = self._engine.detect_and_crop(pixels, {})
        except RapidOCRError:  # its way to say that there is no text
            return []
        boxes = np.asarray(found.boxes, dtype=np.float32)
        heights = np.minimum(_lengths(boxes, 1), _lengths(boxes, 2))
        texts: list[tuple[str | None, float]] = [(None, 0.0)] * len(boxes)
        chosen = sorted(np.argsort(-heights, kind="stable")[: self._max_lines].tolist())
        for index, read in zip(chosen, self._read_crops([crops[index] for index in chosen]), strict=True):
            texts[index] = read
        size = np.array(small.size, dtype=np.float32)
        return [
            Line(
                text=text,
                confidence=confidence,
                found=float(score),
                corners=box / size,
                height=float(height / size.min()),
            )
            for (text, confidence), score, box, height in zip(texts, found.scores, boxes, heights, strict=True)
        ]

    def _read_crops(self, crops: list[npt.NDArray[np.uint8]]) -> list[tuple[str, float]]:
        read = self._engine.recognize_txt(crops)
        return [(text.strip(), float(score)) for text, score in zip(read.txts, read.scores, strict=True)]


def full_text(lines: Sequence[Line]) -> str:
    """What was read, line by line."""
    return "\n".join(line.text for line in lines if line.text)


def _lengths(boxes: npt.NDArray[np.float32], neighbour: int) -> npt.NDArray[np.float32]:
    """(B,) length of the side between each box's corner `neighbour - 1` and the next."""
    sides: npt.NDArray[np.float32] = np.linalg.norm(boxes[:, neighbour] - boxes[:, neighbour - 1], axis=-1)
    return sides
