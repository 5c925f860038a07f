"""The words both sides share: versions, facet names, columns of each facet, keys, buckets.

A data set directory (see `data/facets.py` for how parts are committed):

    dataset.json                      schema version, unit size; written once
    listing/unit-000000.000.parquet   the source as it was seen: row, key, uri, captions
    scan/...                          cheap facts of every file: bytes, sha256, header, perceptual hash
    captions-<id>/...                 which rows have a caption that the caption filters leave; <id>: of these filters
    dedup-<id>/...                    duplicate_of, settled in source order among those rows (`dedup`: among all)
    near-<distance>-<id>/...          near duplicates, settled in source order; <id>: of what takes part
    rows/...                          the decision on every row: status, reason, scores and labels
    text-<id>/...                     one sample per distinct caption, unpadded features
    latents-<resolution>-<id>/...     one sample per admitted row, normalised posterior
    source-complete.json              exists when the source is known to be listed to its end
    source.json                       kind and root of the source that was last read; for looking only

`row` is the position in the listing (global, stable); unit = row // unit_size. A later part of a unit adds rows, or
supersedes earlier rows of the same number (changed captions).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import pyarrow as pa

SCHEMA_VERSION: Final = 1

LISTING: Final = "listing"
SCAN: Final = "scan"
DEDUP: Final = "dedup"
"""Exact duplicates among all rows with a caption; `dedup-<id>` among those whose captions these filters leave."""
CAPTIONS_PREFIX: Final = "captions-"
ROWS: Final = "rows"
NEAR_PREFIX: Final = "near-"
DUPLICATE: Final = "duplicate"
NEAR_DUPLICATE: Final = "near_duplicate"
TOO_SMALL: Final = "too_small"
"""Reason of a row that looks like a kept one."""
SOURCE_COMPLETE: Final = "source-complete.json"

KEY_PATTERN: Final = re.compile(r"^[A-Za-z0-9_-]+\Z")

Status = Literal["kept", "rejected", "fault"]

Kind = Literal["image", "edit", "preference", "prompt"]
"""What a row is. `image`: a picture and its captions. `preference`: the chosen picture, one rejected picture, a prompt.
`edit`: the target picture, one or more condition pictures, instructions. `prompt`: text alone."""
IMAGE: Final[Kind] = "image"
EDIT: Final[Kind] = "edit"
PREFERENCE: Final[Kind] = "preference"
PROMPT: Final[Kind] = "prompt"
KINDS: Final[tuple[Kind, ...]] = (IMAGE, EDIT, PREFERENCE, PROMPT)


def text_facet(fingerprint: str) -> str:
    """Name of the text facet made by the encoder with this fingerprint."""
    return f"text-{fingerprint}"


def latents_facet(resolution: int, fingerprint: str) -> str:
    """Name of the latents facet of one resolution class (px) made by the encoder with this fingerprint."""
    return f"latents-{resolution}-{fingerprint}"


def near_facet(distance: int, fingerprint: str) -> str:
    """Name of the facet of near duplicates up to this Hamming distance; `fingerprint` says which rows take part."""
    return f"{NEAR_PREFIX}{distance}-{fingerprint}"


def dedup_facet(fingerprint: str | None) -> str:
    """Name of the facet of exact duplicates; `fingerprint` is that of the caption filters, None without any."""
    return DEDUP if fingerprint is None else f"{DEDUP}-{fingerprint}"


def is_dedup(facet: str) -> bool:
    """Whether the facet holds exact duplicates."""
    return facet == DEDUP or facet.startswith(f"{DEDUP}-")


def row_key(uri: str, repeat: int = 0) -> str:
    """Sample key of a row: a pure function of the uri (relative to the source), so that order does not matter.

    `repeat` counts earlier rows of the same uri in the listing (manifests may name a file twice).
    """
    text = uri if repeat == 0 else f"{uri}\0{repeat}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:20]


def row_identity(kind: Kind, uris: Sequence[str], captions: Sequence[str]) -> str:
    """What `row_key` is made of: an image's uri; else kind and all uris in order, and the text where it tells rows
    apart: the same pair under another prompt is another preference."""
    if kind == IMAGE:
        return uris[0]
    text = captions if kind in (PREFERENCE, PROMPT) else ()
    return "\0" + json.dumps([kind, list(uris), list(text)])  # no file name has a NUL


def condition_name(index: int) -> str:
    """Name of the tensor with the latents of an edit's condition picture, counted from 0."""
    return f"condition_{index}"


def role_of(kind: Kind, index: int) -> str:
    """What the index-th picture of a row is; the first is the row's own, the others are further pictures."""
    if kind == EDIT:
        return "target" if index == 0 else condition_name(index - 1)
    if kind == PREFERENCE:
        return ("chosen", "rejected")[index]
    return "image"


def caption_key(caption: str) -> str:
    """Sample key of a caption's text features: a hash of its exact characters. The empty prompt has one too."""
    return "t" + hashlib.sha256(caption.encode("utf-8", "surrogatepass")).hexdigest()[:20]


def edit_caption_key(instruction: str, sha256s: Sequence[str]) -> str:
    """Sample key of an edit's text features, which saw its condition pictures: instruction and pictures, in order."""
    text = json.dumps([instruction, *sha256s])
    return "e" + hashlib.sha256(text.encode()).hexdigest()[:20]


