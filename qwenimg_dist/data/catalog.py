"""The catalog: what a run trains on, as memory-mapped columns compiled once from pinned parts.

Place in the flow: `catalog_build.py` writes it (rank 0, once per generation), every rank opens it here in
milliseconds, the ledger orders its rows, the reader asks it where bytes lie. Rows are those that the producers kept,
in listing order; which of them a phase uses (`where`, held out, latents at its resolution) is the ledger's matter.
Immutable; knows neither torch nor what the tensors are for. Several
of them are one in `catalogs.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qwenimg_dist.data.columns import Columns
from qwenimg_dist.data.facets import DataError
from qwenimg_dist.patience import patiently
from qwenimg_dist.schema import IMAGE, Bucket, Kind, condition_name

CATALOG_VERSION: Final = 3
"""2 numbered more than 32,767 words of a label wrongly. A run's catalog of another version is compiled again."""
"""2: captions have kinds."""
HEAD: Final = "catalog.json"

ITEM_BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4}

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class RunFacets:
    """The facets that a run reads."""

    text: str
    latents: dict[int, str]
    """Resolution class (px) -> facet."""
    further: tuple[str, ...] = ()
    """A sample's other tensors that are read besides (`logvar`, `rejected`), which not every facet holds. The latents
    of an edit's conditions are always read, as its bucket says."""
    kind: Kind = IMAGE
    """Of the samples; a data set of another kind is refused."""
    drawn: tuple[int, ...] = ()
    """Resolution classes (px) at which the run draws the pictures itself, of prompts; a batch's shape is its step's."""
    of_dataset: Mapping[str, RunFacets] = field(default_factory=dict)
    """Those of data sets of a mix that are of another kind."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.text, *(self.latents[resolution] for resolution in sorted(self.latents)))

    def of(self, dataset: str) -> RunFacets:
        """What is read of one of several data sets."""
        return self.of_dataset.get(dataset, self)


@dataclass(frozen=True, kw_only=True)
class TarFile:
    """A tar that some sample lies in; `size_bytes` as committed."""

    path: Path
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where n tensors lie. `keys` are for error messages only."""

    tars: Sequence[TarFile]
    tar: npt.NDArray[np.int32]
    """(n,) index into `tars`."""
    offset: Ints
    nbytes: Ints
    keys: npt.NDArray[np.bytes_]


