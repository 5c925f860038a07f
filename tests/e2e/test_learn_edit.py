"""The tiny model learns to recolour a shape by instruction, from random weights, also to colours that it never saw on
that shape: the producers' tensors, the trainer and its checkpoint, judged from the pixels. Its export is the same model
in the stock edit pipelines, picture for picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from producer_world import produce_here
from small_run import run_gang
from stock_edit import STOCK, first_call, load_stock

from consumers.checkpoint_reader import open_checkpoint
from consumers.run_directory import facets_of
from producers.encode import PipelineEncoders
from producers.plan import make_plan
from qwenimg_dist.commands.main import main
from qwenimg_dist.commands.sample_edit import condition_latents, edit_features
from qwenimg_dist.compose import load_config
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.demo.edits import Recolour, recolours, share_done, write_edits
from qwenimg_dist.models.generate import generate_latents, load_scheduler_config, seeded_noise, to_pictures
from qwenimg_dist.models.pipeline import CERTIFICATE
from qwenimg_dist.models.text_encoder import TextEncoder
from qwenimg_dist.models.tiny import tiny_pipeline_dir
from qwenimg_dist.models.transformer import (
    assemble_transformer,
    load_transformer_config,
    pack_latents,
    predict_velocity,
    unpack_latents,
)
from qwenimg_dist.models.vae import LatentCodec

SIDE = 64
NUM_EDITS = 1600
STEPS = 900
SHOWN = 6
"""Edits that the stock pipeline draws too."""
WORDS = (
    "stage=edit",
    "model.edit=true",
    f"encode.resolutions=[{SIDE}]",
    "~curriculum.phases.high",
    "curriculum.phases.low.share=1",
    "curriculum.phases.low.global_batch=32",
    f"train.steps={STEPS}",
    "engine.precision=fp32",
    "optim.lr=2e-3",
    "optim.warmup_steps=20",
    "optim.ema_decay=0.99",
    "optim.cooldown_steps=250",
    f"checkpoint.every={STEPS}",
    f"evaluate.every={STEPS}",
    f"evaluate.grid_every={STEPS}",
    "train.report=off",
)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def words(root: Path) -> list[str]:
    return [*WORDS, f"data.path={root / 'data'}", f"run.path={root / 'run'}"]


def produce(root: Path) -> None:
    """In this process, by the real encoders."""
    write_edits(root / "source", num_edits=NUM_EDITS, seed=0, size_px=SIDE)
    config = load_config(words(root))
    pipeline = tiny_pipeline_dir(edit=True)
    facets = facets_of(config, pipeline)
    plan = make_plan(config, text_facet=facets.text, latents_facets=facets.latents)
    produce_here(
        root / "source" / "edits.jsonl",
        Dataset.create(root / "data", 512),
        plan,
        PipelineEncoders.load(pipeline, config),
        *words(root),
    )


def draw(root: Path, edits: list[Recolour], step: int | None = None) -> list[object]:
    """What the averaged weights of a checkpoint make of each edit."""
    config, folder = load_config(words(root)), tiny_pipeline_dir(edit=True)
    encoder, codec = TextEncoder.load(folder), LatentCodec.load(folder)
    reader = open_checkpoint(root / "run", step)
    model = assemble_transformer(
        load_transformer_config(folder / "transformer"), lambda name: reader.read(name, "ema"), dtype=torch.float32
    )
    pictures: list[object] = []
    for start in range(0, len(edits), 36):
        part = edits[start : start + 36]
        sources = [one.draw(SIDE, seed=10_000 + start + index)[0] for index, one in enumerate(part)]
        text = [
            edit_features(config.encode.edit, folder, encoder, [source], [one.instruction])[one.instruction]
            for one, source in zip(part, sources, strict=True)
        ]
        conditions = torch.stack([condition_latents(codec, [source], SIDE)[0] for source in sources])
        latents = generate_latents(
            model,
            text,
            None,
            seeded_noise(range(start, start + len(part)), SIDE, SIDE),
            num_steps=12,
            guidance=1.0,
            scheduler_config=load_scheduler_config(folder),
            conditions=[conditions],
        )
        pictures += to_pictures(codec.decode(latents))
    return pictures


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data` and the `run` that was trained on it."""
    root = tmp_path_factory.mktemp("learned")
    produce(root)
    ended = run_gang(["-m", "consumers", *words(root)], 1, root / "logs", timeout_s=3000)
    assert ended[0].code == 0, ended[0].output[-3000:]
    return root


