"""Is a model better than what it came from? Differences of pairs with their intervals, a verdict, and a page of it.

Place in the flow: `consumers/compare.py` measures two models on the same samples, prompts and seeds and hands the
numbers here; knows neither model nor torch. Differences are taken pair by pair: rewards per prompt (the mean over its
seeds, whose pictures are not independent), losses per held-out sample. An interval is Student's of the mean difference,
95 %. Refuses to call a difference one that the interval does not exclude from nought.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from qwenimg_dist.report.lineage import lineage_table
from qwenimg_dist.report.page import (
    Code,
    KeyFigure,
    KeyFigures,
    Paragraph,
    Picture,
    Pictures,
    Piece,
    Section,
    write_report,
)
from qwenimg_dist.report.table import Table

FORMAT: Final = 1
PAGE: Final = "eval.html"
Values = npt.NDArray[np.float64]
Answer = Literal["better", "worse", "mixed", "no difference"]
_Z: Final = 1.959963984540054  # the normal's 97.5 %


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Mean difference of n pairs, and the interval that holds the true one with 95 %."""

    mean: float
    low: float
    high: float
    num: int


@dataclass(frozen=True, kw_only=True)
class GridPair:
    """Pictures of the same cells by both models."""

    title: str
    start: Path
    model: Path


def paired(differences: Values) -> Paired:
    """Student's interval of the mean; that of fewer than two differences is everything. NaN are left out."""
    known = differences[np.isfinite(differences)]
    num = len(known)
    mean = float(known.mean()) if num else math.nan
    if num < 2:
        return Paired(mean=mean, low=-math.inf, high=math.inf, num=num)
    half = student_quantile(num - 1) * float(known.std(ddof=1)) / math.sqrt(num)
    return Paired(mean=mean, low=mean - half, high=mean + half, num=num)


def student_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t, by Hill's expansion about the normal's (Abramowitz and Stegun 26.7.5): within 1 %
    from 3 degrees of freedom on; the two below stand as they are."""
    if freedom <= 2:
        return {1: 12.706, 2: 4.303}[freedom]
    z, n = _Z, float(freedom)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n**power for power, term in enumerate(terms, start=1))


# ---- Numbers.


def compare_rewards(start: Mapping[str, Any], model: Mapping[str, Any], *, per_prompt: int) -> dict[str, Any]:
    """Both models' `judge_pictures` -> means, paired differences, counts; by component and of the sum."""
    names = [*model["components"], "total"]
    sides = [{**one["components"], "total": one["total"]} for one in (start, model)]
    found = {name: _reward(_array(sides[0][name]), _array(sides[1][name]), per_prompt) for name in names}
    change = _array(sides[1]["total"]) - _array(sides[0]["total"])
    return {
        "total": found.pop("total"),
        "components": found,
        "change_by_cell": [float(one) if np.isfinite(one) else None for one in change],
        "notes": sorted({*start["notes"], *model["notes"]}),
    }


def _reward(start: Values, model: Values, per_prompt: int) -> dict[str, Any]:
    both = np.isfinite(start) & np.isfinite(model)
    change = np.where(both, model - start, np.nan).reshape(-1, per_prompt)
    counts = np.isfinite(change).sum(axis=1)
    by_prompt = np.nansum(change, axis=1)[counts > 0] / counts[counts > 0]
    return {
        "start": _mean(start[both]),
        "model": _mean(model[both]),
        **_interval(paired(by_prompt)),
        "pictures": int(both.sum()),
        "rose": int((change > 0).sum()),
        "fell": int((change < 0).sum()),
        "unjudged": {"start": int((~np.isfinite(start)).sum()), "model": int((~np.isfinite(model)).sum())},
    }


