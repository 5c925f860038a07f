"""How `qwenimg-dist pairs` makes pairs; `sample` says how pictures are drawn, `reward` how they are judged."""

from __future__ import annotations

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from qwenimg_dist.config.section import Section


class PairsConfig(Section):
    path: str | None = None
    """Folder for the pictures and `pairs.jsonl`; `produce source=pairs source.path=FOLDER` takes it."""
    num_seeds: int = Field(default=8, ge=2)
    """Pictures per prompt, of which the best and the worst make the pair. More widen the gap between them and cost
    drawing in proportion."""
    seed: NonNegativeInt = 0
    """Of the pictures' seeds, which differ from prompt to prompt."""
    margin: NonNegativeFloat = 0.1
    """Least gap between the best and the worst picture's total; a prompt with less is a tie and gives no pair. In the
    unit of the rewards' sum. A higher one gives fewer and clearer pairs."""
    batch_size: PositiveInt = 8
    """Pictures that are drawn at once: more are faster where memory allows."""
    keep_all: bool = False
    """Keep the pictures between best and worst, and those of ties, too."""
    sheet: NonNegativeInt = 24
    """Pairs in `sheet.html`, the newest; 0 writes none."""
