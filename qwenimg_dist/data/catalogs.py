"""Several catalogs as one: positions numbered through, places and keys looked up whichever catalog they lie in.

Place in the flow: a run's generations let catalogs join here, in the order of their lines, and the ledger, the stream
and the held-out set ask by position. Catalogs are opened when they are first asked for, and few stay open: rows of
millions are memory-mapped, never held.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from qwenimg_dist.data.catalog import ITEM_BYTES, Catalog, Ints, Places
from qwenimg_dist.data.facets import DataError
from qwenimg_dist.schema import Bucket

_OPEN_CATALOGS: Final = 16


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
