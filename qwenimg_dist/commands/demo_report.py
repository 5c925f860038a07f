"""The demo's one-file report: figures read from pixels, grids, the run's curves and funnel, the commands used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from qwenimg_dist.demo.scores import Score
from qwenimg_dist.report.page import Code, KeyFigure, KeyFigures, Paragraph, Picture, Pictures, Section, write_report
from qwenimg_dist.report.run_report import run_sections
from qwenimg_dist.report.table import Table

_CAPTIONS: Final = {
    "untrained": "before training (random weights)",
    "seen-64px": "64 px, combinations seen in training",
    "held-out-64px": "64 px, colour and shape never seen together",
    "seen-128px": "128 px, combinations seen in training",
    "held-out-128px": "128 px, colour and shape never seen together",
}


def write_demo_report(root: Path, scores: Mapping[str, Score], commands: Sequence[str], seconds: float) -> Path:
    """Write `root/report.html` and return its path."""
    out = root / "report.html"
    tiles = [
        KeyFigure(label=_CAPTIONS[name], value=f"{score.both:.0%}", note="colour and shape right")
        for name, score in scores.items()
    ]
    table = Table(
        title="What the judge read from the pixels",
        columns=("grid", "cells", "colour right", "shape right", "both right"),
        rows=tuple(
            (_CAPTIONS[name], s.num_cells, f"{s.colour:.1%}", f"{s.shape:.1%}", f"{s.both:.1%}")
            for name, s in scores.items()
        ),
    )
    grids = tuple(Picture.read(root / f"{name}.png", _CAPTIONS[name]) for name in scores)
    sections = [
        Section(title="Result", pieces=(KeyFigures(figures=tuple(tiles)), table)),
        Section(title="Grids", pieces=(Pictures(pictures=grids),)),
        *run_sections(root / "run", [root / "data"]),
        Section(
            title="The same on your own pictures",
            pieces=(
                Paragraph(text="These commands made all of the above; `source.path` may be any folder of pictures."),
                Code(text="\n".join(commands)),
            ),
        ),
    ]
    write_report(
        out, title="qwenimg-dist demo", subtitle=f"this part took {seconds / 60:.1f} minutes", sections=sections
    )
    return out
