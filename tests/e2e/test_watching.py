"""A run that gets worse than the model it started from is stopped on real ranks, at classes it never trained too."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import fake_dataset
import numpy as np
import pytest
from small_run import lines, overrides, run_gang, write_input

from consumers.checkpoint_files import list_checkpoints

WATCH = (
    "evaluate.every=2",
    "evaluate.guard=stop",
    "evaluate.guard_patience=3",
    "evaluate.weights=both",
    "train.norms_every=3",
    "train.steps=20",
    "checkpoint.every=100",
    "data.held_out=0.2",
)
ABSURD = ("optim.lr=0.5", "optim.ema_decay=0.5", "optim.warmup_steps=0")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watch")
    write_input(folder, others=(32,))
    return folder


@pytest.fixture(scope="module")
def stopped(root: Path) -> list[str]:
    """Outputs of rank 0: up to a stop in between, then to the guard's, then the same command once more."""
    outputs = []
    for number, (expected, *extra) in enumerate([(0, "train.stop_after=5"), (1,), (1,)]):
        command = ["-m", "consumers", *overrides(root, "degraded", *WATCH, *ABSURD, *extra)]
        ended = run_gang(command, 2, root / f"logs-{number}")
        assert [end.code for end in ended] == [expected] * 2, ended[0].output[-3000:] + ended[1].output[-3000:]
        outputs.append(ended[0].output)
    return outputs


@pytest.mark.slow
def test_the_guard_stops_a_degraded_run_saved_and_after_a_resume(root: Path, stopped: list[str]) -> None:
    run_dir = root / "degraded"
    log = lines(run_dir / "metrics.jsonl")
    assert [line["eval/guard"] for line in log if "eval/guard" in line] == [1, 2, 2, 3]  # step 5 is no evaluation due
    assert log[-1]["step"] == 6
    for words in ("error: degradation at step 6", "32 px", "not trained", "trained in another phase", "optim.lr"):
        assert words in stopped[1]
    assert [(info.step, info.fault) for info in list_checkpoints(run_dir)][-1] == (6, None)
    assert "error: degradation at step 6" in stopped[2]  # it does not go on by itself
    assert lines(run_dir / "metrics.jsonl") == log


@pytest.mark.slow
def test_everything_that_is_watched_is_written_down(root: Path, stopped: list[str]) -> None:
    run_dir = root / "degraded"
    log = lines(run_dir / "metrics.jsonl")
    evaluated = log[1]
    for resolution in (32, 64, 128):
        loss, start = evaluated[f"eval/loss_{resolution}"], evaluated[f"eval/start_loss_{resolution}"]
        assert loss > 1.02 * start  # type: ignore[operator]
    kept = json.loads((run_dir / "start_loss.json").read_text())
    assert sorted(map(int, kept["classes"])) == [32, 64, 128]
    for resolution in (32, 64, 128):
        errors = np.array(kept["classes"][str(resolution)]["errors"])
        assert errors.shape == (len(kept["classes"][str(resolution)]["keys"]), 5)
        assert evaluated[f"eval/start_loss_{resolution}"] == pytest.approx(errors.mean())
    assert {"eval/bucket/64x64", "eval/bucket/16x32", "eval/text/1-64", "eval/raw/loss_32"} <= evaluated.keys()
    assert evaluated["eval/raw/loss"] != evaluated["eval/loss"]
    assert [line["step"] for line in log if "norms/grad/block_01" in line] == [3, 6]
    assert log[2]["norms/grad/all"] == pytest.approx(log[2]["train/grad_norm"], rel=2e-3)
    assert {"train/slowest_rank", "train/host_memory_rank", "train/padding_flops", "train/data_wait_share"} <= log[
        2
    ].keys()
    table, by_rank = lines(run_dir / "tables.jsonl")[-2:]
    assert (by_rank["step"], by_rank["table"]) == (6, "ranks")
    assert [row["rank"] for row in by_rank["rows"]] == [0, 1]  # type: ignore[attr-defined]
    peaks = [row["peak_host_memory_gb"] for row in by_rank["rows"]]  # type: ignore[attr-defined]
    assert max(peaks) == log[-1]["train/host_memory_gb"]
    assert min(peaks) > 0.1
    assert (table["step"], table["table"]) == (6, "worst_held_out")
    worst = table["rows"][0]  # type: ignore[index]
    assert worst["key"] in kept["classes"][str(worst["resolution"])]["keys"]
    assert worst["change"] == pytest.approx(worst["loss"] / worst["start_loss"] - 1)


@pytest.mark.slow
def test_the_starting_losses_are_those_of_the_samples_at_their_class(root: Path, stopped: list[str]) -> None:
    """Against a plain forward of the pipeline's own weights over the latents that the producer made."""
    import torch
    from diffusers import QwenImageTransformer2DModel

    from qwenimg_dist.compose import load_config
    from qwenimg_dist.flow.sigmas import draw_noise, resolution_mu, sigma_at_quantiles
    from qwenimg_dist.models.transformer import predict_velocity

    kept = json.loads((root / "degraded" / "start_loss.json").read_text())
    rows = fake_dataset.make_rows(60, captions=2, sizes=((256, 256), (256, 128), (128, 256)))
    by_key = {row.key: row for row in rows}
    model = QwenImageTransformer2DModel.from_pretrained(root / "pipeline" / "transformer").eval()
    objective = load_config([]).objective
    for resolution in ("32", "128"):
        entry = kept["classes"][resolution]
        for slot in (0, len(entry["keys"]) - 1):
            row = by_key[entry["keys"][slot]]
            bucket = fake_dataset.bucket_of(row, int(resolution))
            assert bucket is not None
            latents = torch.from_numpy(fake_dataset.fake_latents(row.key, bucket))[None]
            text = torch.from_numpy(fake_dataset.fake_features(row.captions[0]))[None]
            noise = draw_noise(0, 0, [slot], latents.shape[1:], stream="eval")
            sigmas = sigma_at_quantiles(
                kept["sigma_quantiles"],
                density=objective.sigma_density,
                mean=objective.sigma_mean,
                std=objective.sigma_std,
                mu=resolution_mu(bucket.image_tokens),
            )
            for sigma, found in zip(sigmas, entry["errors"][slot], strict=True):
                noisy = (1 - sigma) * latents + sigma * noise
                with torch.no_grad():
                    velocity = predict_velocity(model, noisy, sigma[None], text)
                expected = float((velocity - (noise - latents)).square().mean())
                assert math.isclose(found, expected, rel_tol=2e-3), (resolution, slot)  # ranks ran in bf16


@pytest.mark.slow
def test_a_lost_class_and_changed_settings_are_named(root: Path, stopped: list[str]) -> None:
    copied = root / "lost"
    shutil.copytree(root / "degraded", copied)
    command = ["-m", "consumers", *overrides(root, "lost", *WATCH, *ABSURD)]
    go_on = ["evaluate.guard=warn", "evaluate.num_samples=3", "train.stop_after=8"]
    refused = run_gang([*command, *go_on, "evaluate.resolutions=[64,96]"], 1, root / "logs-missing")
    assert refused[0].code == 2
    assert "evaluate.resolutions names [96] px, the data set has latents at [32, 64, 128]" in refused[0].output
    ended = run_gang([*command, *go_on], 1, root / "logs-warn")
    assert ended[0].code == 0, ended[0].output[-2000:]
    assert "it goes on with evaluate.num_samples=4" in ended[0].output
    assert "warning: degradation at step 8" in ended[0].output
