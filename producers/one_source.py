"""A data set holds the rows of one source: two with the same names must not become one.

Place in the flow: `commands/produce.py` asks after the first look, before anything is listed, where the source's root
is another than the last `produce` remembered. Uris are relative to the root and keys are made of them, so pictures of
another source under the same names would count as the listed ones, and give these their captions. Of some rows that are
listed, scanned and named again, the bytes are compared with the scan: a source that moved passes. Refuses another one.

Left out: rows that are named again only after the first 16,384 of a look, and another source under the same root.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain, islice
from typing import Final

from producers.sources.base import Found, SourceGoneError, locate, read_bytes
from qwenimg_dist.data.facets import DataError, Dataset
from qwenimg_dist.data.origin import Origin
from qwenimg_dist.schema import LISTING, SCAN, row_key

_AHEAD_ROWS: Final = 16_384
_COMPARED: Final = 16
_OF_A_UNIT: Final = 4


def check_same_source(dataset: Dataset, before: Origin | None, now: Origin, found: Found) -> Found:
    """The look, its rows still to be gone through. Raises `DataError` where they are another source's."""
    if before is None or before.root == now.root:
        return found
    rows = iter(found.rows)
    ahead = list(islice(rows, _AHEAD_ROWS))
    named = {
        row_key(one.identity): one.uri
        for one in ahead
        if one.uri and locate(before.root, one.uri) != locate(now.root, one.uri)
    }
    compared = dict(islice(_compared(dataset, now.root, named), _COMPARED))
    others = [uri for uri, same in compared.items() if not same]
    if 2 * len(others) > len(compared):  # single files may have been changed since they were scanned
        raise DataError(
            f"{dataset.root} holds the pictures of {before.root}, and {now.root} has others under the same names "
            f"({others[0]}; {len(others)} of {len(compared)} compared differ): these captions would go to those "
            "pictures. A source under another root is a data set of its own: choose another data.path (training mixes "
            "data sets by weight), or give both as one source, from the folder above them"
        )
    return replace(found, rows=chain(ahead, rows))


def _compared(dataset: Dataset, root: str, named: Mapping[str, str]) -> Iterator[tuple[str, bool]]:
    """(uri, whether its bytes are those that were scanned) of rows in `named` (key -> uri), a few of each unit."""
    for unit in dataset.units(LISTING) if named else ():
        listing = dataset.read_unit(LISTING, unit, ["row", "key"])
        assert listing is not None  # units come from the listing
        scan = dataset.read_unit(SCAN, unit, ["row", "sha256"])
        scanned = dict(zip(*(scan[name].to_pylist() for name in ("row", "sha256")))) if scan is not None else {}
        keys = zip(listing["key"].to_pylist(), listing["row"].to_pylist())
        met = ((named[key], scanned[row]) for key, row in keys if key in named and scanned.get(row))
        for uri, sha256 in islice(met, _OF_A_UNIT):
            try:
                data = read_bytes(root, uri)
            except SourceGoneError as error:
                raise DataError(f"{root} cannot be compared with the source of before: {error}") from error
            except OSError:  # the scan will tell
                continue
            yield uri, hashlib.sha256(data).hexdigest() == sha256