@dataclass(frozen=True, kw_only=True, order=True)
class Bucket:
    """Pixel sizes of the pictures of one batch; all sides are multiples of 16."""

    height: int
    width: int
    conditions: tuple[tuple[int, int], ...] = ()
    """(height, width) of each condition picture of an edit, in order: another number or size is another bucket."""

    @property
    def image_tokens(self) -> int:
        """Tokens of the picture that is drawn, and trained on: (height / 16) * (width / 16)."""
        return (self.height // 16) * (self.width // 16)

    @property
    def tokens(self) -> int:
        """Image tokens of one sample that a forward computes: those of the conditions come behind `image_tokens`."""
        return self.image_tokens + sum((height // 16) * (width // 16) for height, width in self.conditions)

    def __str__(self) -> str:
        return "+".join(f"{width}x{height}" for height, width in ((self.height, self.width), *self.conditions))


LISTING_COLUMNS: Final = pa.schema(
    [
        ("row", pa.int64()),
        ("key", pa.string()),
        ("uri", pa.string()),  # relative to the source's root, `/` as separator
        ("captions", pa.list_(pa.string())),
        ("caption_fault", pa.string()),  # null, or why there is no caption
        ("caption_kinds", pa.list_(pa.string())),  # beside `captions`; null, or no such column: all are `raw`
        ("kind", pa.string()),  # null: `image`
        ("others", pa.list_(pa.string())),  # uris of the further pictures, their roles fixed by the kind; null: none
        ("meta", pa.string()),  # null, or JSON that came with the row
        ("labels", pa.string()),  # null, or JSON: name -> text or number that the source gives
        ("fault_detail", pa.string()),  # null, or file, line and reason of a row that is none
    ]
)

_FILE_FACTS = [
    ("bytes", pa.int64()),
    ("sha256", pa.string()),  # null where the file could not be read
    ("format", pa.string()),
    ("mode", pa.string()),
    ("width", pa.int32()),  # upright, after EXIF orientation; 0 where unknown
    ("height", pa.int32()),
    ("orientation", pa.int8()),
]

SCAN_COLUMNS: Final = pa.schema(
    [
        ("row", pa.int64()),
        *_FILE_FACTS,
        ("fault", pa.string()),  # null, or a reason code such as `unreadable`, `not_an_image`
        ("detail", pa.string()),
        ("others", pa.list_(pa.struct(_FILE_FACTS))),  # of the further pictures; null: none
        ("phash", pa.int64()),  # 64 bits, of images; null where it could not be made, or no such column
    ]
)

DEDUP_COLUMNS: Final = pa.schema([("row", pa.int64()), ("duplicate_of", pa.int64())])  # -1: kept

CAPTIONS_COLUMNS: Final = pa.schema([("row", pa.int64()), ("fit", pa.bool_())])

# Rows of one copy with a hash, of those that take part; the hash stands here too, so that the index loads from this
# facet alone.
NEAR_COLUMNS: Final = pa.schema(
    [
        ("row", pa.int64()),
        ("near_duplicate_of", pa.int64()),  # -1: kept; else the nearest kept row
        ("distance", pa.int8()),  # bits in which the two hashes differ; -1 where kept
        ("phash", pa.int64()),
    ]
)

SCORE_PREFIX: Final = "score_"
LABEL_PREFIX: Final = "label_"

# `rows` has these, then a float column `score_<name>` per score and a text column `label_<name>` per label.
ROWS_COLUMNS: Final = pa.schema(
    [
        ("row", pa.int64()),
        ("key", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),  # empty where kept; else the filter's code, for example `too_small`
        ("detail", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("caption_faults", pa.list_(pa.string())),  # beside the listed captions, empty where fit; null: all are fit
    ]
)

# Columns that parts written before there was one do without.
OPTIONAL_COLUMNS: Final = frozenset(
    {"phash", "caption_kinds", "caption_faults", "kind", "others", "meta", "further", "labels", "fault_detail"}
)

RAW: Final = "raw"
"""Kind of a caption that came with the picture; other kinds are the source's own words (`recaption`, `fused`)."""

# Where a sample's tensor lies: `offset` and `nbytes` are of the raw tensor data inside the tar.
_PLACE = [
    ("tar", pa.string()),
    ("offset", pa.int64()),
    ("nbytes", pa.int64()),
    ("dtype", pa.string()),
    ("shape", pa.list_(pa.int32())),
]

TEXT_COLUMNS: Final = pa.schema([("key", pa.string()), ("num_tokens", pa.int32()), *_PLACE])

LATENTS_COLUMNS: Final = pa.schema(
    [
        ("row", pa.int64()),
        ("key", pa.string()),
        ("bucket_height", pa.int32()),
        ("bucket_width", pa.int32()),
        ("resized_height", pa.int32()),
        ("resized_width", pa.int32()),
        ("crop_top", pa.int32()),
        ("crop_left", pa.int32()),
        *_PLACE,
        # The sample's other tensors, in the same tar: `logvar`, `rejected`, `condition_0`; null: none.
        ("further", pa.list_(pa.struct([("name", pa.string()), *_PLACE[1:]]))),
    ]
)
