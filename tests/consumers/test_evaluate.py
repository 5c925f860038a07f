"""Groups of held-out losses are means over the right samples; the worst samples are named."""

from __future__ import annotations

import numpy as np
import pytest

from consumers.evaluate import WORST_COLUMNS, HeldOut, Measured
from consumers.held_out import HeldOutClass, not_validated, start_from_json
from qwenimg_dist.compose import load_config


def classes(*, mix: bool = False) -> dict[int, HeldOutClass]:
    small = HeldOutClass(
        resolution=64,
        keys=("a", "b", "c"),
        buckets=("64x64", "64x32", "64x64"),
        tokens=(64, 65, 600),
        datasets=("photos", "text", "photos") if mix else ("",) * 3,
        batches=(),
    )
    large = HeldOutClass(
        resolution=128,
        keys=("a",),
        buckets=("128x128",),
        tokens=(64,),
        datasets=("photos",) if mix else ("",),
        batches=(),
    )
    return {64: small, 128: large}


NOW = {64: np.array([[1.0, 3.0], [2.0, 4.0], [6.0, 8.0]]), 128: np.array([[10.0, 20.0]])}
START = {64: np.array([[2.0, 2.0], [1.0, 1.0], [9.0, 9.0]]), 128: np.array([[30.0, 30.0]])}


def held_out() -> HeldOut:
    return HeldOut(load_config(["evaluate.sigma_quantiles=[0.1,0.9]"]), classes(), None)


def test_groups() -> None:
    assert held_out().metrics(NOW, [64], START) == pytest.approx(
        {
            "eval/loss": 4.0,
            "eval/loss_q0.1": 3.0,
            "eval/loss_q0.9": 5.0,
            "eval/num_samples": 3,
            "eval/start_loss": 4.0,
            "eval/start_loss_q0.1": 4.0,
            "eval/start_loss_q0.9": 4.0,
            "eval/text/1-64": 2.0,
            "eval/text/65-128": 3.0,
            "eval/text/513+": 7.0,
            "eval/loss_64": 4.0,
            "eval/start_loss_64": 4.0,
            "eval/loss_128": 15.0,
            "eval/start_loss_128": 30.0,
            "eval/bucket/64x64": 4.5,
            "eval/bucket/64x32": 3.0,
            "eval/bucket/128x128": 15.0,
        }
    )


def test_classes_of_the_phase_are_pooled_by_sample() -> None:
    found = held_out().metrics(NOW, [64, 128], None, prefix="eval/raw/")
    assert found["eval/raw/loss"] == pytest.approx((12 + 15) / 4)
    assert found["eval/raw/text/1-64"] == pytest.approx((2 + 15) / 2)
    assert not [name for name in found if "start" in name]


def test_several_data_sets_have_a_loss_each() -> None:
    held_out = HeldOut(load_config(["evaluate.sigma_quantiles=[0.1,0.9]"]), classes(mix=True), None)
    found = held_out.metrics(NOW, [64], None)
    assert found["eval/dataset/photos"] == pytest.approx((2 + 7 + 15) / 3)
    assert found["eval/dataset/text"] == pytest.approx(3.0)


def test_a_data_set_without_a_held_out_row_is_said() -> None:
    assert not_validated(["photos", "text"], classes(mix=True)) == ""
    found = not_validated(["drawn", "photos", "text"], classes(mix=True))
    assert "no row of data.mix.drawn is held out" in found
    assert not_validated([""], classes()) == ""
    assert "none of the selected rows is held out" in not_validated([""], {})


def test_worst_by_loss_and_by_change() -> None:
    rows = [dict(zip(WORST_COLUMNS, row, strict=True)) for row in held_out().worst(NOW, START)]
    assert [(row["key"], row["resolution"]) for row in rows] == [("a", 128), ("c", 64), ("b", 64), ("a", 64)]
    assert rows[2]["change"] == pytest.approx(2.0)
    assert held_out().worst(NOW, None)[0][-1] is None


def test_the_start_is_read_back_as_it_was_written() -> None:
    start = held_out().start_of(Measured(errors=START), "abc")
    back = start_from_json(start.to_json())
    assert back is not None
    assert (back.keys, back.quantiles, back.seed) == (start.keys, start.quantiles, start.seed)
    assert all(np.array_equal(back.errors[r], START[r]) for r in START)
    assert back.rejected == {}
