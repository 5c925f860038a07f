"""`sample` with condition pictures: what the stock edit pipeline draws from the same words, pictures and noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import QwenImageEditPlusPipeline, QwenImagePipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image
from stock_edit import StillProcessor, hand_types_on, picture
from transformers import Qwen2VLImageProcessorPil

from qwenimg_dist.commands.main import main
from qwenimg_dist.models.generate import seeded_noise
from qwenimg_dist.models.pipeline import pipeline_class
from qwenimg_dist.models.tiny import tiny_pipeline_dir
from qwenimg_dist.models.transformer import pack_latents


@pytest.fixture(scope="module")
def folder() -> Path:
    return tiny_pipeline_dir(edit=True)


@pytest.fixture
def stock(folder: Path) -> Any:
    """As a user loads it; only the processor's part for videos needs torchvision, which is not here."""
    processor = StillProcessor(
        image_processor=Qwen2VLImageProcessorPil.from_pretrained(folder / "processor"),
        tokenizer=QwenImagePipeline.from_pretrained(folder, transformer=None, vae=None, text_encoder=None).tokenizer,
    )
    return QwenImageEditPlusPipeline.from_pretrained(folder, processor=processor)


def test_the_twin_is_an_edit_pipeline(folder: Path, stock: Any) -> None:
    assert pipeline_class(folder) == "QwenImageEditPlusPipeline"
    assert stock.transformer.config.zero_cond_t
    plain = tiny_pipeline_dir()
    assert pipeline_class(plain) == "QwenImagePipeline"
    for component in ("vae", "text_encoder", "transformer"):
        weights = [next((one / component).glob("*.safetensors")).read_bytes() for one in (folder, plain)]
        assert weights[0] == weights[1]


def test_the_picture_is_the_stock_pipeline_s(
    folder: Path, stock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("wide", "tall")
    for name in names:
        picture(name).save(tmp_path / f"{name}.png")
    images = ",".join(str(tmp_path / f"{name}.png") for name in names)
    code = main(
        [
            "sample",
            "model.edit=true",
            f"sample.path={folder}",
            "sample.prompts=['make it red']",
            f"sample.images=[{images}]",
            f"sample.out={tmp_path / 'grid.png'}",
            f"sample.cells={tmp_path / 'cells'}",
            "sample.seeds=[7]",
            "sample.num_steps=4",
            "sample.guidance=3",
            "sample.height=64",
            "sample.width=96",
            "encode.edit.vision_side=96",
            "encode.edit.condition_side=64",
        ]
    )
    assert code == 0
    ours = np.asarray(Image.open(tmp_path / "cells" / "0000.png"), dtype=np.int64)
    assert ours.shape == (64, 96, 3)
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 64 * 64)
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", 96 * 96)
    hand_types_on(stock, stock.text_encoder)
    stock.set_progress_bar_config(disable=True)
    made = stock(
        image=[picture(name) for name in names],
        prompt="make it red",
        negative_prompt="",
        true_cfg_scale=3.0,
        num_inference_steps=4,
        height=64,
        width=96,
        latents=pack_latents(seeded_noise([7], 64, 96)),
    ).images[0]
    theirs = np.asarray(made, dtype=np.int64)
    assert np.abs(ours - theirs).max() <= 2  # of 255: sums in another order, four steps and a decoder later
    assert (ours != 128).any()


def test_pictures_that_cannot_be_opened_are_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "words.png").write_text("no picture")
    for name, expected in (("words.png", "cannot be opened"), ("gone.png", "cannot be opened")):
        words = [f"sample.path={folder}", "sample.prompts=[x]", f"sample.images=[{tmp_path / name}]"]
        assert main(["sample", *words, f"sample.out={tmp_path / 'grid.png'}"]) == 2
        told = capsys.readouterr().err
        assert f"sample.images: {tmp_path / name}" in told
        assert expected in told


def test_without_words_it_is_a_reconstruction(folder: Path, tmp_path: Path) -> None:
    picture("square").save(tmp_path / "a.png")
    (tmp_path / "export").symlink_to(folder)
    words = [f"sample.path={tmp_path / 'export'}", "sample.prompts=['']", f"sample.images=[{tmp_path / 'a.png'}]"]
    sizes = ["encode.resolutions=[64]", "sample.num_steps=1", f"sample.cells={tmp_path}"]
    assert main(["sample", *words, *sizes]) == 0
    assert (tmp_path / "export-grid.png").is_file()
    assert Image.open(tmp_path / "0000.png").size == (64, 64)
