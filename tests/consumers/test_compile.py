"""Compiled blocks under ZeRO-3: one graph for all, no breaks, and the steps of the eager engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gang_checks import SCRIPT
from small_run import run_gang

from qwenimg_dist.compose import load_config


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_compiled_blocks_take_the_steps_of_eager_ones(small_input: Path, tmp_path: Path) -> None:
    ended = run_gang(
        [SCRIPT, str(small_input / "pipeline"), str(tmp_path), "compile"], 2, tmp_path / "logs", timeout_s=900
    )
    assert [end.code for end in ended] == [0, 0], ended[0].output[-3000:]
    found = json.loads((tmp_path / "compile.json").read_text())
    assert found["graphs"] > 0
    assert found["breaks"] == 0
    assert found["loss"] < 1e-6
    assert found["weights"] < 1e-4  # of steps of 1e-3: Adam turns rounding of a gradient near 0 into a part of a step
    # The online reference rounds as the trained model does, or the first DPO loss would not be ln 2.
    assert found["reference_graphs"] > 0
    assert found["reference"] < 1e-5


def test_compiling_needs_whole_blocks() -> None:
    with pytest.raises(ValueError, match="gather=block"):
        load_config(["engine.compile=true", "engine.gather=layer"])
