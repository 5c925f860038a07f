"""Data sets with fake encoders: the real `Dataset` and `ShardWriter`, and tensors that numpy derives from the key.

`FakeProducer` follows the unit protocol of the real one (listing, scan, dedup, text, latents, `rows` last), so that
the consumers' side is tested on what it will meet: several parts, rejected rows, added resolutions, new captions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from qwenimg_dist.data.catalog import RunFacets
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.data.shards import RawTensor, ShardWriter
from qwenimg_dist.schema import (
    DEDUP,
    DEDUP_COLUMNS,
    EDIT,
    IMAGE,
    LATENTS_COLUMNS,
    LISTING,
    LISTING_COLUMNS,
    PREFERENCE,
    PROMPT,
    ROWS,
    ROWS_COLUMNS,
    SCAN,
    SCAN_COLUMNS,
    SOURCE_COMPLETE,
    TEXT_COLUMNS,
    Bucket,
    caption_key,
    edit_caption_key,
    latents_facet,
    row_key,
    text_facet,
)

WIDTH = 8
CHANNELS = 16
ASPECTS = ((1, 1), (1, 2), (2, 1))


@dataclass(frozen=True, kw_only=True)
class FakeRow:
    uri: str
    captions: tuple[str, ...]
    width: int = 256
    height: int = 256
    status: str = "kept"
    score: float = 1.0

    @property
    def key(self) -> str:
        return row_key(self.uri)


def bucket_of(row: FakeRow, resolution: int) -> Bucket | None:
    """The bucket of a picture at a resolution; None where it is too small."""
    if min(row.width, row.height) < resolution:
        return None
    wide, high = min(ASPECTS, key=lambda a: abs(row.width / row.height - a[0] / a[1]))
    return Bucket(height=resolution * high // max(wide, high), width=resolution * wide // max(wide, high))


def num_tokens(caption: str) -> int:
    """Tokens of a caption: its words, and 2 as a template would add."""
    return len(caption.split()) + 2


def to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 -> the upper half of its bits."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def fake_latents(key: str, bucket: Bucket) -> np.ndarray:
    """(16, h/8, w/8) fp32, exact in bf16."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")
    shape = (CHANNELS, bucket.height // 8, bucket.width // 8)
    return np.random.default_rng(seed + bucket.height).integers(-8, 8, shape).astype(np.float32)


def fake_logvar(key: str, bucket: Bucket) -> np.ndarray:
    """(16, h/8, w/8) fp32, exact in bf16; another for each sample."""
    return fake_latents(key, bucket)[::-1] / 4 - 2


def fake_rejected(key: str, bucket: Bucket) -> np.ndarray:
    """As `fake_latents`: the other picture of a pair."""
    return fake_latents(f"{key}, rejected", bucket)


def fake_features(caption: str) -> np.ndarray:
    """(T, WIDTH) fp32, exact in bf16."""
    seed = int.from_bytes(hashlib.sha256(caption.encode()).digest()[:4], "little")
    return np.random.default_rng(seed).integers(-8, 8, (num_tokens(caption), WIDTH)).astype(np.float32)


def picture_hashes(row: FakeRow) -> list[str]:
    """sha256 of an edit's condition pictures: one or two of them."""
    number = int(row.uri.rpartition("/")[2].partition(".")[0])
    return [f"{k}{row.key}" for k in range(1 + number % 2)]


def condition_sizes(row: FakeRow, resolution: int) -> list[tuple[int, int]]:
    """(height, width) of them at a class: of several shapes, and another one each."""
    number = int(row.uri.rpartition("/")[2].partition(".")[0])
    shapes = ((1, 1), (1, 2), (2, 1))
    picked = [shapes[(number // 2 + 2 * k) % 3] for k in range(len(picture_hashes(row)))]
    return [(max(32, resolution * high // 2), max(32, resolution * wide // 2)) for high, wide in picked]


def fake_condition(row: FakeRow, index: int, resolution: int) -> np.ndarray:
    """As `fake_latents`: a condition picture of an edit."""
    height, width = condition_sizes(row, resolution)[index]
    return fake_latents(f"{row.key}, condition {index}", Bucket(height=height, width=width))


def seen_with(caption: str, hashes: Sequence[str]) -> str:
    """What stands for an instruction and its pictures where features are made; a token per picture."""
    return " ".join([caption, *hashes]).strip()


def facets_for(resolutions: Sequence[int], fingerprint: str = "0123456789ab") -> RunFacets:
    """Facet names as a run would ask for them."""
    return RunFacets(text=text_facet(fingerprint), latents={r: latents_facet(r, fingerprint) for r in resolutions})


class FakeProducer:
    """Writes units. `rows` is the source; `produce` does what is missing, unit by unit, as the real one does."""

    def __init__(
        self,
        root: Path,
        *,
        unit_size: int = 4,
        resolutions: Sequence[int] = (32,),
        fingerprint: str = "0123456789ab",
        max_shard_bytes: int = 1 << 20,
        dtype: str = "bfloat16",
        logvar: bool = False,
        pairs: bool = False,
        prompts: bool = False,
        edits: bool = False,
    ) -> None:
        """With `pairs` its rows are preferences: chosen ones, each with a rejected picture. With `prompts` they are
        texts alone, of which runs draw pictures at `resolutions`. With `edits` they are targets, each with one or two
        condition pictures."""
        self.dataset = Dataset.create(root, unit_size)
        self.facets = facets_for(resolutions, fingerprint)
        self.rows: list[FakeRow] = []
        self.max_shard_bytes = max_shard_bytes
        self.dtype = dtype
        self.logvar = logvar
        self.pairs = pairs
        if pairs:
            self.facets = replace(self.facets, kind=PREFERENCE, further=("rejected",))
        if prompts:
            self.facets = replace(self.facets, kind=PROMPT, latents={}, drawn=tuple(resolutions))
        self.edits = edits
        if edits:
            self.facets = replace(self.facets, kind=EDIT)

    def add(self, rows: Sequence[FakeRow]) -> None:
        self.rows.extend(rows)

    def recaption(self, index: int, captions: tuple[str, ...]) -> None:
        self.rows[index] = replace(self.rows[index], captions=captions)

    @property
    def num_units(self) -> int:
        return -(-len(self.rows) // self.dataset.unit_size)

    def unit_rows(self, unit: int) -> dict[int, FakeRow]:
        size = self.dataset.unit_size
        return dict(list(enumerate(self.rows))[unit * size : (unit + 1) * size])

    def produce(self, units: Sequence[int] | None = None, *, complete: bool = False) -> None:
        """Bring units up to date; with `complete`, say that the source is at its end."""
        for unit in range(self.num_units) if units is None else units:
            self.produce_unit(unit)
        if complete:
            self.complete()

    def complete(self) -> None:
        self.dataset.put_json(SOURCE_COMPLETE, {"units": self.num_units, "rows": len(self.rows)})

    def produce_unit(self, unit: int) -> None:
        rows = self.unit_rows(unit)
        changed = self._listing(unit, rows)
        if not self.dataset.read_unit(SCAN, unit):
            self._simple(SCAN, unit, _scan_table(rows, edits=self.edits))
            self._simple(DEDUP, unit, _table(DEDUP_COLUMNS, [{"row": n, "duplicate_of": -1} for n in rows]))
        kept = {number: row for number, row in rows.items() if row.status == "kept"}
        added = self._text(unit, kept)
        for resolution, facet in self.facets.latents.items():
            added |= self._latents(unit, kept, resolution, facet)
        if changed or added or not self.dataset.read_unit(ROWS, unit):
            self._rows(unit, rows)

    def _listing(self, unit: int, rows: dict[int, FakeRow]) -> bool:
        known = self.dataset.read_unit(LISTING, unit)
        captions = dict(zip(known["row"].to_pylist(), known["captions"].to_pylist())) if known is not None else {}
        changed = {n: row for n, row in rows.items() if captions.get(n) != list(row.captions)}
        if not changed and known is not None:
            return False
        records = [
            {
                "row": n,
                "key": r.key,
                "uri": r.uri,
                "captions": list(r.captions),
                "caption_fault": None,
                "kind": None if self.facets.kind == IMAGE else self.facets.kind,
                "others": [f"rejected/{r.uri}"] if self.pairs else picture_hashes(r) if self.edits else None,
                "meta": json.dumps({"number": n}) if self.facets.kind == PROMPT and n % 2 else None,
            }
            for n, r in changed.items()
        ]
        self._simple(LISTING, unit, _table(LISTING_COLUMNS, records))
        return True

    def _text(self, unit: int, kept: dict[int, FakeRow]) -> bool:
        known = self.dataset.read_unit(self.facets.text, unit, ["key"])
        have = set(known["key"].to_pylist()) if known is not None else set()
        wanted = {caption_key(""): ""}
        for row in kept.values():
            wanted |= self.texts_of(row)
        missing = {key: caption for key, caption in wanted.items() if key not in have}
        if known is not None and not missing:
            return False
        part = self.dataset.next_part(self.facets.text, unit)
        with ShardWriter(self.dataset, part, max_shard_bytes=self.max_shard_bytes) as writer:
            records = []
            for key, caption in missing.items():
                meta = {"caption": caption, "num_tokens": num_tokens(caption)}
                place = writer.write(key, meta, {"features": self._raw(fake_features(caption))})
                records.append({"key": key, "num_tokens": num_tokens(caption), **place.columns()})
            tars = writer.close()
        self.dataset.commit(part, _table(TEXT_COLUMNS, records), config_hash="fake", tars=tars)
        return True

    def texts_of(self, row: FakeRow) -> dict[str, str]:
        """Key of each text of a row -> what its features are made of, an edit's empty instruction first."""
        if not self.edits:
            return {caption_key(caption): caption for caption in row.captions}
        hashes = picture_hashes(row)
        return {edit_caption_key(caption, hashes): seen_with(caption, hashes) for caption in ("", *row.captions)}

    def _latents(self, unit: int, kept: dict[int, FakeRow], resolution: int, facet: str) -> bool:
        known = self.dataset.read_unit(facet, unit, ["row"])
        have = set(known["row"].to_pylist()) if known is not None else set()
        buckets = {n: bucket for n, row in kept.items() if (bucket := bucket_of(row, resolution)) is not None}
        missing = [n for n in buckets if n not in have]
        if known is not None and not missing:
            return False
        part = self.dataset.next_part(facet, unit)
        with ShardWriter(self.dataset, part, max_shard_bytes=self.max_shard_bytes) as writer:
            records = []
            for n in missing:
                row, bucket = kept[n], buckets[n]
                meta = {"row": n, "uri": row.uri, "captions": list(row.captions)}
                tensors = {"mean": self._raw(fake_latents(row.key, bucket))}
                if self.pairs:
                    tensors["rejected"] = self._raw(fake_rejected(row.key, bucket))
                if self.edits:
                    for k in range(len(picture_hashes(row))):
                        tensors[f"condition_{k}"] = self._raw(fake_condition(row, k, resolution))
                if self.logvar:
                    tensors["logvar"] = self._raw(fake_logvar(row.key, bucket))
                place = writer.write(row.key, meta, tensors)
                records.append(
                    {
                        "row": n,
                        "key": row.key,
                        "bucket_height": bucket.height,
                        "bucket_width": bucket.width,
                        "resized_height": bucket.height,
                        "resized_width": bucket.width,
                        "crop_top": 0,
                        "crop_left": 0,
                        **place.columns(),
                        **place.further_columns(),
                    }
                )
            tars = writer.close()
        self.dataset.commit(part, _table(LATENTS_COLUMNS, records), config_hash="fake", tars=tars)
        return True

    def _rows(self, unit: int, rows: dict[int, FakeRow]) -> None:
        records = [
            {
                "row": n,
                "key": r.key,
                "status": r.status,
                "reason": "" if r.status == "kept" else "made_up",
                "detail": "",
                "width": r.width,
                "height": r.height,
                "score_sharpness": r.score,
            }
            for n, r in rows.items()
        ]
        schema = ROWS_COLUMNS.append(pa.field("score_sharpness", pa.float32()))
        facets = (LISTING, SCAN, DEDUP, *self.facets.names)
        inputs = {facet: len(self.dataset.unit_parts(facet, unit)) for facet in facets}
        self._simple(ROWS, unit, _table(schema, records), extra={"inputs": inputs, "counts": {}})

    def _simple(self, facet: str, unit: int, table: pa.Table, extra: dict[str, object] | None = None) -> None:
        part = self.dataset.next_part(facet, unit)
        assert self.dataset.commit(part, table, config_hash="fake", extra=extra)

    def _raw(self, values: np.ndarray) -> RawTensor:
        return RawTensor(data=to_bf16(values) if self.dtype == "bfloat16" else values, dtype=self.dtype)


def make_rows(
    count: int, *, start: int = 0, captions: int = 1, sizes: Sequence[tuple[int, int]] = ((256, 256),), words: int = 6
) -> list[FakeRow]:
    """`count` rows with varied captions and sizes, a pure function of the row's number."""
    rows = []
    for n in range(start, start + count):
        width, height = sizes[n % len(sizes)]
        texts = tuple(f"picture {n} c{c}" + " word" * ((n * 7 + c) % words) for c in range(captions))
        rows.append(FakeRow(uri=f"pictures/{n:06d}.png", captions=texts, width=width, height=height, score=n / 10))
    return rows


def _scan_table(rows: dict[int, FakeRow], *, edits: bool) -> pa.Table:
    records = [
        {
            "row": n,
            "bytes": 1000 + n,
            "sha256": row.key,
            "format": "PNG",
            "mode": "RGB",
            "width": row.width,
            "height": row.height,
            "orientation": 1,
            "fault": None,
            "detail": "",
            "others": [{"sha256": one} for one in picture_hashes(row)] if edits else None,
        }
        for n, row in rows.items()
    ]
    return _table(SCAN_COLUMNS, records)


def _table(schema: pa.Schema, records: Sequence[Mapping[str, object]]) -> pa.Table:
    return pa.Table.from_pylist(records, schema=schema)
