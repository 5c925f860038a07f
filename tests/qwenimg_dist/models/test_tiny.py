"""The tiny twin: real classes, a faithful template prefix, the same bytes from the same seed, safe caching."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from transformers import AutoTokenizer, Qwen2Tokenizer

from qwenimg_dist.demo.shapes import all_captions
from qwenimg_dist.models import tiny
from qwenimg_dist.models.template import TEMPLATE
from qwenimg_dist.models.tiny import ASSETS, SCHEDULER_CONFIG, tiny_pipeline_dir, write_tiny_pipeline
from qwenimg_dist.models.train_tiny_tokenizer import EDIT_TEMPLATE, train_tokenizer


def tree_bytes(path: Path) -> dict[str, str]:
    return {
        str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(path.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture(scope="module")
def pipeline(directory: Path) -> QwenImagePipeline:
    pipe = QwenImagePipeline.from_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("loader", [AutoTokenizer, Qwen2Tokenizer])
def test_the_template_prefixes_have_the_real_lengths(directory: Path, loader: type) -> None:
    tokenizer = loader.from_pretrained(directory / "tokenizer")
    assert isinstance(tokenizer, Qwen2Tokenizer)
    prefix = TEMPLATE.split("{}")[0]
    assert len(tokenizer(prefix).input_ids) == 34
    # The edit pipelines drop the system turn and the opening of the user's: 64 tokens.
    assert len(tokenizer(EDIT_TEMPLATE.split("Picture 1")[0]).input_ids) == 64
    with_prompt = tokenizer(TEMPLATE.format("a red circle")).input_ids
    assert tokenizer.decode(with_prompt[34:37]) == "a red circle"
    assert tokenizer.padding_side == "right"


def test_the_templates_are_those_of_diffusers(pipeline: QwenImagePipeline) -> None:
    assert pipeline.prompt_template_encode == TEMPLATE
    assert pipeline.prompt_template_encode_start_idx == 34


def test_every_word_of_the_captions_is_one_token(pipeline: QwenImagePipeline) -> None:
    for text in all_captions():
        num_words = len(text.replace(",", " ,").split())
        assert len(pipeline.tokenizer(text).input_ids) == num_words, text


@pytest.mark.parametrize("text", ["Ünïcödé 漢字 🙂", "", "12 <|im_end|> x", "line\n\nbreak"])
def test_any_text_survives_the_tokenizer(pipeline: QwenImagePipeline, text: str) -> None:
    ids = pipeline.tokenizer(text).input_ids
    assert pipeline.tokenizer.decode(ids) == text
    assert max(ids, default=0) < pipeline.text_encoder.config.text_config.vocab_size


def test_the_shipped_tokenizer_is_what_its_script_trains() -> None:
    trained, shipped = train_tokenizer(), Qwen2Tokenizer.from_pretrained(ASSETS / "tiny_tokenizer")
    assert trained.get_vocab() == shipped.get_vocab()
    texts = [*all_captions(), TEMPLATE, EDIT_TEMPLATE, "something else entirely"]
    assert trained(texts).input_ids == shipped(texts).input_ids


def test_stock_diffusers_loads_the_directory_and_draws(pipeline: QwenImagePipeline) -> None:
    image = pipeline(
        "a red circle on a white background",
        negative_prompt=" ",
        true_cfg_scale=4.0,
        height=64,
        width=64,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert image.size == (64, 64)
    assert np.asarray(image).std() > 1.0


def test_the_scheduler_is_qwen_images(pipeline: QwenImagePipeline) -> None:
    for key, value in SCHEDULER_CONFIG.items():
        assert pipeline.scheduler.config[key] == value
    pipeline.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 8, 8), mu=0.5)
    assert pipeline.scheduler.sigmas[-2].item() == pytest.approx(0.02)


def test_the_twin_has_the_interfaces_of_the_original(pipeline: QwenImagePipeline) -> None:
    transformer = pipeline.transformer.config
    assert (transformer.in_channels, transformer.out_channels, transformer.patch_size) == (64, 16, 2)
    assert sum(transformer.axes_dims_rope) == transformer.attention_head_dim
    assert transformer.joint_attention_dim == pipeline.text_encoder.config.text_config.hidden_size
    assert 2.0e6 < sum(p.numel() for p in pipeline.transformer.parameters()) < 3.0e6
    assert pipeline.vae_scale_factor == 8
    assert any("visual" in name for name, _ in pipeline.text_encoder.named_parameters())
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        assert all(torch.isfinite(p).all() for p in part.parameters())


def test_the_vision_tower_sees(pipeline: QwenImagePipeline) -> None:
    """One 56 x 56 px picture is 4 x 4 patches, merged to 4 tokens: later edit training needs the real path."""
    encoder, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    ids = tokenizer("<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>a red circle").input_ids
    pixel_values = torch.randn(16, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def features(pixels: torch.Tensor) -> torch.Tensor:
        output = encoder(
            input_ids=torch.tensor([ids]),
            mm_token_type_ids=torch.tensor([[int(i == image_id) for i in ids]]),
            pixel_values=pixels,
            image_grid_thw=torch.tensor([[1, 4, 4]]),
            output_hidden_states=True,
        )
        last: torch.Tensor = output.hidden_states[-1]
        return last

    with torch.no_grad():
        seen, other = features(pixel_values), features(-pixel_values)
    assert seen.shape == (1, len(ids), 128)
    assert not torch.allclose(seen[:, -1], other[:, -1]), "the text after the picture depends on it"


def test_captions_that_differ_in_one_word_have_different_features(pipeline: QwenImagePipeline) -> None:
    with torch.no_grad():
        red, _ = pipeline.encode_prompt("a red circle on a white background")
        blue, _ = pipeline.encode_prompt("a blue circle on a white background")
    assert (red - blue).abs().mean(dim=-1).max() > 0.1


def test_the_same_seed_gives_the_same_bytes(directory: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    again = write_tiny_pipeline(tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), before), "the caller's random state is its own"
    assert tree_bytes(again) == tree_bytes(directory)
    other = write_tiny_pipeline(tmp_path / "other", seed=1)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert tree_bytes(other)[weights] != tree_bytes(directory)[weights]


def test_a_directory_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="not empty"):
        write_tiny_pipeline(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_writer_that_dies_leaves_nothing_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(QwenImageTransformer2DModel, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_tiny_pipeline(tmp_path / "pipeline")
    assert list(tmp_path.iterdir()) == []


def test_the_cache_is_made_once_and_found_by_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tiny.CACHE_VARIABLE, str(tmp_path))
    first = tiny_pipeline_dir()
    assert first.parent == tmp_path
    made = os.stat(first / "model_index.json").st_mtime_ns
    assert tiny_pipeline_dir() == tiny_pipeline_dir(tmp_path) == first
    assert os.stat(first / "model_index.json").st_mtime_ns == made
    monkeypatch.setattr(tiny, "_fingerprint", lambda: "0123456789abcdef")
    assert tiny_pipeline_dir() != first, "other assets or code, another directory"


def test_processes_that_race_for_the_cache_get_one_directory(tmp_path: Path) -> None:
    # Processes of their own, not forks: this one has threads of other tests, and a fork inherits locks that they hold.
    ask = "import sys; from pathlib import Path; from qwenimg_dist.models.tiny import tiny_pipeline_dir as ask;"
    command = [sys.executable, "-c", f"{ask} print(ask(Path(sys.argv[1])))", str(tmp_path)]
    racing = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = {one.communicate(timeout=200)[0].splitlines()[-1] for one in racing}
    assert len(answers) == 1
    assert [str(p) for p in tmp_path.iterdir()] == list(answers)
    QwenImagePipeline.from_pretrained(answers.pop())
