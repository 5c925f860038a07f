"""The tiny model learns to recolour a shape by instruction, from random weights, also to colours that it never saw on
that shape: the producers' tensors, the trainer and its checkpoint, judged from the pixels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from producer_world import produce_here
from small_run import run_gang

from consumers.checkpoint_reader import open_checkpoint
from consumers.run_directory import facets_of
from producers.encode import PipelineEncoders
from producers.plan import make_plan
from qwenimg_dist.commands.sample_edit import condition_latents, edit_features
from qwenimg_dist.compose import load_config
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.demo.edits import Recolour, recolours, share_done, write_edits
from qwenimg_dist.models.generate import generate_latents, load_scheduler_config, seeded_noise, to_pictures
from qwenimg_dist.models.text_encoder import TextEncoder
from qwenimg_dist.models.tiny import tiny_pipeline_dir
from qwenimg_dist.models.transformer import assemble_transformer, load_transformer_config
from qwenimg_dist.models.vae import LatentCodec

SIDE = 64
NUM_EDITS = 1600
STEPS = 900
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
    "checkpoint.every=300",
    "checkpoint.keep=10",
    "evaluate.every=300",
    "evaluate.grid_every=300",
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


def test_recolouring_is_learned(tmp_path: Path) -> None:
    produce(tmp_path)
    ended = run_gang(["-m", "consumers", *words(tmp_path)], 1, tmp_path / "logs", timeout_s=3000)
    assert ended[0].code == 0, ended[0].output[-3000:]
    _, held_out = recolours()
    shares = {step: share_done(draw(tmp_path, held_out, step), held_out) for step in (300, STEPS)}  # type: ignore[arg-type]
    untouched = share_done([one.draw(SIDE, seed=1)[0] for one in held_out], held_out)
    print(f"recoloured, of {len(held_out)} held-out edits: {shares}")
    assert untouched == 0.0
    assert shares[STEPS] >= 0.7
    assert (tmp_path / "run" / "samples" / f"edits-step-{STEPS:08d}.png").is_file()
