"""Data sets of any size with random tensors, committed through `Dataset` and `ShardWriter` as a producer would."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qwenimg_dist.data.catalog import RunFacets
from qwenimg_dist.data.facets import Dataset, Part
from qwenimg_dist.data.shards import RawTensor, ShardWriter
from qwenimg_dist.schema import (
    DEDUP,
    DEDUP_COLUMNS,
    LATENTS_COLUMNS,
    LISTING,
    LISTING_COLUMNS,
    ROWS,
    ROWS_COLUMNS,
    SCAN,
    SCAN_COLUMNS,
    TEXT_COLUMNS,
    caption_key,
    row_key,
)

EMPTY_TOKENS = 5
_NO_LIMIT = 1 << 40


class FakeData:
    """Square pictures of one resolution, one caption each; all tensors bf16. `unit` writes the next unit."""

    def __init__(self, root: Path, facets: RunFacets, *, unit_size: int, text_width: int) -> None:
        self.dataset = Dataset.create(root, unit_size)
        self.facets = facets
        self.text_width = text_width
        self.num_rows = 0
        self.nbytes = 0
        """Of the tensors of all rows, without the empty prompt's."""
        self._random = np.random.default_rng(0)
        # bf16 bit patterns of positive finite numbers of about 1, cut anew for each tensor.
        self._noise = self._random.integers(0x3F00, 0x4000, 1 << 22).astype(np.uint16)

    def unit(self, tokens: Sequence[int]) -> list[tuple[str, RawTensor, RawTensor]]:
        """Commit a unit with captions of these lengths; returns (key, features, latents) of its rows."""
        (resolution, facet), *others = self.facets.latents.items()
        if others:
            raise ValueError("one resolution only")
        unit = self.num_rows // self.dataset.unit_size
        rows = range(self.num_rows, self.num_rows + len(tokens))
        texts = [self._tensor((num, self.text_width)) for num in tokens]
        latents = [self._tensor((16, resolution // 8, resolution // 8)) for _ in rows]
        self._write_facts(unit, rows, resolution)
        self._write_texts(unit, rows, texts)
        self._write_latents(unit, rows, latents, facet, resolution)
        self._write_rows(unit, rows, resolution)
        self.num_rows += len(tokens)
        self.nbytes += sum(tensor.data.nbytes for tensor in (*texts, *latents))
        return [(_key(row), text, mean) for row, text, mean in zip(rows, texts, latents, strict=True)]

    def tars(self) -> list[Path]:
        """All tars of the facets that a run reads."""
        return sorted(tar for facet in self.facets.names for tar in (self.dataset.root / facet).glob("*.tar"))

    def _tensor(self, shape: tuple[int, ...]) -> RawTensor:
        numel = int(np.prod(shape))
        start = int(self._random.integers(0, len(self._noise) - numel))
        return RawTensor(data=self._noise[start : start + numel].reshape(shape), dtype="bfloat16")

    def _commit(self, facet: str, unit: int, records: list[dict[str, Any]], schema: pa.Schema, **more: Any) -> None:
        part = Part(facet=facet, unit=unit, part=0)
        self.dataset.commit(part, pa.Table.from_pylist(records, schema=schema), config_hash="bench", **more)

    def _writer(self, facet: str, unit: int) -> ShardWriter:
        return ShardWriter(self.dataset, Part(facet=facet, unit=unit, part=0), max_shard_bytes=_NO_LIMIT)

    def _write_facts(self, unit: int, rows: range, side: int) -> None:
        listed = [{"row": r, "key": _key(r), "uri": _uri(r), "captions": [_caption(r)]} for r in rows]
        self._commit(LISTING, unit, listed, LISTING_COLUMNS)
        facts = {"bytes": 1, "format": "PNG", "mode": "RGB", "width": side, "height": side, "orientation": 1}
        self._commit(SCAN, unit, [{"row": r, "sha256": _key(r), **facts} for r in rows], SCAN_COLUMNS)
        self._commit(DEDUP, unit, [{"row": r, "duplicate_of": -1} for r in rows], DEDUP_COLUMNS)

    def _write_texts(self, unit: int, rows: range, texts: Sequence[RawTensor]) -> None:
        records = []
        captions = [("", self._tensor((EMPTY_TOKENS, self.text_width)))]
        captions += [(_caption(row), text) for row, text in zip(rows, texts, strict=True)]
        with self._writer(self.facets.text, unit) as writer:
            for caption, text in captions:
                num = len(text.data)
                place = writer.write(caption_key(caption), {"caption": caption, "num_tokens": num}, {"features": text})
                records.append({"key": caption_key(caption), "num_tokens": num, **place.columns()})
            tars = writer.close()
        self._commit(self.facets.text, unit, records, TEXT_COLUMNS, tars=tars)

    def _write_latents(self, unit: int, rows: range, latents: Sequence[RawTensor], facet: str, side: int) -> None:
        records = []
        laid = {"bucket_height": side, "bucket_width": side, "resized_height": side, "resized_width": side}
        with self._writer(facet, unit) as writer:
            for row, mean in zip(rows, latents, strict=True):
                place = writer.write(_key(row), {"row": row}, {"mean": mean})
                records.append({"row": row, "key": _key(row), **laid, "crop_top": 0, "crop_left": 0, **place.columns()})
            tars = writer.close()
        self._commit(facet, unit, records, LATENTS_COLUMNS, tars=tars)

    def _write_rows(self, unit: int, rows: range, side: int) -> None:
        kept = {"status": "kept", "reason": "", "detail": "", "width": side, "height": side}
        inputs = dict.fromkeys([LISTING, SCAN, DEDUP, *self.facets.names], 1)
        records = [{"row": r, "key": _key(r), **kept} for r in rows]
        self._commit(ROWS, unit, records, ROWS_COLUMNS, extra={"inputs": inputs, "counts": {"kept": len(rows)}})


def lognormal_tokens(random: np.random.Generator, median: int, sigma: float, num: int) -> npt.NDArray[np.int64]:
    """(num,) caption lengths: log-normal, cut to what the model takes."""
    lengths = np.round(np.exp(random.normal(np.log(median), sigma, num))).astype(np.int64)
    return np.clip(lengths, EMPTY_TOKENS + 1, 512)


def _uri(row: int) -> str:
    return f"{row:07d}.png"


def _key(row: int) -> str:
    return row_key(_uri(row))


def _caption(row: int) -> str:
    return f"picture {row}"
