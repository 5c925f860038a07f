"""The judge is right on true renders, blurred ones and after the tiny VAE, and sees nothing in noise."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from PIL import Image, ImageFilter

from qwenimg_dist.demo.photos import generic_picture
from qwenimg_dist.demo.shapes import Scene, all_scenes, render
from qwenimg_dist.models.tiny import ASSETS
from qwenimg_dist.rewards import shapes as judging
from qwenimg_dist.rewards.base import Prompt
from qwenimg_dist.rewards.shapes import Verdict, asked_for, grade, judge, score

NOTHING = Verdict(colour=None, shape=None, background=None)


def pictures(side_px: int, *, rounds: int, seed: int) -> list[tuple[Scene, Image.Image]]:
    rng = np.random.default_rng(seed)
    return [
        (scene, render(scene, 160, rng).resize((side_px, side_px), Image.Resampling.BICUBIC))
        for _ in range(rounds)
        for scene in all_scenes()
    ]


def share_right(judged: list[tuple[Scene, Image.Image]]) -> float:
    right = 0
    for scene, image in judged:
        verdict = judge(image)
        right += (verdict.colour, verdict.shape, verdict.background) == (
            scene.colour, scene.shape, scene.background,
        )  # fmt: skip
    return right / len(judged)


@pytest.mark.parametrize("side_px", [64, 128])
def test_true_renders_are_read_right(side_px: int) -> None:
    assert share_right(pictures(side_px, rounds=3, seed=11)) >= 0.98


def test_blurred_renders_are_read_right() -> None:
    blurred = [(scene, image.filter(ImageFilter.GaussianBlur(1.2))) for scene, image in pictures(64, rounds=2, seed=12)]
    assert share_right(blurred) >= 0.98


@pytest.mark.parametrize("side_px", [64, 128])
def test_what_the_tiny_vae_returns_is_read_right(side_px: int) -> None:
    vae = AutoencoderKLQwenImage.from_pretrained(ASSETS / "tiny_vae")
    judged = pictures(side_px, rounds=1, seed=13)[:: side_px // 64]  # half of them at 128 px: it is slow
    stack = np.stack([np.asarray(image) for _, image in judged])
    pixels = torch.from_numpy(stack).permute(0, 3, 1, 2).unsqueeze(2).float() / 127.5 - 1.0
    with torch.no_grad():
        decoded = [vae.decode(vae.encode(part).latent_dist.mode()).sample for part in pixels.split(24)]
    array = ((torch.cat(decoded)[:, :, 0].permute(0, 2, 3, 1) + 1.0) * 127.5).round().byte().numpy()
    assert share_right([(scene, Image.fromarray(a)) for (scene, _), a in zip(judged, array)]) >= 0.98


def test_noise_and_plain_pictures_show_nothing() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        noise = rng.integers(0, 256, size=(64, 64, 3)).astype(np.uint8)
        assert judge(Image.fromarray(noise)) == NOTHING
    plain = judge(Image.new("RGB", (64, 64), (246, 246, 246)))
    assert plain == Verdict(colour=None, shape=None, background="white")


def test_pictures_of_other_things_are_rarely_taken_for_a_shape() -> None:
    rng = np.random.default_rng(1)
    verdicts = [judge(generic_picture(rng, 64)) for _ in range(60)]
    assert sum(v.shape is not None for v in verdicts) <= 3


def test_a_bar_is_no_known_shape() -> None:
    image = Image.new("RGB", (64, 64), (246, 246, 246))
    image.paste((40, 80, 215), (8, 26, 56, 38))
    assert judge(image) == Verdict(colour="blue", shape=None, background="white")


def test_the_score_counts_colour_and_shape_apart() -> None:
    image = render(Scene("red", "circle", "white"), 64, np.random.default_rng(0))
    assert score(image, Scene("red", "circle", "white")) == (True, True)
    assert score(image, Scene("red", "square", "white")) == (True, False)
    assert score(image, Scene("blue", "circle", "black")) == (False, True)
    assert score(Image.new("RGB", (64, 64)), Scene("red", "circle", "black")) == (False, False)


@pytest.mark.parametrize("size", [(192, 144), (144, 192), (300, 320)])
def test_other_sizes_and_aspects_are_judged_too(size: tuple[int, int]) -> None:
    scene = Scene("purple", "triangle", "black")
    assert score(render(scene, size, np.random.default_rng(2)), scene) == (True, True)


@pytest.mark.parametrize("shape", ["circle", "square", "triangle", "cross"])
def test_a_true_outline_overlaps_almost_wholly(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is aligned: a true shape would pass a limit far above the one for generated pictures."""
    monkeypatch.setattr(judging, "_MIN_OVERLAP", 0.92)
    image = render(Scene("blue", shape, "white"), 128, np.random.default_rng(3))
    assert judge(image).shape == shape


def test_the_grade_has_slopes_where_verdicts_have_steps() -> None:
    red_circle = render(Scene("red", "circle", "white"), 64, np.random.default_rng(0))
    assert grade(red_circle, "red", "circle") == 1.0
    assert grade(red_circle, "blue", "circle") == 0.5
    assert grade(red_circle, "red", "cross") == 0.5
    assert grade(red_circle, "blue", "cross") == 0.0
    assert grade(Image.new("RGB", (64, 64), (246, 246, 246)), "red", "circle") == 0.0
    # From a square to a circle in steps, and from red to orange: every step is seen, in the right direction.
    square = render(Scene("red", "square", "white"), 64, np.random.default_rng(0))
    steps = [grade(Image.blend(square, red_circle, share), "red", "circle") for share in (0.2, 0.4, 0.5, 0.6, 0.8)]
    assert steps == sorted(steps)
    assert len({round(step, 3) for step in steps}) >= 3
    orange = render(Scene("orange", "circle", "white"), 64, np.random.default_rng(0))
    steps = [grade(Image.blend(orange, red_circle, share), "red", "circle") for share in (0.0, 0.4, 0.6, 1.0)]
    assert steps == sorted(steps)
    assert steps[0] == 0.5 < steps[2] < steps[3]


@pytest.mark.parametrize("side_px", [64, 128])
def test_true_renders_are_graded_right_and_others_not(side_px: int) -> None:
    right, wrong = [], []
    for scene, image in pictures(side_px, rounds=1, seed=14)[::2]:
        right.append(grade(image, scene.colour, scene.shape))
        other = next(name for name in ("circle", "cross") if name != scene.shape)
        wrong.append(grade(image, scene.colour, other))
    assert np.mean(right) >= 0.97
    assert min(right) >= 0.7
    assert max(wrong) <= 0.75
    assert np.mean(wrong) <= 0.6


def test_what_is_asked_for_comes_from_metadata_or_words() -> None:
    prompt = Prompt(text="a red circle on a white background")
    assert asked_for(prompt) == ("red", "circle")
    assert asked_for(Prompt(text=prompt.text, metadata={"colour": "blue", "shape": "cross"})) == ("blue", "cross")
    assert asked_for(Prompt(text=prompt.text, metadata={"colour": "blue"})) == ("red", "circle")
    with pytest.raises(ValueError, match="metadata names 'pink'"):
        asked_for(Prompt(text=prompt.text, metadata={"colour": "pink", "shape": "cross"}))
