"""The demo's world: captions parse back, shapes are where they should be, the folder is what it says."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, UnidentifiedImageError

from qwenimg_dist.demo import shapes
from qwenimg_dist.demo.shapes import Scene, all_captions, all_scenes, caption, parse, render, split, write_folder
from qwenimg_dist.rewards.shapes import judge


def folder_bytes(path: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(path.iterdir())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    path = tmp_path_factory.mktemp("demo") / "pictures"
    return path, write_folder(path, num_images=240, seed=3)


def test_every_wording_of_every_scene_parses_back() -> None:
    wordings = all_captions()
    assert len(set(wordings)) == len(wordings) == 3 * len(all_scenes())
    assert {parse(text) for text in wordings} == set(all_scenes())
    rng = np.random.default_rng(0)
    scene = Scene("orange", "cross", "black")
    drawn = {caption(scene, rng) for _ in range(50)}
    assert {parse(text) for text in drawn} == {scene}
    assert len({len(text.split()) for text in drawn}) == 3, "unequal lengths exercise the text mask"
    assert caption(scene) == "an orange cross on a black background"


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ("a circle on a white background", "0 colours"),
        ("a red blue circle on a white background", "2 colours"),
        ("a red circle", "0 backgrounds"),
        ("", "0 colours"),
    ],
)
def test_a_prompt_that_names_no_one_scene_is_refused(prompt: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse(prompt)


def test_an_unknown_word_in_a_scene_names_the_choices() -> None:
    with pytest.raises(ValueError, match="colour 'pink' is unknown: choose one of red"):
        Scene("pink", "circle", "white")


def test_the_split_holds_out_combinations_but_no_word() -> None:
    seen, held_out = split()
    assert sorted(seen + held_out) == sorted(all_scenes())
    assert not set(seen) & set(held_out)
    for words in (seen, held_out):
        assert {scene.shape for scene in words} == set(shapes.SHAPES)
        assert {scene.background for scene in words} == set(shapes.BACKGROUNDS)
    assert {scene.colour for scene in seen} == set(shapes.COLOURS)
    pairs = {(scene.colour, scene.shape) for scene in seen}
    assert not pairs & {(scene.colour, scene.shape) for scene in held_out}


@pytest.mark.parametrize("size", [(64, 64), (160, 160), (192, 144), (144, 192)])
@pytest.mark.parametrize("shape", list(shapes.SHAPES))
def test_a_shape_is_centred_undistorted_and_of_the_stated_size(shape: str, size: tuple[int, int]) -> None:
    image = render(Scene("blue", shape, "white"), size, np.random.default_rng(5))
    assert image.size == size
    pixels = np.asarray(image, dtype=np.float64)
    inside = np.linalg.norm(pixels - pixels[0, 0], axis=2) > 100
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    width, height = float(np.ptp(columns)) + 1, float(np.ptp(rows)) + 1
    side = min(size)
    if shape == "triangle":
        assert width / height == pytest.approx(2 / np.sqrt(3), abs=0.08)
    else:
        assert width == pytest.approx(height, abs=2)
    assert 0.4 * side < width < 0.72 * side
    assert abs(columns.mean() - size[0] / 2) < 0.05 * side


def test_rendering_repeats_from_the_seed() -> None:
    scene = Scene("red", "cross", "grey")
    first, again, other = (render(scene, 64, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.tobytes() == again.tobytes() != other.tobytes()


def test_the_folder_has_what_it_counts(folder: tuple[Path, dict[str, int]]) -> None:
    path, counts = folder
    assert counts == {
        "duplicate": 5, "empty": 1, "exif_rotated": 1, "not_an_image": 5,
        "picture": 239, "too_small": 5, "truncated": 5,
    }  # fmt: skip
    rows = [json.loads(line) for line in (path / "metadata.jsonl").read_text().splitlines()]
    files = folder_bytes(path)
    del files["metadata.jsonl"]
    assert sorted(row["file_name"] for row in rows) == sorted(files)
    assert len(rows) == sum(counts.values())
    assert sum(n - 1 for n in Counter(files.values()).values()) == counts["duplicate"], "no others by accident"

    held_out = set(split()[1])
    found: Counter[str] = Counter()
    aspects: Counter[bool] = Counter()
    for row in rows:
        scene = parse(row["text"])
        assert scene not in held_out
        try:
            with Image.open(path / row["file_name"]) as image:
                image.load()
                upright = ImageOps.exif_transpose(image)
        except UnidentifiedImageError:
            found["unidentified"] += 1
            continue
        except OSError:
            found["truncated"] += 1
            continue
        if min(upright.size) < 128:
            found["too_small"] += 1
            continue
        found["picture"] += 1
        aspects[upright.width == upright.height] += 1
        verdict = judge(upright)
        assert (verdict.colour, verdict.shape, verdict.background) == (
            scene.colour, scene.shape, scene.background,
        ), row  # fmt: skip
    assert found == {"unidentified": 6, "truncated": 5, "too_small": 5, "picture": 245}
    assert 10 <= aspects[False] <= 55
    assert {Path(name).suffix for name in files} == {".png", ".jpg", ".webp"}


def test_the_sideways_picture_is_stored_turned(tmp_path: Path) -> None:
    suffix, data = shapes._rotated_picture(Scene("orange", "triangle", "white"), 160, np.random.default_rng(0))
    stored = tmp_path / f"sideways{suffix}"
    stored.write_bytes(data)
    with Image.open(stored) as image:
        assert image.getexif()[0x0112] == 6
        assert judge(image).shape != "triangle", "as stored, the triangle lies on its side"
        assert judge(ImageOps.exif_transpose(image)).shape == "triangle"


def test_the_same_seed_gives_the_same_bytes(folder: tuple[Path, dict[str, int]], tmp_path: Path) -> None:
    write_folder(tmp_path / "again", num_images=240, seed=3)
    assert folder_bytes(tmp_path / "again") == folder_bytes(folder[0])
    for name, seed in (("one", 4), ("two", 5)):
        write_folder(tmp_path / name, num_images=4, seed=seed)
    assert folder_bytes(tmp_path / "one") != folder_bytes(tmp_path / "two")


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not empty"):
        write_folder(tmp_path, num_images=4, seed=0)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_writer_that_fails_leaves_nothing_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "_TOO_SMALL_PX", 0)
    with pytest.raises(ValueError, match="positive"):
        write_folder(tmp_path / "pictures", num_images=50, seed=0)
    assert list(tmp_path.iterdir()) == []
