"""Paired differences, their intervals, and what may be called better."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwenimg_dist.report.comparison import (
    GridPair,
    compare_losses,
    compare_rewards,
    paired,
    student_quantile,
    verdict,
    write_page,
)


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (127, 1.979)]
)
def test_student_quantiles_are_those_of_the_tables(freedom: int, expected: float) -> None:
    assert student_quantile(freedom) == pytest.approx(expected, rel=0.01)


def test_the_interval_covers_the_true_mean_in_95_of_100_draws() -> None:
    rng = np.random.default_rng(0)
    covered = [found.low <= 0.3 <= found.high for found in (paired(rng.normal(0.3, 2.0, size=12)) for _ in range(4000))]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.012)


def test_of_one_pair_nothing_is_known_and_nan_is_no_pair() -> None:
    alone = paired(np.array([0.5, np.nan]))
    assert (alone.mean, alone.low, alone.high, alone.num) == (0.5, -math.inf, math.inf, 1)
    assert paired(np.array([])).num == 0


def judged(values: list[float | None], **components: list[float | None]) -> dict[str, Any]:
    return {"total": values, "components": components or {"rule": values}, "notes": []}


def test_prompts_not_pictures_are_counted_and_what_one_side_lacks_is_left_out() -> None:
    start = judged([0.0, 0.2, 0.4, None, 0.1, None])
    model = judged([0.4, 0.4, None, 0.9, 0.6, 0.7])
    found = compare_rewards(start, model, per_prompt=2)
    total = found["total"]
    # Prompt 0: 0.4 and 0.2; prompt 1 has no pair of pictures; prompt 2: 0.5.
    assert total["num"] == 2
    assert total["mean"] == pytest.approx((0.3 + 0.5) / 2)
    assert total["pictures"] == 3
    assert (total["start"], total["model"]) == (pytest.approx(0.1), pytest.approx(1.4 / 3))
    assert total["unjudged"] == {"start": 2, "model": 1}
    assert (total["rose"], total["fell"]) == (3, 0)
    assert found["components"]["rule"]["mean"] == total["mean"]
    assert found["change_by_cell"] == [pytest.approx(0.4), pytest.approx(0.2), None, None, pytest.approx(0.5), None]


def rewards(change: float, scatter: float = 0.01) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    start = rng.uniform(0.3, 0.7, 40)
    return compare_rewards(
        judged(start.tolist()), judged((start + change + rng.normal(0, scatter, 40)).tolist()), per_prompt=1
    )


def errors(values: np.ndarray, resolution: str = "64") -> dict[str, Any]:
    keys = [f"k{i}" for i in range(len(values))]
    one = {"keys": keys, "buckets": ["64x64", "64x32"] * (len(values) // 2), "errors": values.tolist()}
    return {"sigma_quantiles": [0.2, 0.8], "classes": {resolution: one}}


def losses(factor: float, scatter: float = 0.001) -> dict[str, Any]:
    rng = np.random.default_rng(2)
    start = rng.uniform(0.5, 1.5, (20, 2))
    return compare_losses(errors(start), errors(start * factor + rng.normal(0, scatter, (20, 2))))


@pytest.mark.parametrize(
    ("loss", "reward", "answer"),
    [
        (1.0, 0.1, "better"),
        (1.03, 0.1, "better"),  # within the tolerance
        (1.08, 0.1, "mixed"),
        (1.08, 0.0, "worse"),
        (1.0, -0.1, "worse"),
        (0.9, -0.1, "mixed"),
        (0.9, 0.0, "better"),
        (1.0, 0.0, "no difference"),
    ],
)
def test_verdicts(loss: float, reward: float, answer: str) -> None:
    scatter = 0.05 if reward == 0.0 else 0.01
    noise = 0.2 if loss == 1.0 else 0.001
    found = verdict(losses(loss, noise), rewards(reward, scatter), tolerance=0.05)
    assert found["answer"] == answer, found["line"]
    assert found["line"].startswith(answer.upper())
    assert "prompts" in found["line"]
    assert "held-out loss" in found["line"]


def test_one_side_of_the_numbers_is_enough_and_a_nan_is_worse() -> None:
    assert verdict(None, rewards(0.2), tolerance=0.05)["answer"] == "better"
    assert verdict(losses(0.8), None, tolerance=0.05)["answer"] == "better"
    broken = np.full((20, 2), np.nan)
    assert verdict(compare_losses(errors(np.ones((20, 2))), errors(broken)), None, tolerance=0.05)["answer"] == "worse"


def test_where_nothing_could_be_judged_that_is_said(tmp_path: Path) -> None:
    nothing = compare_rewards(judged([None, None]), judged([0.5, None]), per_prompt=1)
    found = verdict(losses(1.0, 0.2), nothing, tolerance=0.05, other="the other model")
    assert found["line"].startswith("NO DIFFERENCE shown to the other model: no picture could be judged; held-out loss")
    side = {"told": "x"}
    result = {"start": side, "model": side, "verdict": found, "rewards": nothing, "losses": losses(1.0), "settings": {}}
    assert "1 before" not in write_page(tmp_path, result, [], {}).read_text()


def test_losses_by_quantile_and_bucket_and_only_of_the_same_samples() -> None:
    start, model = np.ones((4, 2)), np.array([[1.1, 1.3], [1.0, 1.0], [1.1, 1.3], [1.0, 1.0]])
    found = compare_losses(errors(start), errors(model))
    assert found["change"] == pytest.approx(0.1)
    assert {name: one["change"] for name, one in found["by_quantile"].items()} == pytest.approx(
        {"0.2": 0.05, "0.8": 0.15}
    )
    assert {name: one["change"] for name, one in found["by_bucket"].items()} == pytest.approx(
        {"64x64": 0.2, "64x32": 0.0}
    )
    assert found["by_class"]["64"]["num"] == 4
    with pytest.raises(ValueError, match="other samples at 64 px"):
        compare_losses(errors(np.ones((6, 2))), errors(model))


def test_the_page_has_the_verdict_the_tables_and_both_grids_and_needs_no_network(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    found_losses, found_rewards = losses(1.08), rewards(0.1)
    side = {"told": "step 3 of RUN", "path": "RUN"}
    result = {
        "start": side,
        "model": side,
        "verdict": verdict(found_losses, found_rewards, tolerance=0.05),
        "losses": {**found_losses, "pairs": {"pair_accuracy": 0.75}},
        "rewards": found_rewards,
        "settings": {"prompts": 40},
    }
    lineage = {"stage": "dpo", "model": "tiny", "path": "P", "fingerprint": "f", "parent": None}
    grid = GridPair(title="same", start=tmp_path / "a.png", model=tmp_path / "b.png")
    page = write_page(tmp_path, result, [grid], {"lineage": lineage}).read_text()
    for word in (
        "MIXED",
        "Held-out loss by bucket",
        "64x32",
        "weighted sum",
        "pair accuracy",
        "Lineage",
        "before: same",
    ):
        assert word in page
    assert page.count("data:image/png") == 2
    assert "http://" not in page
    bare = {**result, "rewards": None, "losses": {"left_out": "no data set"}, "verdict": {"answer": "x", "line": "y"}}
    assert "Left out: no data set" in write_page(tmp_path, bare, [], {}).read_text()
