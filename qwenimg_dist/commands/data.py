"""Looks at a data set; reads what is committed and, `repair` apart, changes nothing of it.

    qwenimg-dist data inspect data.path=DATA                          contact sheet, one HTML file
    qwenimg-dist data verify  data.path=DATA                          is everything there and whole?
    qwenimg-dist data repair  data.path=DATA                          damage out of the way, for `produce` to make anew
    qwenimg-dist data stats   data.path=DATA [--json]                 funnel, buckets, text lengths, disk
    qwenimg-dist data freeze  data.path=DATA                          fingerprint, also as freeze-<digest>.json
    qwenimg-dist data freeze  data.path=DATA --check FILE             what differs from a freeze

The sheet's counts and histograms are of all rows; pictures are of a sample, of `inspect.page=1` (2, ...), of the rows
that `"inspect.where='aspect > 2'"` selects, or of one reason (`inspect.reason=too_small`). `inspect.decode=true` shows
cached latents beside the originals. Pictures come from the source that `produce` read; `source.path` names another.
`inspect.out`, `inspect.max_rows`, `inspect.thumbnail` and `inspect.clusters` set the rest.

Exit codes: 0 sound or done, 1 `verify` or `--check` found something, 2 unusable input. All verbs but
`repair` may run beside a working `produce`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console

from qwenimg_dist.commands.inputs import required
from qwenimg_dist.compose import load_config
from qwenimg_dist.config import Config
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.data.mirror import data_root
from qwenimg_dist.report.funnel import Funnel

SUMMARY: Final = "look at a data set: inspect | verify | repair | stats | freeze"

VERBS: Final = ("inspect", "verify", "repair", "stats", "freeze")


def run(args: list[str]) -> int:
    """Dispatch on the first word. Raises ValueError for unusable input."""
    if not args or args[0] not in VERBS:
        said = f"data {args[0]!r} does not exist" if args else "data: which of them?"
        raise ValueError(f"{said}; there is: {', '.join(VERBS)}")
    verb, rest = args[0], args[1:]
    as_json, rest = _take_flag(rest, "--json", verb == "stats")
    check, rest = _take_value(rest, "--check", verb == "freeze")
    lift, rest = _take_flag(rest, "--lift-poison", verb == "repair")
    config = load_config(rest)
    dataset = Dataset.open(data_root(required(config.data.path, "data.path"), config.data))
    dataset.refresh()
    if verb == "repair" and dataset.mirror is not None:
        raise ValueError(
            f"data repair moves files, and a bucket has none: copy {dataset.mirror.url} to a disk (aws s3 sync), "
            "repair it there, and copy it back, also what is gone (aws s3 sync --delete)"
        )
    if verb == "inspect":
        return _inspect(dataset, config)
    if verb == "verify":
        from qwenimg_dist.commands.data_verify import verify

        return verify(dataset, console())
    if verb == "repair" and lift:
        from qwenimg_dist.commands.data_lift import lift_poison

        return lift_poison(dataset, console())
    if verb == "repair":
        from qwenimg_dist.commands.data_repair import repair

        return repair(dataset, console())
    if verb == "stats":
        return _stats(dataset, config, as_json)
    from qwenimg_dist.commands.data_freeze import check_freeze, write_freeze

    return write_freeze(dataset) if check is None else check_freeze(dataset, Path(check))


def console() -> Console:
    """Standard output; a pipe gets lines that are not cut at 80 columns."""
    return Console() if sys.stdout.isatty() else Console(width=160)


def _inspect(dataset: Dataset, config: Config) -> int:
    from qwenimg_dist.commands.data_inspect import inspect

    return inspect(dataset, config, console())


def _stats(dataset: Dataset, config: Config, as_json: bool) -> int:
    from qwenimg_dist.report.funnel import funnel
    from qwenimg_dist.report.stats import stats

    counted, held = funnel(dataset), stats(dataset)
    if as_json:
        print(json.dumps({"funnel": counted.as_dict(), **held.as_dict()}, indent=1))
        return 0
    out = console()
    for table in [*counted.tables(), *held.tables()]:
        out.print(table.rich())
    if counted.reasons:
        print(look_closer(config.data.path, counted))
    return 0


def look_closer(data_path: str | None, counted: Funnel) -> str:
    """The next command, for the most frequent reason."""
    _, reason = next(iter(counted.reasons))
    return f"look closer: qwenimg-dist data inspect data.path={data_path} inspect.reason={reason}"


def _take_flag(args: Sequence[str], flag: str, allowed: bool) -> tuple[bool, list[str]]:
    if flag in args and not allowed:
        raise ValueError(f"{flag} does not belong to this verb")
    return flag in args, [word for word in args if word != flag]


def _take_value(args: Sequence[str], flag: str, allowed: bool) -> tuple[str | None, list[str]]:
    """`--check FILE` or `--check=FILE`."""
    rest = list(args)
    for position, word in enumerate(rest):
        name, equals, value = word.partition("=")
        if name != flag:
            continue
        if not allowed:
            raise ValueError(f"{flag} does not belong to this verb")
        if not equals:
            if position + 1 == len(rest):
                raise ValueError(f"{flag} needs a file")
            value = rest.pop(position + 1)
        del rest[position]
        return value, rest
    return None, rest
