"""`data inspect`: the whole data set in numbers, and pictures of the rows one asks for, as one HTML file.

Reads committed parts and the source's files and changes nothing. Counts, histograms and thresholds are of all decided
rows, done by arrow and numpy; only rows that are shown are touched one by one, so a million rows are no trouble.
Pictures come from the source that `produce` remembered, or from `source.path`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from producers.sources import open_source
from qwenimg_dist.commands.data_inspect_choice import Choice, choose, clusters
from qwenimg_dist.commands.data_inspect_rows import read_rows, with_thumbnails
from qwenimg_dist.commands.data_thresholds import histograms
from qwenimg_dist.config import Config
from qwenimg_dist.data.facets import DataError, Dataset
from qwenimg_dist.data.origin import read_origin
from qwenimg_dist.data.row_columns import load_pairs, load_row_columns
from qwenimg_dist.report.contact_sheet import Sheet, SheetRow, write_contact_sheet
from qwenimg_dist.report.funnel import facet_labels, funnel
from qwenimg_dist.report.stats import stats
from qwenimg_dist.report.table import show_bytes


def inspect(dataset: Dataset, config: Config, console: Console) -> int:
    """Write the sheet and say where. Raises `DataError` if nothing is decided, ValueError for an unusable source."""
    root = _source_root(dataset, config)
    columns = load_row_columns(dataset)
    if not len(columns.rows):
        raise DataError(f"{dataset.root} has no decided row yet: run `qwenimg-dist produce` first")
    choice = choose(columns, config.inspect)
    found = clusters(columns, choice, load_pairs(dataset), config.inspect.clusters)
    counted = funnel(dataset)
    labels = facet_labels(counted.encoded)
    beside = sorted({row for cluster in found for row in cluster.rows} - set(choice.rows.tolist()))
    numbers = np.union1d(choice.rows, np.array(beside, dtype=np.int64))
    rows = with_thumbnails(read_rows(dataset, numbers, labels), root, config.inspect.thumbnail, console)
    if config.inspect.decode:
        from qwenimg_dist.commands.data_inspect_decode import with_decoded  # torch takes seconds

        rows = with_decoded(dataset, config, rows)
    pending = counted.listed - counted.decided
    sheet = Sheet(
        title="Data set " + "/".join(dataset.root.resolve().parts[-2:]),
        subtitle=f"{counted.listed:,} rows listed, {counted.admitted:,} admitted"
        + (f", {pending:,} not decided yet" if pending else ""),
        notices=choice.said,
        classes=tuple(labels.values()),
        rows=tuple(row for row in rows if row.row not in set(beside)),
        cluster_rows=tuple(row for row in rows if row.row in set(beside)),
        clusters=tuple(found),
        histograms=tuple(histograms(config, columns)),
        tables=(*counted.tables(), *stats(dataset, columns).tables()),
    )
    out = Path(config.inspect.out) if config.inspect.out else dataset.root / "inspect.html"
    write_contact_sheet(out, sheet)
    for line in _said(out, sheet, choice, root):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def _said(out: Path, sheet: Sheet, choice: Choice, root: str | None) -> Iterator[str]:
    """What the console gets: the file, what it holds, and why pictures are missing."""
    size = show_bytes(out.stat().st_size)
    yield f"{out}: {len(sheet.rows):,} rows, {size}"
    yield from choice.said
    if root is None:
        yield (
            "No thumbnails: this data set does not say where its pictures lie (it was made by an earlier version); "
            "add source.path=... to the command, as for produce"
        )
    else:
        yield from _missing([*sheet.rows, *sheet.cluster_rows], root)


def _missing(rows: Sequence[SheetRow], root: str) -> Iterator[str]:
    """Why rows have no thumbnail, most frequent reason first, each with an example."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for row in rows:
        if not row.thumb:
            # Faults are known and no surprise; other rows should have a picture.
            known = f" (known: {row.reason})" if row.status == "fault" else ""
            found[row.no_thumb.partition(":")[0] + known].append(row.uri)
    for why, uris in sorted(found.items(), key=lambda item: -len(item[1])):
        yield f"{len(uris):,} without a thumbnail: {why}; the first: {uris[0]} in {root}"


def _source_root(dataset: Dataset, config: Config) -> str | None:
    """What uris are relative to: as configured, else as `produce` remembered it; None if neither says.

    Raises ValueError if it is not there.
    """
    if config.source.path is not None:
        root, named = open_source(config.source).root, "source.path"
    else:
        origin = read_origin(dataset)
        if origin is None:
            return None
        root, named = origin.root, "the source that produce read"
    if "://" not in root and not Path(root).is_dir():
        raise ValueError(f"{named}: {root} is not a folder; mount it again, or name where it is now by source.path=...")
    return root
