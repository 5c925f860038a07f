"""A facet's name follows what makes its tensors, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qwenimg_dist.compose import load_config
from qwenimg_dist.models.identity import latents_facet_names, text_facet_name
from qwenimg_dist.models.tiny import tiny_pipeline_dir
from qwenimg_dist.schema import EDIT


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pipeline_dir(), tmp_path / "pipeline"))


def test_a_copy_has_the_same_names_and_another_tokenizer_another_text_facet(copy: Path) -> None:
    config, tiny = load_config([]), tiny_pipeline_dir()
    assert text_facet_name(copy, config) == text_facet_name(tiny, config)
    assert latents_facet_names(copy, config) == latents_facet_names(tiny, config)
    file = copy / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "add_prefix_space": True}))
    assert text_facet_name(copy, config) != text_facet_name(tiny, config)
    assert latents_facet_names(copy, config) == latents_facet_names(tiny, config)


def test_a_changed_vae_changes_every_latents_facet_and_no_text_facet(copy: Path) -> None:
    config, tiny = load_config([]), tiny_pipeline_dir()
    file = copy / "vae" / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "latents_mean": [value + 1 for value in content["latents_mean"]]}))
    before, after = latents_facet_names(tiny, config), latents_facet_names(copy, config)
    assert before.keys() == after.keys() == {64, 128}
    assert not set(before.values()) & set(after.values())
    assert text_facet_name(copy, config) == text_facet_name(tiny, config)


@pytest.mark.parametrize(
    ("override", "text_moves", "latents_move"),
    [
        ("model.max_text_tokens=256", True, False),
        ("encode.dtype=float32", True, True),
        ("encode.upscale=true", False, True),
        ("encode.posterior=mean_logvar", False, True),
        ("encode.image_batch_pixels=4096", False, False),
        ("encode.compute_dtype=bfloat16", True, True),
    ],
)
def test_what_moves_the_names(override: str, text_moves: bool, latents_move: bool) -> None:
    tiny, base, changed = tiny_pipeline_dir(), load_config([]), load_config([override])
    assert (text_facet_name(tiny, base) != text_facet_name(tiny, changed)) == text_moves
    assert (latents_facet_names(tiny, base) != latents_facet_names(tiny, changed)) == latents_move


@pytest.mark.parametrize(
    ("override", "text_moves", "latents_move"),
    [
        ("encode.edit.template=single", True, False),
        ("encode.edit.vision_side=128", True, False),
        ("encode.edit.condition_side=128", False, True),
    ],
)
def test_how_conditions_go_in_moves_the_names_of_edits_alone(
    override: str, text_moves: bool, latents_move: bool
) -> None:
    tiny, base, changed = tiny_pipeline_dir(), load_config([]), load_config([override])
    assert text_facet_name(tiny, base) == text_facet_name(tiny, changed) != text_facet_name(tiny, base, EDIT)
    assert latents_facet_names(tiny, base) == latents_facet_names(tiny, changed)
    assert (text_facet_name(tiny, base, EDIT) != text_facet_name(tiny, changed, EDIT)) == text_moves
    assert (latents_facet_names(tiny, base, EDIT) != latents_facet_names(tiny, changed, EDIT)) == latents_move


def test_a_processor_moves_the_text_of_edits_alone(copy: Path) -> None:
    config, tiny = load_config([]), tiny_pipeline_dir()
    (copy / "processor").mkdir()
    (copy / "processor" / "preprocessor_config.json").write_text("{}")
    assert text_facet_name(copy, config) == text_facet_name(tiny, config)
    assert text_facet_name(copy, config, EDIT) != text_facet_name(tiny, config, EDIT)