def test_recolouring_is_learned(learned: Path) -> None:
    _, held_out = recolours()
    share = share_done(draw(learned, held_out), held_out)
    untouched = share_done([one.draw(SIDE, seed=1)[0] for one in held_out], held_out)
    print(f"recoloured, of {len(held_out)} held-out edits: {share:.3f}")
    assert untouched == 0.0
    assert share >= 0.7
    assert (learned / "run" / "samples" / f"edits-step-{STEPS:08d}.png").is_file()


def test_the_export_is_the_trained_model_in_the_stock_edit_pipelines(
    learned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = learned / "export"
    assert main(["ckpt", "export", f"run.path={learned / 'run'}", f"export.path={out}", "export.dtype=float32"]) == 0
    told = json.loads((out / CERTIFICATE).read_text())["parity"]["comparisons"]
    assert all(one["within"] for one in told)
    assert {one["case"] for one in told} >= {"unmasked", "edit", "edit_trimmed"}
    # The pipelines' areas are of the 20 B model.
    dimensions = pipeline_qwenimage_edit.calculate_dimensions
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda _, ratio: dimensions(SIDE**2, ratio))
    for name in ("VAE_IMAGE_SIZE", "CONDITION_IMAGE_SIZE"):
        monkeypatch.setattr(pipeline_qwenimage_edit_plus, name, SIDE**2)
    edits = recolours()[1][:: max(1, len(recolours()[1]) // SHOWN)][:SHOWN]
    ours = draw(learned, edits)
    reader = open_checkpoint(learned / "run")
    config = load_transformer_config(tiny_pipeline_dir(edit=True) / "transformer")
    trained = assemble_transformer(config, lambda name: reader.read(name, "ema"), dtype=torch.float32)
    for template in STOCK:
        pipeline = load_stock(out, template)
        assert pipeline.transformer.config.zero_cond_t
        pictures = []
        for index, one in enumerate(edits if template == "plus" else edits[:1]):
            with first_call(pipeline.transformer) as call:
                pictures += stock_picture(pipeline, one, index)
            assert_velocity_is(trained, call)
        if template == "plus":  # what it was trained on
            off = [
                np.abs(np.asarray(a, np.float32) - np.asarray(b)).mean() for a, b in zip(pictures, ours, strict=True)
            ]
            assert max(off) < 2.0, off
            assert share_done(pictures, edits) == share_done(ours, edits)  # type: ignore[arg-type]


def stock_picture(pipeline: Any, edit: Recolour, index: int) -> list[Image.Image]:
    """From the noise that `draw` begins with."""
    source = edit.draw(SIDE, seed=10_000 + index)[0]
    found: list[Image.Image] = pipeline(
        image=[source] if isinstance(pipeline, QwenImageEditPlusPipeline) else source,
        prompt=edit.instruction,
        latents=pack_latents(seeded_noise(range(index, index + 1), SIDE, SIDE)),
        height=SIDE,
        width=SIDE,
        num_inference_steps=12,
        true_cfg_scale=1.0,
    ).images
    return found


def assert_velocity_is(model: Any, call: dict[str, Any]) -> None:
    """What the model that was trained says to what the stock pipeline asked, by our call."""
    parts, begin = [], 0
    for _, height, width in call["img_shapes"][0]:
        tokens = call["hidden_states"][:, begin : begin + height * width]
        parts.append(unpack_latents(tokens, 2 * height, 2 * width))
        begin += height * width
    assert len(parts) == 2
    assert begin == call["hidden_states"].shape[1]
    with torch.no_grad():
        velocity = predict_velocity(
            model,
            parts[0],
            call["timestep"],
            call["encoder_hidden_states"],
            call["encoder_hidden_states_mask"],
            parts[1:],
        )
    expected = unpack_latents(call["answer"][:, : parts[0].shape[2] * parts[0].shape[3] // 4], *parts[0].shape[2:])
    assert float(expected.abs().max()) > 0.5
    torch.testing.assert_close(velocity, expected, atol=2e-5, rtol=0)
