"""Batches that do not fit into GPU memory are halved, down to one item.

Place in the flow: the encoders and the filters' models run their batches through `halving`. Knows torch by the names
of its errors only: a filter's model need not be torch's, and the driver imports this module without it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def halving(run: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item]) -> list[Result]:
    """`run(items)`; out of GPU memory, on halves of them. Raises RuntimeError if a single item is too much."""
    try:
        return run(items)
    except RuntimeError as error:
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(error, torch.OutOfMemoryError):
            raise
        if len(items) == 1:
            raise RuntimeError(
                f"a single picture or caption does not fit into GPU memory ({error}); give each producer a GPU of its "
                "own (cluster.gpus_per_producer=1), or lower encode.resolutions"
            ) from error
    torch.cuda.empty_cache()
    middle = len(items) // 2
    return [*halving(run, items[:middle]), *halving(run, items[middle:])]
