"""From files to the velocity: what training asks of the model for an edit is what the stock edit pipelines ask.

The real encoders through the whole unit pipeline, catalog, ledger and stream; only Ray is left out. Beside them stand
stock's own pipelines on the same files, of which a hook on the transformer tells what it was asked and answered.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from producer_world import FINGERPRINT, draw, load_config_once, make_plan_for, produce_here
from stock_edit import stock_pipeline

from consumers.batch import MicroBatch
from consumers.objectives.flow_matching import FlowMatching, squared_errors
from consumers.stream import Stream
from producers.encode import PipelineEncoders
from qwenimg_dist.config import FlowMatchingConfig
from qwenimg_dist.data.catalog import RunFacets
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.data.generations import Generations
from qwenimg_dist.data.ledger_config import LedgerConfig
from qwenimg_dist.data.phases import PlannedPhase
from qwenimg_dist.flow.path import interpolate
from qwenimg_dist.models.edit_encoder import Template
from qwenimg_dist.models.tiny import TRANSFORMER_CONFIG, tiny_pipeline_dir
from qwenimg_dist.models.transformer import pack_latents, predict_velocity, unpack_latents
from qwenimg_dist.schema import EDIT, latents_facet, text_facet

SIZES = {0: (96, 96), 1: (200, 80), 2: (80, 170), 3: (120, 90)}
SIGMA = 0.25  # which survives a division by 1000 and back
VISION = {"plus": 96, "single": 64}


@pytest.fixture(scope="module")
def stock() -> Any:
    return QwenImagePipeline.from_pretrained(tiny_pipeline_dir(), transformer=None)


@pytest.fixture(params=[False, True], ids=["plain", "zero_cond_t"])
def transformer(request: pytest.FixtureRequest) -> QwenImageTransformer2DModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return QwenImageTransformer2DModel(**TRANSFORMER_CONFIG, zero_cond_t=request.param).eval()


def edits(several: bool) -> list[dict[str, Any]]:
    return [
        {"source": "1.png", "instruction": "make it red", "target": "0.png"},
        {"source": ["1.png", "2.png"] if several else "2.png", "instruction": "join them, please", "target": "3.png"},
    ]


def batches(root: Path, template: Template, lines: list[dict[str, Any]]) -> dict[int, tuple[MicroBatch, str]]:
    """Row -> its batch of one, as training gets it."""
    for number, size in SIZES.items():
        draw(root / "source" / f"{number}.png", number, size)
    table = root / "source" / "table.jsonl"
    table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    dataset = Dataset.create(root / "data", 8)
    words = (
        "encode.dtype=float32",
        "encode.compute_dtype=float32",
        f"encode.edit.template={template}",
        f"encode.edit.vision_side={VISION[template]}",
    )
    encoders = PipelineEncoders.load(tiny_pipeline_dir(), load_config_once(words))
    produce_here(table, dataset, make_plan_for(*words), encoders, "source=edits", *words)
    phase = PlannedPhase(
        index=0,
        first_step=0,
        last_step=len(lines),
        weights={64: 1.0},
        global_batch=1,
        micro_batch_tokens=1,
        lr_scale=1.0,
        where=None,
    )
    config = LedgerConfig(phases=(phase,), seed=0, caption_dropout=0.0, where=None, held_out=0.0, max_held_out=0)
    facets = RunFacets(text=text_facet(FINGERPRINT), latents={64: latents_facet(64, FINGERPRINT)}, kind=EDIT)
    run = Generations(root / "run", dataset, facets, config, follow=False)
    run.advance(0)
    stream = Stream(run.ledger, rank=0, world=1, compute_dtype=torch.float32)
    found = {}
    for step in range(len(lines)):
        batch = stream.get(step)
        row = int(run.ledger.catalogs.numbers(batch.batch.rows)[0])
        found[row] = (batch.micro_batches[0].to("cpu"), batch.keys[0])
    stream.close()
    return found


def asked(pipeline: Any, transformer: Any, micro: MicroBatch, noisy: torch.Tensor, **words: Any) -> dict[str, Any]:
    """One step of the stock pipeline from these latents: its call of the transformer, and `answer`."""
    pipeline.register_modules(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0))
    pipeline.set_progress_bar_config(disable=True)
    with call_of(transformer) as call:
        pipeline(
            height=micro.bucket.height,
            width=micro.bucket.width,
            latents=pack_latents(noisy),
            sigmas=[SIGMA],
            num_inference_steps=1,
            true_cfg_scale=1.0,
            output_type="latent",
            **words,
        )
    return call


@contextmanager
def call_of(transformer: Any) -> Iterator[dict[str, Any]]:
    """What the transformer is asked within, and its `answer`."""
    kept: dict[str, Any] = {}

    def keep(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        assert not kept, "asked more than once"
        kept.update(kwargs, answer=output[0])

    handle = transformer.register_forward_hook(keep, with_kwargs=True)
    yield kept
    handle.remove()


@pytest.mark.parametrize("template", ["plus", "single"])
def test_the_forward_of_training_is_the_stock_pipeline_s(
    stock: Any, transformer: Any, tmp_path: Path, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 2e-5 on values of order 1: batches and sums in another order."""
    several = template == "plus"
    lines = edits(several)
    found = batches(tmp_path, template, lines)
    pipeline = stock_pipeline(stock, template)
    # The pipelines' areas are of the 20 B model.
    dimensions = pipeline_qwenimage_edit.calculate_dimensions
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda _, ratio: dimensions(64 * 64, ratio))
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 64 * 64)
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", 96 * 96)
    for row, line in enumerate(lines):
        micro, _ = found[row]
        names = line["source"] if isinstance(line["source"], list) else [line["source"]]
        images = [Image.open(tmp_path / "source" / name).convert("RGB") for name in names]
        noise = torch.randn(micro.latents.shape, generator=torch.Generator().manual_seed(row))
        noisy = interpolate(micro.latents, noise, torch.tensor([SIGMA]))
        with torch.no_grad(), call_of(transformer) as ours:
            velocity = predict_velocity(
                transformer, noisy, torch.tensor([SIGMA]), micro.text, micro.text_mask, micro.conditions
            )
        theirs = asked(
            pipeline, transformer, micro, noisy, image=images if several else images[0], prompt=line["instruction"]
        )
        assert ours["img_shapes"] == theirs["img_shapes"]
        assert len(set(ours["img_shapes"][0])) == 1 + len(images)  # all of another size
        for name in ("hidden_states", "encoder_hidden_states", "timestep", "answer"):
            torch.testing.assert_close(ours[name], theirs[name], atol=2e-5, rtol=0)
        target = theirs["answer"][:, : micro.bucket.image_tokens]
        expected = unpack_latents(target, micro.bucket.height // 8, micro.bucket.width // 8)
        torch.testing.assert_close(velocity, expected, atol=2e-5, rtol=0)


class Answering(torch.nn.Module):
    """In the transformer's place: what it says is a parameter, over target and condition tokens alike."""

    def __init__(self, tokens: int, batch: int) -> None:
        super().__init__()
        self.answer = torch.nn.Parameter(torch.randn(batch, tokens, 64, generator=torch.Generator().manual_seed(1)))

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        assert hidden_states.shape == self.answer.shape
        return (self.answer,)


def test_the_loss_does_not_see_what_is_said_at_condition_tokens(tmp_path: Path) -> None:
    micro, _ = batches(tmp_path, "plus", edits(True))[1]
    assert len(micro.conditions) == 2
    num_target = micro.bucket.image_tokens
    model = Answering(micro.bucket.tokens, 1)
    objective = FlowMatching(FlowMatchingConfig(kind="flow_matching"), seed=0)

    def loss() -> torch.Tensor:
        return objective.loss(lambda *args: predict_velocity(model, *args), micro, step=0).loss

    first = loss()
    first.backward()
    gradient = model.answer.grad
    assert gradient is not None
    assert (gradient[:, num_target:] == 0).all()
    assert (gradient[:, :num_target] != 0).all()
    with torch.no_grad():
        model.answer[:, num_target:] += 100.0
    assert torch.equal(loss(), first)
    with torch.no_grad():
        model.answer[:, 0] += 0.1
    assert not torch.equal(loss(), first)


def test_conditions_and_their_order_matter_to_the_velocity(transformer: Any, tmp_path: Path) -> None:
    """Else the tests above would pass with conditions that nobody looks at."""
    micro, _ = batches(tmp_path, "plus", edits(True))[1]
    one, other = micro.conditions
    sigma, noise = torch.tensor([SIGMA]), torch.zeros_like(micro.latents)

    def error(*conditions: torch.Tensor) -> float:
        with torch.no_grad():
            return float(
                squared_errors(lambda *args: predict_velocity(transformer, *args[:4], conditions), micro, sigma, noise)
            )

    errors = [error(one, other), error(other, one), error(one), error(one, torch.zeros_like(other)), error()]
    assert len({round(value, 7) for value in errors}) == len(errors)
