"""Writes a unit's latents and text features: batches of one bucket in, committed parts out.

Place in the flow: `unit.py` adds rendered pictures as they are decoded; full batches are encoded and appended to the
tar of their resolution at once, so memory holds at most one batch per bucket. Nothing is visible before `commit`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from producers.commit import commit_part
from producers.plan import Plan
from producers.state import Row
from qwenimg_dist.data.buckets import Placement
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.data.shards import RawTensor, ShardWriter
from qwenimg_dist.schema import LATENTS_COLUMNS, TEXT_COLUMNS, Bucket, caption_key

Pixels = npt.NDArray[np.uint8]


class Encoders(Protocol):
    """What turns pixels and captions into tensors; the real ones are in `encode.py`."""

    def latents(self, pixels: Pixels) -> list[dict[str, RawTensor]]:
        """(B, H, W, 3) sRGB -> per picture `mean` (16, H/8, W/8), and `logvar` where configured."""
        ...

    def text(self, captions: Sequence[str]) -> Iterator[tuple[str, RawTensor]]:
        """Each caption with its features (T, D), in any order."""
        ...


class LatentsWriter:
    """The latents parts of one unit, one tar set per resolution."""

    def __init__(self, dataset: Dataset, unit: int, plan: Plan, encoders: Encoders) -> None:
        self._dataset, self._plan, self._encoders = dataset, plan, encoders
        self._parts = {r: dataset.next_part(facet, unit) for r, facet in plan.latents_facets.items()}
        self._batches: dict[tuple[int, Bucket], list[tuple[Row, Placement, Pixels]]] = {}
        self._index: dict[int, list[dict[str, Any]]] = {r: [] for r in plan.latents_facets}
        self._stack = ExitStack()
        self._writers = {
            r: self._stack.enter_context(ShardWriter(dataset, part, max_shard_bytes=plan.max_shard_bytes))
            for r, part in self._parts.items()
        }

    def __enter__(self) -> LatentsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def add(self, row: Row, resolution: int, placement: Placement, pixels: Pixels) -> None:
        """Queue one picture; encodes when its bucket's batch is full."""
        batch_of = (resolution, placement.bucket)
        batch = self._batches.setdefault(batch_of, [])
        batch.append((row, placement, pixels))
        bucket = placement.bucket
        if len(batch) >= max(1, self._plan.image_batch_pixels // (bucket.height * bucket.width)):
            self._encode(resolution, self._batches.pop(batch_of))

    def commit(self) -> int:
        """Encode what is queued and commit. A part is committed even if empty where the facet has none of this unit:
        that is what makes the unit ready. Returns the latents written."""
        for (resolution, _), batch in sorted(self._batches.items(), key=lambda item: item[0]):
            self._encode(resolution, batch)
        self._batches.clear()
        for resolution, part in self._parts.items():
            rows = sorted(self._index[resolution], key=lambda entry: int(entry["row"]))
            if rows or part.part == 0:
                table = pa.Table.from_pylist(rows, schema=LATENTS_COLUMNS)
                tars = self._writers[resolution].close()
                commit_part(self._dataset, part, table, config_hash=self._plan.config_hash, tars=tars)
        return sum(len(rows) for rows in self._index.values())

    def _encode(self, resolution: int, batch: Sequence[tuple[Row, Placement, Pixels]]) -> None:
        encoded = self._encoders.latents(np.stack([pixels for _, _, pixels in batch]))
        for (row, placement, _), tensors in zip(batch, encoded, strict=True):
            at = self._writers[resolution].write(row.key, _sample_json(row, placement), tensors)
            self._index[resolution].append(
                {
                    "row": row.row,
                    "key": row.key,
                    "bucket_height": placement.bucket.height,
                    "bucket_width": placement.bucket.width,
                    "resized_height": placement.resized[0],
                    "resized_width": placement.resized[1],
                    "crop_top": placement.crop[0],
                    "crop_left": placement.crop[1],
                    **at.columns(),
                }
            )


def write_text(
    dataset: Dataset, unit: int, plan: Plan, encoders: Encoders, captions: Sequence[str], known: frozenset[str]
) -> int:
    """Encode and commit the distinct captions that have no features yet, the empty prompt always among them.

    Returns the captions written; nothing is committed if there is none.
    """
    wanted = {caption_key(caption): caption for caption in ("", *captions)}
    todo = [caption for key, caption in wanted.items() if key not in known]
    if not todo:
        return 0
    part = dataset.next_part(plan.text_facet, unit)
    rows = []
    with ShardWriter(dataset, part, max_shard_bytes=plan.max_shard_bytes) as writer:
        for caption, features in encoders.text(todo):
            key, num_tokens = caption_key(caption), int(features.data.shape[0])
            at = writer.write(key, {"caption": caption, "num_tokens": num_tokens}, {"features": features})
            rows.append({"key": key, "num_tokens": num_tokens, **at.columns()})
        tars = writer.close()
    table = pa.Table.from_pylist(rows, schema=TEXT_COLUMNS)
    commit_part(dataset, part, table, config_hash=plan.config_hash, tars=tars)
    return len(rows)


def _sample_json(row: Row, placement: Placement) -> Mapping[str, Any]:
    return {
        "row": row.row,
        "uri": row.uri,
        "captions": list(row.captions),
        "height": row.height,
        "width": row.width,
        "bucket": [placement.bucket.height, placement.bucket.width],
        "crop": list(placement.crop),
        "resized": list(placement.resized),
    }
