"""Index columns: what `where` may name.

Place in the flow: a catalog and `row_columns.py` hold them, `where.py` and the sampling weights read them. Of several
data sets in one run, each has the columns of all, so that one expression can speak of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

DATASET: Final = "dataset"
"""Column that says which of several data sets a row is of."""


class Columns(Mapping[str, npt.NDArray[Any]]):
    """Index columns that `where` may name. Text columns are stored as codes and spelt out when asked for: as references
    to their words, since numpy's own text has room for the longest word in every row."""

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]], words: Mapping[str, list[str]]) -> None:
        self._arrays = arrays
        self._words = words

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        array = self._arrays[name]
        return np.array(self._words[name], dtype=np.object_)[array] if name in self._words else array

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __contains__(self, name: object) -> bool:
        return name in self._arrays  # without spelling the column out, as Mapping does

    def is_text(self, name: str) -> bool:
        """Whether a column holds words."""
        return name in self._words

    def beside(self, others: Iterable[Columns], name: str, num_rows: int) -> Columns:
        """With `dataset` besides, and as missing (NaN, or the empty word) what only others have.

        A column that no data set has stays unknown, so that a mistyped name is refused.
        """
        arrays: dict[str, npt.NDArray[Any]] = {DATASET: np.broadcast_to(np.int8(0), num_rows)}
        words = {DATASET: [name]}
        for columns in others:
            for column in columns:
                if column in self or column in arrays:
                    continue
                missing = np.int8(0) if columns.is_text(column) else np.float32(np.nan)
                arrays[column] = np.broadcast_to(missing, num_rows)
                if columns.is_text(column):
                    words[column] = [""]
        return Columns({**self._arrays, **arrays}, {**self._words, **words})
