"""The catalog: what a run trains on, as memory-mapped columns compiled once from pinned parts.

Place in the flow: `catalog_build.py` writes it (rank 0, once per generation), every rank opens it here in
milliseconds, the ledger orders its rows, the reader asks it where bytes lie. Rows are those that the producers kept,
in listing order; which of them a phase uses (`where`, held out, latents at its resolution) is the ledger's matter.
Immutable; knows neither torch nor what the tensors are for.

Positions: `Catalogs` numbers the rows (and texts) of several catalogs through, in the order they joined the run.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qwenimg_dist.data.columns import Columns
from qwenimg_dist.data.facets import DataError
from qwenimg_dist.schema import IMAGE, Bucket, Kind, condition_name

CATALOG_VERSION: Final = 3
"""2 numbered more than 32,767 words of a label wrongly. A run's catalog of another version is compiled again."""
"""2: captions have kinds."""
HEAD: Final = "catalog.json"
_OPEN_CATALOGS: Final = 16

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
        """Memory-map a catalog. Raises `DataError` if it is damaged or of another version."""
        try:
            head = json.loads((folder / HEAD).read_text())
            if head["version"] != CATALOG_VERSION:
                raise DataError(f"{folder} is a catalog of version {head['version']}: remove it, it is made again")
            return cls._from_head(folder, dataset_root, head)
        except (OSError, KeyError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{folder} is damaged ({error}): remove it, it is made again from the data set") from error

    @classmethod
    def _from_head(cls, folder: Path, dataset_root: Path, head: dict[str, Any]) -> Catalog:
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


@dataclass(frozen=True, kw_only=True)
class CatalogFolder:
    """A catalog that may be opened later; its sizes are known beforehand."""

    folder: Path
    num_rows: int
    num_texts: int
    dataset: str = ""
    """Which of several data sets it is of; empty in a run with one."""


class Catalogs:
    """Several catalogs with positions numbered through. Catalogs are opened when first asked for; few stay open.

    Those of several data sets have each other's columns (`columns.py`), and keys that begin with `NAME/`.
    """

    def __init__(self, dataset_root: Path | Mapping[str, Path]) -> None:
        self._roots = dataset_root if isinstance(dataset_root, Mapping) else {"": dataset_root}
        self._entries: list[CatalogFolder] = []
        self._row_base = np.zeros(1, dtype=np.int64)
        self._text_base = np.zeros(1, dtype=np.int64)
        self._open: OrderedDict[int, Catalog] = OrderedDict()
        # The prefetching thread looks places up while the training thread lets further catalogs join.
        self._lock = threading.Lock()

    @property
    def roots(self) -> list[Path]:
        """Directories of the data sets."""
        return list(self._roots.values())

    @classmethod
    def of(cls, catalogs: Mapping[str, Catalog]) -> Catalogs:
        """Catalogs that lie in memory, by the name of their data set (empty in a run with one)."""
        made = cls({name: catalog.folder for name, catalog in catalogs.items()})
        for name, catalog in catalogs.items():
            entry = CatalogFolder(
                folder=catalog.folder, num_rows=catalog.num_rows, num_texts=catalog.num_texts, dataset=name
            )
            made._open[made.add(entry)] = catalog
        return made

    def add(self, entry: CatalogFolder) -> int:
        """Append a catalog, or find it if it is here already; returns its index."""
        for index, known in enumerate(self._entries):
            if known.folder == entry.folder:
                return index
        self._entries.append(entry)
        self._row_base = np.append(self._row_base, self._row_base[-1] + entry.num_rows)
        self._text_base = np.append(self._text_base, self._text_base[-1] + entry.num_texts)
        return len(self._entries) - 1

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Catalog:
        with self._lock:
            if index not in self._open:
                while len(self._open) >= max(_OPEN_CATALOGS, len(self._roots)):
                    self._open.popitem(last=False)
                self._open[index] = self._beside_others(index)
            self._open.move_to_end(index)
            return self._open[index]

    def _load(self, index: int) -> Catalog:
        return Catalog.open(self._entries[index].folder, self._roots[self._entries[index].dataset])

    def _beside_others(self, index: int) -> Catalog:
        catalog, name = self._load(index), self._entries[index].dataset
        if not name:
            return catalog
        others = [self._load(other).columns for other in range(len(self)) if other != index]
        return replace(catalog, columns=catalog.columns.beside(others, name, catalog.num_rows))

    def dataset(self, index: int) -> str:
        """Name of the data set that a catalog is of; empty in a run with one."""
        return self._entries[index].dataset

    def row_base(self, index: int) -> int:
        """Position of a catalog's first row."""
        return int(self._row_base[index])

    def text_base(self, index: int) -> int:
        """Position of a catalog's first text."""
        return int(self._text_base[index])

    def keys(self, rows: Ints) -> list[str]:
        """Sample keys of row positions."""
        keys = np.empty(len(rows), dtype=object)
        for index, local, where in self._split_by_index(rows, self._row_base):
            name = self.dataset(index)
            prefix = f"{name}/" if name else ""
            keys[where] = [prefix + key.decode() for key in self[index].keys[local]]
        return list(keys)

    def prompts(self, rows: Ints) -> list[tuple[str, dict[str, Any]]]:
        """Text and metadata of row positions, of kind `prompt`."""
        found: list[tuple[str, dict[str, Any]]] = [("", {})] * len(rows)
        for catalog, local, where in self._split(rows, self._row_base):
            if catalog.prompts is None:
                raise DataError(f"{catalog.folder} was compiled without prompts: remove it, it is made again")
            for at, prompt in zip(where.tolist(), catalog.prompts.of(local), strict=True):
                found[at] = prompt
        return found

    def empty_text(self) -> int:
        """Text position of the empty prompt."""
        index = next(index for index in range(len(self)) if self._entries[index].num_texts)
        return self.text_base(index) + self[index].empty_text

    def numbers(self, rows: Ints) -> Ints:
        """(n,) numbers in the listing of row positions: what never changes, so that draws may be keyed by it."""
        numbers = np.empty(len(rows), dtype=np.int64)
        for catalog, local, where in self._split(rows, self._row_base):
            numbers[where] = catalog.rows[local]
        return numbers

    def text_tokens(self, texts: Ints) -> Ints:
        """(n,) tokens of text positions."""
        tokens = np.empty(len(texts), dtype=np.int64)
        for catalog, local, where in self._split(texts, self._text_base):
            tokens[where] = catalog.text_tokens[local]
        return tokens

    def text_places(self, texts: Ints) -> Iterator[tuple[Catalog, Ints, Places]]:
        """Per catalog: the catalog, which of `texts` lie in it, and their places."""
        for catalog, local, where in self._split(texts, self._text_base):
            row_bytes = catalog.text_width * ITEM_BYTES[catalog.text_dtype]
            yield (
                catalog,
                where,
                Places(
                    tars=catalog.tars,
                    tar=catalog.text_tar[local],
                    offset=catalog.text_offset[local],
                    nbytes=catalog.text_tokens[local].astype(np.int64) * row_bytes,
                    keys=catalog.text_keys[local],
                ),
            )

    def latents_places(
        self, rows: Ints, resolution: int, bucket: Bucket, *, further: Sequence[str] = ()
    ) -> Iterator[tuple[Catalog, Ints, Places]]:
        """Per catalog: the catalog, which of `rows` lie in it, and the places of their latents; behind them those of
        each of their `further` tensors (the conditions' among them), which lie side by side and are read as one."""
        for catalog, local, where in self._split(rows, self._row_base):
            index = catalog.latents[resolution]
            sizes = [int(np.prod(index.shape(bucket, name))) for name in ("mean", *further)]
            offsets = [index.offset[local]]
            for name in further:
                if name not in index.further:
                    raise DataError(f"{catalog.folder} was compiled without {name!r}: remove it, it is made again")
                offsets.append(index.further[name][local])
            yield (
                catalog,
                where,
                Places(
                    tars=catalog.tars,
                    tar=np.tile(index.tar[local], len(offsets)),
                    offset=np.concatenate(offsets),
                    nbytes=np.repeat(np.array(sizes, dtype=np.int64) * ITEM_BYTES[index.dtype], len(local)),
                    keys=np.tile(catalog.keys[local], len(offsets)),
                ),
            )

    def split_rows(self, rows: Ints) -> Iterator[tuple[int, Ints, Ints]]:
        """Per catalog: its index, row positions within it, and which of `rows` they are."""
        return self._split_by_index(rows, self._row_base)

    def _split(self, positions: Ints, base: Ints) -> Iterator[tuple[Catalog, Ints, Ints]]:
        for index, local, where in self._split_by_index(positions, base):
            yield self[index], local, where

    def _split_by_index(self, positions: Ints, base: Ints) -> Iterator[tuple[int, Ints, Ints]]:
        # Side "right" skips catalogs without rows, whose base equals the next one's.
        owner = np.searchsorted(base, positions, side="right") - 1
        for index in np.unique(owner):
            where = np.flatnonzero(owner == index)
            yield int(index), positions[where] - base[index], where

    def count_by_dataset(self, rows: Ints) -> dict[str, int]:
        """How many of row positions each data set has; those with none are left out."""
        counts: dict[str, int] = {}
        for index, _, where in self._split_by_index(rows, self._row_base):
            counts[self.dataset(index)] = counts.get(self.dataset(index), 0) + len(where)
        return counts