def compare_losses(start: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """Both models' held-out errors on the same samples -> means and paired differences, by quantile, class, bucket.

    Raises ValueError if they were measured on other samples.
    """
    quantiles = model["sigma_quantiles"]
    classes = {}
    for resolution, mine in model["classes"].items():
        theirs = start["classes"].get(resolution, {})
        if theirs.get("keys") != mine["keys"] or start["sigma_quantiles"] != quantiles:
            raise ValueError(
                f"the two models were measured on other samples at {resolution} px: remove the losses-*.json"
            )
        classes[resolution] = (_array(theirs["errors"]), _array(mine["errors"]), mine["buckets"])
    before, after = (np.concatenate([one[side] for one in classes.values()]) for side in (0, 1))
    buckets = [bucket for one in classes.values() for bucket in one[2]]
    return {
        **_loss(before, after),
        "by_quantile": {f"{q:g}": _loss(before[:, i : i + 1], after[:, i : i + 1]) for i, q in enumerate(quantiles)},
        "by_class": {resolution: _loss(one[0], one[1]) for resolution, one in classes.items()},
        "by_bucket": {
            bucket: _loss(before[where], after[where])
            for bucket in sorted(set(buckets))
            for where in [np.array([one == bucket for one in buckets])]
        },
    }


def _loss(start: Values, model: Values) -> dict[str, Any]:
    """`change` is relative, `mean` with `low` and `high` the difference itself."""
    at_start, now = float(start.mean()), float(model.mean())
    return {
        "start": at_start,
        "model": now,
        "change": now / at_start - 1,
        **_interval(paired((model - start).mean(axis=1))),
    }


def verdict(
    losses: Mapping[str, Any] | None,
    rewards: Mapping[str, Any] | None,
    *,
    tolerance: float,
    other: str = "what it came from",
) -> dict[str, Any]:
    """`answer` and a line that says why; `other` is what the line calls the other model.

    A loss counts as worse beyond `tolerance` (relative), at the whole or at any class; a difference whose interval
    holds nought counts as none.
    """
    states: list[Answer] = []
    words: list[str] = []
    if rewards is not None:
        total = rewards["total"]
        states.append(_state(total, better=1))
        if not total["num"]:
            words.append("no picture could be judged")
    if rewards is not None and rewards["total"]["num"]:
        total = rewards["total"]
        interval = f"95 % {total['low']:+.3f} to {total['high']:+.3f}" if _bounded(total) else "no interval"
        words.append(
            f"reward {total['start']:.3f} -> {total['model']:.3f} ({total['mean']:+.3f}, {interval}, "
            f"{total['num']} prompts, {total['pictures']} pictures)"
        )
    if losses is not None:
        states.append(_loss_state(losses, tolerance))
        worst, found = max(losses["by_class"].items(), key=lambda one: one[1]["change"])
        where = f", {found['change']:+.1%} at {worst} px" if len(losses["by_class"]) > 1 else ""
        words.append(
            f"held-out loss {losses['start']:.4f} -> {losses['model']:.4f} ({losses['change']:+.1%}{where}, tolerance "
            f"{tolerance:.0%}, {losses['num']} samples)"
        )
    answer: Answer = "no difference"
    if "better" in states or "worse" in states:
        answer = "mixed" if "better" in states and "worse" in states else "better" if "better" in states else "worse"
    told = {
        "better": f"BETTER than {other}",
        "worse": f"WORSE than {other}",
        "mixed": "MIXED, better in one and worse in another",
        "no difference": f"NO DIFFERENCE shown to {other}",
    }[answer]
    return {"answer": answer, "line": f"{told}: {'; '.join(words)}"}


def _state(found: Mapping[str, Any], *, better: int) -> Answer:
    if not _bounded(found) or found["low"] <= 0 <= found["high"]:
        return "no difference"
    return "better" if found["mean"] * better > 0 else "worse"


def _loss_state(losses: Mapping[str, Any], tolerance: float) -> Answer:
    # Written so that a NaN is worse than anything.
    beyond = [one for one in (losses, *losses["by_class"].values()) if not one["change"] <= tolerance]
    if any(not math.isfinite(one["change"]) or _state(one, better=-1) == "worse" for one in beyond):
        return "worse"
    return "better" if _state(losses, better=-1) == "better" else "no difference"


def _bounded(found: Mapping[str, Any]) -> bool:
    return found["low"] is not None and found["high"] is not None


def _interval(found: Paired) -> dict[str, Any]:
    return {name: value if math.isfinite(value) else None for name, value in asdict(found).items()}


def _array(values: Sequence[Any]) -> Values:
    return np.array(values, dtype=np.float64)  # None becomes NaN


def _mean(values: Values) -> float | None:
    return float(values.mean()) if len(values) else None


# ---- The page.


def write_page(out: Path, result: Mapping[str, Any], grids: Sequence[GridPair], certificate: Mapping[str, Any]) -> Path:
    """`out/eval.html`, one file that opens without network."""
    start, model = result["start"]["told"], result["model"]["told"]
    sections = [
        Section(title="Verdict", pieces=_verdict_pieces(result)),
        Section(title="Rewards", pieces=_reward_pieces(result["rewards"])),
        Section(title="Held-out losses", pieces=_loss_pieces(result["losses"])),
        Section(title="Pictures", pieces=tuple(_grid_pieces(grids))),
        Section(title="Lineage", pieces=(lineage_table(certificate),) if certificate.get("lineage") else ()),
        Section(
            title="Settings",
            pieces=(Code(text="\n".join(f"{key}: {value}" for key, value in result["settings"].items())),),
        ),
    ]
    subtitle = f"{model}, against {start}"
    write_report(out / PAGE, title="Is it better?", subtitle=subtitle, sections=sections)
    return out / PAGE


def _verdict_pieces(result: Mapping[str, Any]) -> tuple[Piece, ...]:
    tiles = [KeyFigure(label="verdict", value=result["verdict"]["answer"])]
    if result["rewards"]:
        total = result["rewards"]["total"]
        note = f"{_number(total['start'])} -> {_number(total['model'])}, 95 % {_range(total)}"
        tiles.append(KeyFigure(label="reward", value=f"{total['mean']:+.3f}" if total["num"] else "-", note=note))
    if "change" in result["losses"]:
        losses = result["losses"]
        note = f"{losses['start']:.4f} -> {losses['model']:.4f}"
        tiles.append(KeyFigure(label="held-out loss", value=f"{losses['change']:+.1%}", note=note))
        if losses.get("pairs"):
            share = losses["pairs"]["pair_accuracy"]
            tiles.append(
                KeyFigure(label="held-out pairs", value=f"{share:.0%}", note="preferred as people or rule did")
            )
    return (Paragraph(text=result["verdict"]["line"]), KeyFigures(figures=tuple(tiles)))


def _reward_pieces(rewards: Mapping[str, Any] | None) -> tuple[Piece, ...]:
    if not rewards:
        return (
            Paragraph(text="Not judged: no prompts (sample.prompts_file), or no reward has a weight (reward.weights)."),
        )
    rows = [_reward_row(name, one) for name, one in rewards["components"].items()]
    rows.append(_reward_row("weighted sum", rewards["total"]))
    columns = ("reward", "before", "now", "difference", "95 % interval", "prompts", "rose", "fell", "not judged")
    note = "Means over pictures of the same prompts and seeds; the interval is of the mean difference per prompt."
    notes = tuple(Paragraph(text=text) for text in rewards["notes"])
    return (Table(title="Rewards", columns=columns, rows=tuple(rows)), Paragraph(text=note), *notes)


def _reward_row(name: str, one: Mapping[str, Any]) -> tuple[Any, ...]:
    unjudged = f"{one['unjudged']['start']} before, {one['unjudged']['model']} now"
    change = f"{one['mean']:+.4f}" if one["num"] else "-"
    numbers = (_number(one["start"]), _number(one["model"]), change, _range(one))
    return (name, *numbers, one["num"], one["rose"], one["fell"], unjudged)


def _loss_pieces(losses: Mapping[str, Any]) -> tuple[Piece, ...]:
    if "left_out" in losses:
        return (Paragraph(text=f"Left out: {losses['left_out']}."),)
    groups = (("sigma quantile", "by_quantile"), ("class (px)", "by_class"), ("bucket", "by_bucket"))
    pieces: list[Piece] = []
    for title, key in groups:
        rows = [(name, *_loss_row(one)) for name, one in losses[key].items()]
        if key == "by_quantile":
            rows.append(("all", *_loss_row(losses)))
        columns = (title, "before", "now", "change", "difference, 95 %", "samples")
        pieces.append(Table(title=f"Held-out loss by {title}", columns=columns, rows=tuple(rows)))
    if losses.get("pairs"):
        rows = [(name.replace("_", " "), f"{value:.4g}") for name, value in losses["pairs"].items()]
        title = "Held-out pairs, with what it came from as the reference"
        pieces.append(Table(title=title, columns=("measure", "value"), rows=tuple(rows)))
    return tuple(pieces)


def _loss_row(one: Mapping[str, Any]) -> tuple[Any, ...]:
    return (f"{one['start']:.4f}", f"{one['model']:.4f}", f"{one['change']:+.1%}", _range(one), one["num"])


def _grid_pieces(grids: Sequence[GridPair]) -> list[Piece]:
    return [
        Pictures(
            columns=2,
            pictures=(
                Picture.read(grid.start, f"before: {grid.title}"),
                Picture.read(grid.model, f"now: {grid.title}"),
            ),
        )
        for grid in grids
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _range(found: Mapping[str, Any]) -> str:
    return f"{found['low']:+.4f} to {found['high']:+.4f}" if _bounded(found) else "-"
