"""Filters with transformers models: the same numbers as transformers itself, and what is missing is said early."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from producer_world import FakeEncoders, draw, make_plan_for, produce_here, rows_of
from safetensors.torch import load_file, save_file
from tiny_scorers import save_classifier, save_clip, save_siglip2
from transformers import AutoTokenizer, CLIPModel, SiglipModel, ViTForImageClassification, ViTModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from producers.filters import validate_filters
from producers.filters.base import BoundFilter, Facts, Resources, Scorers, Values
from qwenimg_dist.commands import produce
from qwenimg_dist.compose import ConfigError
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.models import image_text

CAPTIONS = (("a cat",), ("a cat", "A Very Long Caption that no context of a tiny model holds"), ("今日特价", "x"))
LABELS = ("normal", "nsfw", "drawing")


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(64, 48), (40, 40), (33, 70)]
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def facts() -> list[Facts]:
    return [
        Facts(num_bytes=1, width=one.width, height=one.height, captions=captions, image=one)
        for one, captions in zip(pictures(), CAPTIONS, strict=True)
    ]


def bind(name: str, **params: Any) -> BoundFilter:
    (bound,) = validate_filters({name: params})
    return bound


def ask(one: BoundFilter, given: list[Facts], scorers: Scorers | None = None) -> list[Values]:
    scorers = scorers or Scorers(Resources(pipeline_dir=Path("no pipeline"), device="cpu"))
    values = scorers.score(one, given)
    assert all(set(each) == set(one.filter.names) for each in values)
    return values


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def siglip2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_siglip2(tmp_path_factory.mktemp("siglip2"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("classifier"), LABELS)


def cosines(picture: torch.Tensor, captions: torch.Tensor) -> list[float]:
    return torch.nn.functional.cosine_similarity(picture[None], captions).tolist()


@torch.no_grad()
def test_similarity_is_what_clip_computes(clip: Path) -> None:
    model, tokenizer = CLIPModel.from_pretrained(clip), AutoTokenizer.from_pretrained(clip)
    pixels = CLIPImageProcessorPil.from_pretrained(clip)(images=pictures(), return_tensors="pt")
    images = model.get_image_features(**pixels).pooler_output
    values = ask(bind("similarity", path=str(clip)), facts())
    for one, image, captions in zip(values, images, CAPTIONS, strict=True):
        inputs = tokenizer(list(captions), padding=True, truncation=True, max_length=16, return_tensors="pt")
        expected = cosines(image, model.get_text_features(**inputs).pooler_output)
        assert one["similarity"] == pytest.approx(max(expected), abs=1e-5)
        assert one["similarity_worst"] == pytest.approx(min(expected), abs=1e-5)
    assert len({round(float(one["similarity"]), 4) for one in values}) == 3


@torch.no_grad()
def test_similarity_is_what_siglip2_computes(siglip2: Path) -> None:
    """Lower case, padded on the right to the whole context, no mask: as it was trained."""
    model, tokenizer = SiglipModel.from_pretrained(siglip2), AutoTokenizer.from_pretrained(siglip2)
    pixels = SiglipImageProcessorPil.from_pretrained(siglip2)(images=pictures(), return_tensors="pt")
    images = model.get_image_features(**pixels).pooler_output
    values = ask(bind("similarity", path=str(siglip2)), facts())
    for one, image, captions in zip(values, images, CAPTIONS, strict=True):
        ids = []
        for caption in captions:
            row = [*tokenizer(caption.lower(), add_special_tokens=False).input_ids[:23], tokenizer.eos_token_id]
            ids.append(row + [tokenizer.pad_token_id] * (24 - len(row)))
        expected = cosines(image, model.get_text_features(input_ids=torch.tensor(ids)).pooler_output)
        assert one["similarity"] == pytest.approx(max(expected), abs=1e-5)
        assert one["similarity_worst"] == pytest.approx(min(expected), abs=1e-5)


def test_it_is_said_how_much_of_the_best_caption_was_seen(clip: Path) -> None:
    one = bind("similarity", path=str(clip), min_similarity=1.0, min_seen=0.5)
    long, short = "abcdefghij" * 4, "a cat"
    image = pictures()[0]
    values = ask(
        one, [Facts(num_bytes=1, width=64, height=48, captions=(text,), image=image) for text in (long, short)]
    )
    assert [each["similarity_seen"] for each in values] == [pytest.approx(14 / 40), 1.0]
    assert one.admit(values[0]) is None  # what was not read does not speak against the picture
    rejection = one.admit(values[1])
    assert rejection is not None
    assert rejection.reason == "dissimilar"
    assert "min_similarity" in rejection.detail


def test_a_row_without_captions_is_not_rejected_and_moves_no_other(clip: Path) -> None:
    one = bind("similarity", path=str(clip), min_similarity=1.0)
    given = facts()
    bare = Facts(num_bytes=1, width=64, height=48, image=pictures()[0])
    values = ask(one, [given[0], bare, given[1]])
    assert values[1]["similarity_seen"] == 0.0
    assert one.admit(values[1]) is None
    expected = ask(one, given[:2])
    assert [values[0], values[2]] == [pytest.approx(each, abs=1e-5) for each in expected]


def test_a_batch_scores_as_each_alone(clip: Path) -> None:
    one = bind("similarity", path=str(clip))
    together = ask(one, facts())
    for index, values in enumerate(together):
        (alone,) = ask(one, [facts()[index]])
        assert alone == pytest.approx(values, abs=1e-5)


def save_head(folder: Path, sizes: list[int]) -> Path:
    torch.manual_seed(3)
    layers = {}
    for number, (inputs, outputs) in enumerate(pairwise(sizes)):
        # As in LAION's heads: numbers leave out the dropouts, and 10 comes after 2.
        layers[f"layers.{5 * number}.weight"] = torch.randn(outputs, inputs)
        layers[f"layers.{5 * number}.bias"] = torch.randn(outputs)
    save_file(layers, folder / "head.safetensors")
    return folder


@torch.no_grad()
def test_aesthetic_is_the_heads_score_of_normalised_features(clip: Path, tmp_path: Path) -> None:
    head = save_head(tmp_path, [24, 12, 6, 1])
    net = torch.nn.Sequential(torch.nn.Linear(24, 12), torch.nn.Linear(12, 6), torch.nn.Linear(6, 1))
    weights = load_file(head / "head.safetensors")
    names = {"layers.0": "0", "layers.5": "1", "layers.10": "2"}
    net.load_state_dict({names[key.rpartition(".")[0]] + "." + key.rpartition(".")[2]: w for key, w in weights.items()})
    pixels = CLIPImageProcessorPil.from_pretrained(clip)(images=pictures(), return_tensors="pt")
    features = CLIPModel.from_pretrained(clip).get_image_features(**pixels).pooler_output
    expected = net(torch.nn.functional.normalize(features, dim=-1))[:, 0]
    one = bind("aesthetic", path=str(clip), head=str(head), min_aesthetic=1000.0)
    values = ask(one, facts())
    assert [each["aesthetic"] for each in values] == pytest.approx(expected.tolist(), abs=1e-4)
    rejection = one.admit(values[0])
    assert rejection is not None
    assert rejection.reason == "unaesthetic"
    curved = ask(bind("aesthetic", path=str(clip), head=str(head), activation="relu"), facts())
    assert curved[0]["aesthetic"] != pytest.approx(values[0]["aesthetic"], abs=1e-4)


def test_one_model_in_memory_and_features_made_once(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_text.shared_model.cache_clear()
    scorers, given = Scorers(Resources(pipeline_dir=Path("no pipeline"), device="cpu")), facts()
    similarity = bind("similarity", path=str(clip))
    aesthetic = bind("aesthetic", path=str(clip), head=str(save_head(tmp_path, [24, 1])))
    alone = ask(aesthetic, facts())
    made: list[int] = []
    whole = image_text.ImageTextModel.image_features

    def counted(self: image_text.ImageTextModel, images: list[Image.Image]) -> torch.Tensor:
        made.append(len(images))
        return whole(self, images)

    monkeypatch.setattr(image_text.ImageTextModel, "image_features", counted)
    ask(similarity, given[:2], scorers)
    assert ask(aesthetic, given, scorers) == [pytest.approx(one, abs=1e-4) for one in alone]
    assert made == [2, 1]
    assert image_text.shared_model.cache_info().misses == 1


def test_a_head_of_another_size_is_refused(clip: Path, tmp_path: Path) -> None:
    one = bind("aesthetic", path=str(clip), head=str(save_head(tmp_path, [32, 1])))
    with pytest.raises(ValueError, match=r"takes 32 features, .* gives 24: they do not belong together"):
        ask(one, facts())
    save_file({"a.weight": torch.zeros(7, 32), "b.weight": torch.zeros(1, 8)}, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=r"filters\.aesthetic: .*not linear layers that end in one score.*\(7, 32\)"):
        one.check()


@torch.no_grad()
def test_nsfw_is_the_probability_that_the_classifier_gives(classifier: Path) -> None:
    pixels = ViTImageProcessorPil.from_pretrained(classifier)(images=pictures(), return_tensors="pt")
    expected = ViTForImageClassification.from_pretrained(classifier)(**pixels).logits.softmax(-1)
    values = ask(bind("nsfw", path=str(classifier)), facts())
    assert [one["nsfw"] for one in values] == pytest.approx(expected[:, 1].tolist(), abs=1e-5)
    both = ask(bind("nsfw", path=str(classifier), labels=["NSFW", "drawing"]), facts())
    assert [one["nsfw"] for one in both] == pytest.approx(expected[:, 1:].sum(-1).tolist(), abs=1e-5)
    rejection = bind("nsfw", path=str(classifier), max_probability=0.6).admit({"nsfw": 0.61})
    assert rejection is not None
    assert (rejection.reason, rejection.detail) == ("nsfw", "0.610 > max_probability=0.6")


@torch.no_grad()
def test_labels_that_may_hold_together_are_not_shared_out(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path, ("watermark", "logo"), several=True)
    pixels = ViTImageProcessorPil.from_pretrained(folder)(images=pictures(), return_tensors="pt")
    expected = ViTForImageClassification.from_pretrained(folder)(**pixels).logits.sigmoid()[:, 0]
    values = ask(bind("watermark", path=str(folder)), facts())
    assert [one["watermark"] for one in values] == pytest.approx(expected.tolist(), abs=1e-5)


def test_an_unknown_label_is_named_with_those_there_are(classifier: Path) -> None:
    with pytest.raises(ValueError, match=r"filters\.nsfw: .*no label 'porn'; it has normal, nsfw, drawing"):
        ask(bind("nsfw", path=str(classifier), labels=["porn"]), facts())


@pytest.mark.parametrize("name", ["nsfw", "watermark", "similarity", "aesthetic"])
def test_enabled_without_weights_says_what_to_set(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"filters\.{name}\.path: .*is not set: give a directory or a hub id"):
        validate_filters({name: {"enabled": True}})
    assert validate_filters({name: {"enabled": False}}) == []


def test_weights_that_cannot_be_had_are_named_before_any_work(tmp_path: Path) -> None:
    cases = {
        str(tmp_path / "gone"): "gone: no such directory",
        "someone/some-model": r"pin it with revision=<commit hash>",
    }
    for path, message in cases.items():
        with pytest.raises(ValueError, match=rf"(?s)filters\.nsfw: .*{message}.*filters\.nsfw\.enabled=false"):
            bind("nsfw", path=path).check()
    with pytest.raises(ValueError, match=r"filters\.nsfw: cannot get someone/some-model at revision abc from the hub"):
        bind("nsfw", path="someone/some-model", revision="abc").check()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"no \*\.safetensors there \(pytorch_model\.bin\): pickled weights"):
        bind("nsfw", path=str(tmp_path)).check()


def test_weights_of_another_class_are_refused_rather_than_filled_with_noise(classifier: Path, tmp_path: Path) -> None:
    ViTModel.from_pretrained(classifier).save_pretrained(tmp_path)
    ViTImageProcessorPil.from_pretrained(classifier).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"weights are not those of a ViTForImageClassification: no classifier"):
        ask(bind("nsfw", path=str(tmp_path)), facts())
    with pytest.raises(ValueError, match=r"filters\.similarity: .*"):
        ask(bind("similarity", path=str(classifier)), facts())


def test_code_that_comes_with_weights_is_not_run(classifier: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    config = (classifier / "config.json").read_text()
    config = config.replace('"model_type": "vit"', '"model_type": "mine"')
    auto_map = '{"auto_map": {"AutoConfig": "mine.C", "AutoModelForImageClassification": "mine.M"}, '
    (tmp_path / "config.json").write_text(auto_map + config[1:])
    (tmp_path / "mine.py").write_text(f"import pathlib; pathlib.Path({str(mark)!r}).touch()\nC = M = None\n")
    (tmp_path / "model.safetensors").write_bytes((classifier / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"filters\.nsfw: .*cannot load it"):
        ask(bind("nsfw", path=str(tmp_path)), facts())
    assert not mark.exists()


def test_another_path_or_revision_scores_again_and_a_threshold_does_not() -> None:
    one = bind("nsfw", path="a/b", revision="1").fingerprint
    assert one == bind("nsfw", path="a/b", revision="1", max_probability=0.9).fingerprint
    assert one != bind("nsfw", path="a/b", revision="2").fingerprint
    assert one != bind("nsfw", path="a/b", revision="1", labels=["x"]).fingerprint


def test_in_the_pipeline_new_captions_are_compared_anew(clip: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for number in range(3):
        draw(source / f"{number}.png", number, caption=f"the picture of number {number}")
    plan = make_plan_for("filters.similarity.enabled=true", f"filters.similarity.path={clip}")
    dataset = Dataset.create(tmp_path / "data", unit_size=8)
    produce_here(source, dataset, plan, FakeEncoders())
    before = {row: entry["score_similarity"] for row, entry in rows_of(dataset, "rows").items()}
    assert len(set(before.values())) == 3
    (source / "1.txt").write_text("another caption")
    encoders = FakeEncoders()
    produce_here(source, dataset, plan, encoders)
    after = {row: entry["score_similarity"] for row, entry in rows_of(dataset, "rows").items()}
    assert [row for row in before if before[row] != after[row]] == [1]
    assert encoders.num_pictures == 0


def test_produce_refuses_before_it_writes(tmp_path: Path) -> None:
    draw(tmp_path / "source" / "0.png", 0, caption="the picture of number nought")
    given = {"source.path": tmp_path / "source", "data.path": tmp_path / "data", "filters.nsfw.path": tmp_path / "gone"}
    overrides = [f"{key}={value}" for key, value in given.items()]
    with pytest.raises(ValueError, match=r"filters\.nsfw: .*gone: no such directory"):
        produce.run([*overrides, "filters.nsfw.enabled=true"])
    assert not (tmp_path / "data").exists()
