"""Rejects pictures with QR codes or bar codes in them. Scores: `qr_codes` and `barcodes`, how many were found.

OpenCV's detectors. QR codes count once their finder patterns are located, readable or not. Bar codes (EAN, UPC) count
only if they are read, with five different digits or more: fences and shutters are located as bar codes too, and even
read as 111121112111 with a valid check digit. Asked on the preview (long side 512 px): QR codes are found from 2 px per
module, bar codes from about 180 px of width; smaller ones are not.
"""

from __future__ import annotations

from typing import Final

import cv2
from pydantic import NonNegativeInt

from producers.filters.base import Facts, Filter, FilterParams, Rejection, Value, Values, number

_MIN_DIGITS: Final = 5


class Params(FilterParams):
    max_codes: NonNegativeInt = 0
    """QR codes and bar codes together."""


def score(facts: Facts) -> dict[str, Value]:
    # Made anew each time: a microsecond, and detectors hold state that threads may not share.
    qr_found, qr_corners = cv2.QRCodeDetectorAruco().detectMulti(facts.grey)
    _, texts, _, _ = cv2.barcode.BarcodeDetector().detectAndDecodeWithType(facts.grey)
    return {
        "qr_codes": float(len(qr_corners)) if qr_found else 0.0,
        "barcodes": float(sum(len(set(text)) >= _MIN_DIGITS for text in texts)),
    }


def admit(values: Values, params: Params) -> Rejection | None:
    num_qr, num_bars = int(number(values, "qr_codes")), int(number(values, "barcodes"))
    if num_qr + num_bars > params.max_codes:
        return Rejection(
            reason="qr_code" if num_qr else "barcode",
            detail=f"{num_qr} QR codes and {num_bars} bar codes > max_codes={params.max_codes}",
        )
    return None


FILTER = Filter(params=Params, stage=5, looks_at="pixels", scores=("qr_codes", "barcodes"), score=score, admit=admit)
