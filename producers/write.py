"""Writes a unit's latents and text features: batches of one bucket in, committed parts out.

Place in the flow: `unit.py` adds rendered pictures as they are decoded; full batches are encoded, and appended to the
tar of their resolution when the next one is full, so memory holds at most one batch per bucket and the tensors of
another. Nothing is visible before `commit`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Protocol

import numpy as np
import pyarrow as pa

from producers.commit import commit_part
from producers.pictures import Cut, FurtherCut, Pixels
from producers.plan import Plan
from producers.state import Row
from qwenimg_dist.data.buckets import Placement
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.data.shards import RawTensor, ShardWriter
from qwenimg_dist.schema import IMAGE, LATENTS_COLUMNS, TEXT_COLUMNS, Bucket, caption_key, edit_caption_key

_EDIT_BATCH: Final = 32


@dataclass(frozen=True, kw_only=True)
class EditPrompt:
    """An instruction and the pictures it is about, (H, W, 3) each."""

    text: str
    pictures: tuple[Pixels, ...]


class Encoders(Protocol):
    """What turns pixels and captions into tensors; the real ones are in `encode.py`."""

    def latents(self, pixels: Pixels) -> Sequence[dict[str, RawTensor]]:
        """(B, H, W, 3) sRGB -> per picture `mean` (16, H/8, W/8), and `logvar` where configured. It may be computed
        elsewhere meanwhile: the first look at it waits."""
        ...

    def text(self, captions: Sequence[str]) -> Iterator[tuple[str, RawTensor]]:
        """Each caption with its features (T, D), in any order."""
        ...

    def edit_text(self, prompts: Sequence[EditPrompt]) -> list[RawTensor]:
        """Features (T, D) of each instruction, its pictures seen."""
        ...


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """A batch that was given to the encoders. Its pictures are not held any more."""

    resolution: int
    cuts: list[Cut]
    own: Sequence[dict[str, RawTensor]]
    further: list[tuple[list[tuple[int, str]], Sequence[dict[str, RawTensor]]]]
    """(place in the batch, name) of the further pictures that were encoded together, and what came of them."""


class LatentsWriter:
    """The latents parts of one unit, one tar set per resolution."""

    def __init__(self, dataset: Dataset, unit: int, plan: Plan, encoders: Encoders) -> None:
        self._dataset, self._plan, self._encoders = dataset, plan, encoders
        self._parts = {r: dataset.next_part(facet, unit) for r, facet in plan.latents_facets.items()}
        self._batches: dict[tuple[int, Bucket], list[Cut]] = {}
        self._num_pixels: Counter[tuple[int, Bucket]] = Counter()
        """Of all pictures in each batch."""
        self._begun: _Begun | None = None
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

    def add(self, cut: Cut) -> None:
        """Queue the pictures of one row for one class; encodes when its bucket's batch is full."""
        batch_of = (cut.resolution, cut.placement.bucket)
        batch = self._batches.setdefault(batch_of, [])
        batch.append(cut)
        self._num_pixels[batch_of] += cut.num_pixels
        if self._num_pixels[batch_of] + cut.num_pixels > self._plan.image_batch_pixels:
            del self._num_pixels[batch_of]
            self._encode(cut.resolution, self._batches.pop(batch_of))

    def commit(self) -> int:
        """Encode what is queued and commit. A part is committed even if empty where the facet has none of this unit:
        that is what makes the unit ready. Returns the latents written."""
        for (resolution, _), batch in sorted(self._batches.items(), key=lambda item: item[0]):
            self._encode(resolution, batch)
        self._batches.clear()
        self._write_begun()
        for resolution, part in self._parts.items():
            rows = sorted(self._index[resolution], key=lambda entry: int(entry["row"]))
            if rows or part.part == 0:
                table = pa.Table.from_pylist(rows, schema=LATENTS_COLUMNS)
                tars = self._writers[resolution].close()
                commit_part(self._dataset, part, table, config_hash=self._plan.config_hash, tars=tars)
        return sum(len(rows) for rows in self._index.values())

    def _encode(self, resolution: int, batch: Sequence[Cut]) -> None:
        """Have a batch encoded, and write the one before it meanwhile: a loader's encoder is another process."""
        begun = self._begin(resolution, batch)
        self._write_begun()
        self._begun = begun

    def _begin(self, resolution: int, batch: Sequence[Cut]) -> _Begun:
        own = self._encoders.latents(np.stack([cut.pixels for cut in batch]))
        by_shape: dict[tuple[int, ...], list[tuple[int, FurtherCut]]] = {}
        for index, cut in enumerate(batch):
            for one in cut.further:
                by_shape.setdefault(one.pixels.shape, []).append((index, one))
        further = []
        for (height, width, _), of_shape in by_shape.items():
            num = max(1, self._plan.image_batch_pixels // (height * width))
            for few in (of_shape[start : start + num] for start in range(0, len(of_shape), num)):
                latents = self._encoders.latents(np.stack([one.pixels for _, one in few]))
                further.append(([(index, one.name) for index, one in few], latents))
        return _Begun(resolution=resolution, cuts=[cut.without_pixels() for cut in batch], own=own, further=further)

    def _write_begun(self) -> None:
        begun, self._begun = self._begun, None
        if begun is None:
            return
        for cut, tensors in zip(begun.cuts, _tensors(begun), strict=True):
            placement = cut.placement
            at = self._writers[begun.resolution].write(cut.row.key, _sample_json(cut), tensors)
            self._index[begun.resolution].append(
                {
                    "row": cut.row.row,
                    "key": cut.row.key,
                    "bucket_height": placement.bucket.height,
                    "bucket_width": placement.bucket.width,
                    "resized_height": placement.resized[0],
                    "resized_width": placement.resized[1],
                    "crop_top": placement.crop[0],
                    "crop_left": placement.crop[1],
                    **at.columns(),
                    **at.further_columns(),
                }
            )


class TextWriter:
    """The text part of one unit. Edits are encoded as they come, since their pictures are at hand then."""

    def __init__(self, dataset: Dataset, unit: int, plan: Plan, encoders: Encoders) -> None:
        self._dataset, self._plan, self._encoders = dataset, plan, encoders
        self._part = dataset.next_part(plan.text_facet, unit)
        self._writer = ShardWriter(dataset, self._part, max_shard_bytes=plan.max_shard_bytes)
        self._edits: dict[str, tuple[EditPrompt, list[str]]] = {}
        self._rows: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> TextWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.abort()

    def add_edit(self, row: Row, texts: Sequence[str], pictures: tuple[Pixels, ...]) -> None:
        """Queue texts that see the row's further pictures."""
        sha256s = [one.sha256 for one in row.others]
        for text in texts:
            key = edit_caption_key(text, sha256s)
            if key not in self._rows:  # the same source and words with another target
                self._edits[key] = (EditPrompt(text=text, pictures=pictures), sha256s)
        if len(self._edits) >= _EDIT_BATCH:
            self._encode_edits()

    def commit(self, captions: Sequence[str], known: frozenset[str]) -> int:
        """Encode the distinct captions that have no features yet, the empty prompt always among them, and commit.

        Returns the texts written; nothing is committed if there is none.
        """
        self._encode_edits()
        wanted = {caption_key(caption): caption for caption in ("", *captions)}
        todo = [caption for key, caption in wanted.items() if key not in known]
        for caption, features in self._encoders.text(todo) if todo else ():
            self._write(caption_key(caption), {"caption": caption}, features)
        if self._rows:
            table = pa.Table.from_pylist(list(self._rows.values()), schema=TEXT_COLUMNS)
            tars = self._writer.close()
            commit_part(self._dataset, self._part, table, config_hash=self._plan.config_hash, tars=tars)
        return len(self._rows)

    def _encode_edits(self) -> None:
        if not self._edits:
            return
        features = self._encoders.edit_text([prompt for prompt, _ in self._edits.values()])
        for (key, (prompt, sha256s)), of_prompt in zip(self._edits.items(), features, strict=True):
            self._write(key, {"caption": prompt.text, "pictures": sha256s}, of_prompt)
        self._edits.clear()

    def _write(self, key: str, meta: Mapping[str, Any], features: RawTensor) -> None:
        num_tokens = int(features.data.shape[0])
        at = self._writer.write(key, {**meta, "num_tokens": num_tokens}, {"features": features})
        self._rows[key] = {"key": key, "num_tokens": num_tokens, **at.columns()}


def _tensors(begun: _Begun) -> list[dict[str, RawTensor]]:
    """Per row `mean` and `logvar` of its own picture, then `<name>` and `<name>_logvar` of each further one."""
    encoded = {
        place: one_of for places, latents in begun.further for place, one_of in zip(places, latents, strict=True)
    }
    samples = [dict(tensors) for tensors in begun.own]
    for index, cut in enumerate(begun.cuts):
        for one in cut.further:
            for part, tensor in encoded[index, one.name].items():
                samples[index][one.name if part == "mean" else f"{one.name}_{part}"] = tensor
    return samples


def _sample_json(cut: Cut) -> Mapping[str, Any]:
    row = cut.row
    sample = {
        "row": row.row,
        "uri": row.uri,
        "captions": list(row.captions),
        "height": row.height,
        "width": row.width,
        **_placement_json(cut.placement),
    }
    if row.kind != IMAGE:
        further = {one.name: {"uri": one.uri, **_placement_json(one.placement)} for one in cut.further}
        sample |= {"kind": row.kind, "further": further}
    if row.meta is not None:
        sample["meta"] = row.meta
    return sample


def _placement_json(placement: Placement) -> dict[str, list[int]]:
    return {
        "bucket": [placement.bucket.height, placement.bucket.width],
        "crop": list(placement.crop),
        "resized": list(placement.resized),
    }
