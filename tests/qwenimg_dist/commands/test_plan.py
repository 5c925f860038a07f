"""`plan` as a command: tables or JSON, exit code 2 for what cannot fit, 0 with `plan.force`, a probe on real ranks."""

from __future__ import annotations

import json

import pytest

from qwenimg_dist.commands import plan

FULL = ["model=qwen_image_2512", "cluster=nodes_8x8", "train.steps=1000"]


def test_a_plan_that_fits_is_told_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.run(FULL) == 0
    told = capsys.readouterr().out
    for words in (
        "Peak of one rank by phase",
        "cache: latents 1328",
        "Scaling, a model",
        "assumed (no data.path)",
        "fits:",
    ):
        assert words in told, words


def test_a_plan_that_cannot_fit_ends_with_2_and_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    given = [*FULL, "cluster.ranks=4", "cluster.host_memory_gib=null", "plan.images=7"]
    assert plan.run([*given, "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False
    assert "needs" in found["faults"][0]
    assert ["cluster.ranks=8"] in [change["overrides"] for change in found["changes"]]
    assert found["data"]["rows"] == 7
    assert found["device_memory"]["phases"][0]["parts"]["states"] == pytest.approx(12 * 20_430_401_088 / 4)
    assert [point["ranks"] for point in found["scaling_model"]][-1] == 1024
    assert plan.run([*given, "plan.force=true", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"] is False


def test_producers_are_planned_for_and_refused_where_a_gpu_cannot_hold_their_encoders(
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["model=qwen_image_2512", "cluster=nodes_8x8_both", "train.steps=1000"]
    assert plan.run(given) == 0
    told = capsys.readouterr().out
    assert "Producers: 8 with 4 CPUs and 1 GPUs each (a model)" in told
    assert "in `run`, training waits for producers" in told
    few = [*given, "cluster.gpus_per_producer=0.25"]
    assert plan.run([*few, "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False
    assert found["faults"] == found["producers"]["faults"] != []
    assert plan.run([*few, "plan.force=true"]) == 0
    assert "producers do not fit: a producer's encoders need" in capsys.readouterr().out


@pytest.mark.slow
def test_a_probe_measures_on_two_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.run(["cluster.ranks=2", "plan.probe=true", "plan.probe_steps=2", "train.steps=100", "--json"]) == 0
    time = json.loads(capsys.readouterr().out)["time"]
    assert time["measured"]
    assert time["hours"] > 0
    low, high = time["phases"]
    assert (low["steps"], high["steps"]) == pytest.approx((70, 30))
    assert low["step_s"] > low["compute_s"] > 0
