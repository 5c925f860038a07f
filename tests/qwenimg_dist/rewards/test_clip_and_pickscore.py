"""The rewards `clip` and `pickscore` give what the models of transformers give, on tiny models of the same class."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_scorers
import torch
from photographs import PHOTOGRAPHS, photograph
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from qwenimg_dist.config import RewardConfig
from qwenimg_dist.rewards import check_rewards, load_rewards
from qwenimg_dist.rewards.base import Prompt
from qwenimg_dist.rewards.kind import Resources

HERE = Resources(device="cpu", num_threads=1)
IMAGES = [Image.fromarray(photograph(name)).convert("RGB") for name in list(PHOTOGRAPHS)[:3]]
CAPTIONS = ["a cat", "a cat", "an astronaut smiles"]
PROMPTS = [Prompt(text=text) for text in CAPTIONS]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_scorers.save_clip(tmp_path_factory.mktemp("clip"), seed=3)


def rewards(name: str, path: Path) -> RewardConfig:
    return RewardConfig(weights={name: 1.0}, settings={name: {"path": str(path)}})


def test_both_are_the_models_own_numbers(clip: Path) -> None:
    model = CLIPModel.from_pretrained(clip).eval()
    pixels = AutoImageProcessor.from_pretrained(clip, backend="pil")(images=IMAGES, return_tensors="pt")
    text = AutoTokenizer.from_pretrained(clip)(
        CAPTIONS, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**pixels, **text).logits_per_image.diagonal()
    scale = model.logit_scale.exp()
    assert logits.std() > 0.01
    for name, expected in {"clip": logits / scale, "pickscore": logits}.items():
        (reward,) = load_rewards(rewards(name, clip), HERE)
        assert reward.name == name
        assert reward(IMAGES, PROMPTS) == pytest.approx(expected.tolist(), rel=1e-4)


def test_a_picture_scores_the_same_in_any_company(clip: Path) -> None:
    (reward,) = load_rewards(rewards("pickscore", clip), HERE)
    together = reward(IMAGES, PROMPTS)
    assert together == reward(IMAGES, PROMPTS)
    alone = [reward([image], [prompt])[0] for image, prompt in zip(IMAGES, PROMPTS, strict=True)]
    assert alone == pytest.approx(together, rel=1e-5)


def test_siglip_judges_chinese(tmp_path: Path) -> None:
    (reward,) = load_rewards(rewards("clip", tiny_scorers.save_siglip2(tmp_path / "siglip")), HERE)
    first, second = reward([IMAGES[0]] * 2, [Prompt(text="今日"), Prompt(text="猫")])
    assert -1 <= first <= 1
    assert abs(first - second) > 1e-4


def test_what_is_not_there_or_not_pinned_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reward\.settings\.clip: .*no such directory"):
        check_rewards(rewards("clip", tmp_path / "nowhere"))
    unpinned = RewardConfig(weights={"clip": 1.0}, settings={"clip": {"path": "a/b", "revision": None}})
    with pytest.raises(ValueError, match="pin it with revision="):
        check_rewards(unpinned)