@dataclass(frozen=True, kw_only=True)
class LatentsIndex:
    """Latents of one resolution class: arrays over the catalog's rows."""

    facet: str
    dtype: str
    channels: int
    buckets: tuple[Bucket, ...]
    bucket: npt.NDArray[np.int16]
    """(rows,) index into `buckets`; -1 where the picture is too small for this class."""
    tar: npt.NDArray[np.int32]
    offset: Ints
    further: Mapping[str, Ints] = field(default_factory=dict)
    """Offsets of the sample's other tensors, which are of the latents' type and in their tar: those that the run asked
    for, of the latents' shape, and an edit's `condition_0`, ..., of its bucket's shapes (-1: it has none)."""

    def shape(self, bucket: Bucket, name: str = "mean") -> tuple[int, int, int]:
        """(channels, height / 8, width / 8) of a tensor of every sample of a bucket."""
        names = conditions_of(bucket)
        height, width = bucket.conditions[names.index(name)] if name in names else (bucket.height, bucket.width)
        return (self.channels, height // 8, width // 8)


@dataclass(frozen=True, kw_only=True)
class PromptTable:
    """What a reward is told of each row, as JSON texts end to end."""

    data: npt.NDArray[np.uint8]
    start: Ints
    """(rows + 1,)"""

    def of(self, rows: Ints) -> list[tuple[str, dict[str, Any]]]:
        """Text and metadata of row positions."""
        found = []
        for row in rows.tolist():
            text, meta = json.loads(bytes(self.data[int(self.start[row]) : int(self.start[row + 1])]))
            found.append((text, meta))
        return found


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """One compiled catalog. Captions are CSR: row i has `caption_text[caption_start[i]:caption_start[i + 1]]`."""

    folder: Path
    digest: str
    keys: npt.NDArray[np.bytes_]
    rows: Ints
    """(rows,) number in the listing: stable for ever, what random draws are keyed by."""
    units: npt.NDArray[np.int32]
    key_hash: npt.NDArray[np.uint64]
    caption_start: Ints
    caption_text: npt.NDArray[np.int32]
    caption_kind: npt.NDArray[np.int16]
    """Beside `caption_text`: index into `caption_kinds`."""
    caption_kinds: tuple[str, ...]
    text_keys: npt.NDArray[np.bytes_]
    text_tokens: npt.NDArray[np.int32]
    text_tar: npt.NDArray[np.int32]
    text_offset: Ints
    text_dtype: str
    text_width: int
    """D of the (T, D) features."""
    empty_text: int
    """Text position of the empty prompt."""
    latents: Mapping[int, LatentsIndex]
    tars: Sequence[TarFile]
    columns: Columns
    prompts: PromptTable | None = None
    """Of rows of kind `prompt`."""
    row_empty_text: npt.NDArray[np.int32] | None = None
    """(rows,) of edits: text position of the empty instruction, which saw the row's pictures; else None."""

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def num_texts(self) -> int:
        return len(self.text_tokens)

    def empty_texts(self, rows: Ints) -> Ints:
        """(n,) text positions of what stands in where the captions of these rows are dropped."""
        if self.row_empty_text is None:
            return np.full(len(rows), self.empty_text, dtype=np.int64)
        return self.row_empty_text[rows].astype(np.int64)

    @classmethod
    def open(cls, folder: Path, dataset_root: Path) -> Catalog:
        """Memory-map a catalog. Raises `DataError` if it is damaged or of another version, `StorageAwayError` if that
        cannot be told now."""
        try:
            return patiently(lambda: cls._open(folder, dataset_root), str(folder))
        except (OSError, KeyError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{folder} is damaged ({error}): remove it, it is made again from the data set") from error

    @classmethod
    def _open(cls, folder: Path, dataset_root: Path) -> Catalog:
        head = json.loads((folder / HEAD).read_text())
        if head["version"] != CATALOG_VERSION:
            raise DataError(f"{folder} is a catalog of version {head['version']}: remove it, it is made again")

        def load(name: str) -> npt.NDArray[Any]:
            array: npt.NDArray[Any] = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            return array

        text = head["text"]
        return cls(
            folder=folder,
            digest=head["digest"],
            **{name: load(name) for name in ROW_ARRAYS + TEXT_ARRAYS},
            caption_kinds=tuple(head["caption_kinds"]),
            text_dtype=text["dtype"],
            text_width=text["width"],
            empty_text=text["empty"],
            latents={
                int(resolution): LatentsIndex(
                    facet=entry["facet"],
                    dtype=entry["dtype"],
                    channels=entry["channels"],
                    buckets=_buckets(entry),
                    **{name: load(f"latents-{resolution}-{name}") for name in LATENTS_ARRAYS},
                    further={name: load(further_array(int(resolution), name)) for name in further_names(entry)},
                )
                for resolution, entry in head["latents"].items()
            },
            tars=[TarFile(path=dataset_root / facet / name, size_bytes=size) for facet, name, size in head["tars"]],
            columns=Columns({name: load(f"column-{name}") for name in head["columns"]}, head["words"]),
            prompts=PromptTable(data=load("prompt_data"), start=load("prompt_start")) if head.get("prompts") else None,
            row_empty_text=load(ROW_EMPTY) if head.get("row_empty") else None,
        )


def conditions_of(bucket: Bucket) -> list[str]:
    """Names of the tensors of a bucket's conditions."""
    return [condition_name(index) for index in range(len(bucket.conditions))]


def _buckets(entry: Mapping[str, Any]) -> tuple[Bucket, ...]:
    conditions = entry.get("conditions") or [[]] * len(entry["buckets"])
    return tuple(
        Bucket(height=height, width=width, conditions=tuple((h, w) for h, w in sizes))
        for (height, width), sizes in zip(entry["buckets"], conditions, strict=True)
    )


ROW_ARRAYS: Final = ("keys", "rows", "units", "key_hash", "caption_start", "caption_text", "caption_kind")
TEXT_ARRAYS: Final = ("text_keys", "text_tokens", "text_tar", "text_offset")
LATENTS_ARRAYS: Final = ("bucket", "tar", "offset")
ROW_EMPTY: Final = "row_empty"


def further_array(resolution: int, name: str) -> str:
    """Name of the array with the offsets of the tensors `name`."""
    return f"latents-{resolution}-{name}_offset"


def further_names(entry: Mapping[str, Any]) -> Sequence[str]:
    """What an entry of the head says; catalogs from before there were others than log-variances said it so."""
    names: Sequence[str] = entry["further"] if "further" in entry else ["logvar"] if entry.get("logvar") else []
    return names
