"""Sampling against the stock pipeline, and independence of batching."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from PIL import Image

from qwenimg_dist.models import generate as models_generate
from qwenimg_dist.models.generate import (
    generate,
    generate_latents,
    load_scheduler_config,
    save_grid,
    seeded_noise,
    to_pictures,
)
from qwenimg_dist.models.text_encoder import TextEncoder
from qwenimg_dist.models.tiny import tiny_pipeline_dir
from qwenimg_dist.models.transformer import pack_latents
from qwenimg_dist.models.vae import LatentCodec

PROMPTS = ["a red circle on a blue background", "", "a green square on a white background, and more words"]
HEIGHT, WIDTH = 48, 80


@pytest.fixture(scope="module")
def tiny() -> Path:
    return tiny_pipeline_dir()


@pytest.fixture(scope="module")
def pipeline(tiny: Path) -> Any:
    pipeline = QwenImagePipeline.from_pretrained(tiny)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def codec(tiny: Path) -> LatentCodec:
    return LatentCodec.load(tiny)


@pytest.fixture(scope="module")
def features(tiny: Path) -> list[torch.Tensor]:
    return TextEncoder.load(tiny, dtype=torch.float32).encode([*PROMPTS, " "])


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_latents_equal_the_stock_pipelines(
    pipeline: Any, features: list[torch.Tensor], tiny: Path, guidance: float
) -> None:
    """Same noise, 6 steps, with and without true guidance. Tolerance 5e-5 on values up to ~5, fp32."""
    noise = seeded_noise([1, 2, 3], HEIGHT, WIDTH)
    ours = generate_latents(
        pipeline.transformer,
        features[:3],
        features[3],
        noise,
        num_steps=6,
        guidance=guidance,
        scheduler_config=load_scheduler_config(tiny),
    )
    stock = pipeline(
        prompt=PROMPTS,
        negative_prompt=[" "] * 3,
        true_cfg_scale=guidance,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=6,
        latents=pack_latents(noise),
        max_sequence_length=512,
        output_type="latent",
    ).images
    torch.testing.assert_close(pack_latents(ours), stock, atol=5e-5, rtol=0)


def test_pictures_equal_the_stock_pipelines(
    pipeline: Any, codec: LatentCodec, features: list[torch.Tensor], tiny: Path
) -> None:
    """Within one level of 255 per pixel: the whole chain down to rounding."""
    ours = generate(
        pipeline.transformer,
        codec,
        features[:1],
        features[3],
        height=HEIGHT,
        width=WIDTH,
        num_steps=3,
        guidance=4.0,
        seeds=[9],
        scheduler_config=load_scheduler_config(tiny),
    )[0]
    stock = pipeline(
        prompt=PROMPTS[:1],
        negative_prompt=[" "],
        true_cfg_scale=4.0,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=3,
        latents=pack_latents(seeded_noise([9], HEIGHT, WIDTH)),
    ).images[0]
    assert ours.size == stock.size == (WIDTH, HEIGHT)
    assert np.abs(np.asarray(ours, dtype=int) - np.asarray(stock, dtype=int)).max() <= 1


def test_a_picture_does_not_depend_on_its_batch(
    pipeline: Any, codec: LatentCodec, features: list[torch.Tensor], tiny: Path
) -> None:
    def pictures(order: list[int], batch_size: int) -> dict[int, Any]:
        images = generate(
            pipeline.transformer,
            codec,
            [features[i] for i in order],
            features[3],
            height=32,
            width=32,
            num_steps=2,
            guidance=4.0,
            seeds=[100 + i for i in order],
            scheduler_config=load_scheduler_config(tiny),
            batch_size=batch_size,
        )
        return {i: np.asarray(image, dtype=int) for i, image in zip(order, images, strict=True)}

    together, alone = pictures([0, 1, 2], 8), pictures([2, 0, 1], 1)
    for i in range(3):
        assert np.abs(together[i] - alone[i]).max() <= 1
    assert np.abs(together[0] - together[1]).max() > 20, "different pictures, or this test sees nothing"


def test_any_callable_with_the_forward_serves(features: list[torch.Tensor], tiny: Path) -> None:
    """The exact velocity of a single data point (`(x - x0) / sigma`) leads straight to it. Tolerance 1e-5."""
    target = torch.randn(1, 16, 4, 4)

    def oracle(**kwargs: Any) -> tuple[torch.Tensor]:
        return ((kwargs["hidden_states"] - pack_latents(target)) / kwargs["timestep"][:, None, None],)

    latents = generate_latents(
        oracle,
        features[:1],
        None,
        torch.randn(1, 16, 4, 4),
        num_steps=5,
        guidance=1.0,
        scheduler_config=load_scheduler_config(tiny),
    )
    torch.testing.assert_close(latents, target, atol=1e-5, rtol=0)


def test_unusable_requests_are_named(codec: LatentCodec, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        seeded_noise([1], 40, 32)
    with pytest.raises(ValueError, match="one seed each"):
        generate(print, codec, [torch.zeros(1, 4)], None, height=32, width=32, num_steps=1, guidance=1.0,
                 seeds=[], scheduler_config={})  # fmt: skip
    with pytest.raises(ValueError, match=r"scheduler_config\.json: missing"):
        load_scheduler_config(tmp_path)


def test_to_pictures_rounds_and_clamps() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert np.asarray(to_pictures(values)[0])[0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_grid_holds_every_picture_in_place(tmp_path: Path) -> None:
    colours = [(10 * i, 200, 0) for i in range(5)]
    images = [Image.new("RGB", (40, 24), colour) for colour in colours]
    path = save_grid(images, [f"label {i} with many long words" for i in range(5)], tmp_path / "a" / "g.png", columns=3)
    grid = Image.open(path)
    row_height = (grid.height - 4) // 2
    width, height = 40 * 3, 24 * 3  # pictures of 40x24 are enlarged by whole pixels
    for i, colour in enumerate(colours):
        assert grid.getpixel((4 + i % 3 * (width + 4) + 20, 4 + i // 3 * row_height + 12)) == colour
    assert row_height > height + 2 * 12, "wrapped labels need lines of their own"
    below = grid.crop((4, 4 + height, 4 + width, row_height))
    assert min(below.convert("L").getdata()) < 100, "labels are drawn"
    with pytest.raises(ValueError, match="nothing to lay out"):
        save_grid([], [], tmp_path / "none.png")


def test_a_grid_of_many_large_pictures_stays_one_that_can_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models_generate, "_MAX_CELLS_PIXELS", 100_000)  # 6 cells of 200x300 are 360,000
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 120_000)
    images = [Image.new("RGB", (200, 300 if i else 150), (40 * i, 0, 0)) for i in range(5)]
    grid = Image.open(save_grid(images, ["a"] * 5, tmp_path / "g.png", columns=3))
    cell = (grid.width - 4) // 3 - 4
    assert 90_000 < 6 * cell * cell * 1.5 <= 100_000
    assert [
        grid.getpixel((4 + i % 3 * (cell + 4) + 20, 4 + i // 3 * (grid.height - 4) // 2 + 12)) for i in range(5)
    ] == [(40 * i, 0, 0) for i in range(5)]
    below_the_flat_one = grid.getpixel((24, 4 + cell))
    assert below_the_flat_one == (255, 255, 255)  # proportions are kept
