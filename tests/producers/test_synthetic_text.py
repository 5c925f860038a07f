"""Synthetic text: the same bytes each time, what the caption quotes is what was drawn, and nothing unrenderable."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from producer_world import SCORERS, FakeEncoders, make_plan_for, rows_of

from producers.driver import Driver
from producers.sources import open_source
from producers.sources.base import SourceRow, encode_uri, read_bytes
from producers.synthetic_text import fonts, layout
from producers.synthetic_text.captions import caption
from producers.synthetic_text.draw import TEMPLATES, draw, draw_bytes
from producers.synthetic_text.layout import DoesNotFitError, wrap
from producers.synthetic_text.recipe import Recipe, parse
from producers.workers import InlineWorkers
from qwenimg_dist.config import SyntheticTextSource
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.schema import ROWS, SCAN

FONTS = Path(str(pytest.importorskip("pylopdf_fonts_zh_cn").__file__)).parent
CHINESE = str(FONTS / "NotoSansSC-Regular.otf")


def source(**options: Any) -> Any:
    given = {"num_rows": 24, "size": 320, "fonts": (CHINESE,), "chinese_fonts": (CHINESE,), **options}
    return open_source(SyntheticTextSource(kind="synthetic_text", **given))


def rows(**options: Any) -> list[SourceRow]:
    return list(source(**options).find().rows)


def test_a_row_is_a_pure_function_of_the_seed_and_its_number() -> None:
    first = rows(num_rows=80)
    assert rows(num_rows=90)[:80] == first
    assert rows(num_rows=5, seed=1) != first[:5]
    assert len({row.uri for row in first}) == 80
    recipes = [parse(row.uri) for row in first]
    assert {recipe.template for recipe in recipes} == {name for names in TEMPLATES.values() for name in names}
    assert {recipe.language for recipe in recipes} == {"en", "zh"}
    assert [recipe.uri for recipe in recipes] == [row.uri for row in first]
    assert all(recipe.width % 16 == recipe.height % 16 == 0 for recipe in recipes)


def test_the_same_bytes_each_time_and_others_for_another_letter() -> None:
    for row in rows(num_rows=12):
        data = read_bytes("/", row.uri)
        for cache in (fonts.open_font, fonts._has, fonts._missing):
            cache.cache_clear()  # type: ignore[attr-defined]
        assert hashlib.sha256(read_bytes("/", row.uri)).digest() == hashlib.sha256(data).digest()
        recipe = parse(row.uri)
        other = replace(recipe, texts=("回" if recipe.language == "zh" else "Q", *recipe.texts[1:]))
        assert draw_bytes(other.uri) != data


def test_what_is_quoted_is_what_was_drawn_inside_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[tuple[Image.Image, tuple[int, int, int, int]]] = []
    written: list[str] = []
    real = layout.ImageDraw.ImageDraw.text

    def spy(pen: Any, place: tuple[int, int], text: str, **options: Any) -> None:
        placed.append((pen._image, options["font"].getbbox(text, stroke_width=options["stroke_width"])))
        placed[-1] = (pen._image, tuple(v + place[i % 2] for i, v in enumerate(placed[-1][1])))  # type: ignore[assignment]
        written.append(text)
        real(pen, place, text, **options)

    monkeypatch.setattr(layout.ImageDraw.ImageDraw, "text", spy)
    for row in rows(num_rows=60):
        recipe = parse(row.uri)
        _, drawn = draw(recipe)
        assert Counter(drawn) == Counter(recipe.texts)
        letters = Counter("".join(written).replace(" ", ""))  # what the pen was given, line by line
        assert letters == Counter("".join(recipe.texts).replace(" ", ""))
        opening, closing = ("“", "”") if recipe.language == "zh" else ('"', '"')
        for text in recipe.texts:
            assert f"{opening}{text}{closing}" in row.captions[0]
        for image, (left, top, right, bottom) in placed:
            assert 0 <= left < right <= image.width, recipe
            assert 0 <= top < bottom <= image.height, recipe
        placed.clear()
        written.clear()


def test_text_stands_out_from_its_ground() -> None:
    """Otherwise a colour was taken twice: blotting out the text must change many pixels by much."""
    for row in rows(num_rows=30):
        recipe = parse(row.uri)
        blank = replace(recipe, texts=tuple("." * 1 for _ in recipe.texts))
        with_text, without = (np.asarray(draw(one)[0], dtype=np.int16) for one in (recipe, blank))
        strong = (np.abs(with_text - without).max(axis=2) > 90).mean()
        assert strong > 0.001, recipe


def test_the_longest_texts_fit_the_smallest_pages(tmp_path: Path) -> None:
    english, chinese = ("seventeen-letters " * 18)[:131].strip(), ("清晨的山谷很安静，" * 14)[:49]
    (tmp_path / "corpus.txt").write_text(f"{english}\n{chinese}\n")
    templates = set()
    for row in rows(num_rows=80, size=256, path=str(tmp_path / "corpus.txt"), compositional=2, complex=2):
        recipe = parse(row.uri)
        draw(recipe)
        templates.add((recipe.template, recipe.language))
    assert {(name, "en") for name in ("paragraph", "paper", "app")} <= templates


@pytest.mark.slow
def test_ocr_reads_what_the_caption_quotes() -> None:
    engine = pytest.importorskip("rapidocr").RapidOCR()
    shares = []
    for row in rows(num_rows=24, size=640, seed=3):
        recipe = parse(row.uri)
        found = engine(np.asarray(draw(recipe)[0])[:, :, ::-1])
        read = Counter("".join(found.txts or ()).replace(" ", "").lower())
        wanted = Counter("".join(recipe.texts).replace(" ", "").lower())
        shares.append((wanted & read).total() / wanted.total())
    assert np.mean(shares) > 0.93
    assert np.median(shares) > 0.97


def test_one_unrenderable_character_drops_the_paragraph_and_is_counted(tmp_path: Path) -> None:
    good = ["Plain words on a line.", "More plain words, and a second line of them."]
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join([*good, "One \U00010348 letter is missing.", 'He said "no".', "x" * 40, "word " * 100]))
    found = source(path=str(corpus), chinese=0, compositional=0, complex=0, fonts=(CHINESE,)).find()
    texts = {parse(row.uri).texts[-1] for row in found.rows}
    assert texts == set(good)
    assert found.dropped["paragraphs with characters that the font lacks"] > 0
    assert not fonts.can_write(fonts.DEFAULT, "雨")
    assert fonts.can_write(fonts.DEFAULT, "Rain, 24")


def test_chinese_without_a_font_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fonts, "_FOLDERS", (str(tmp_path),))
    monkeypatch.setattr(fonts, "_PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match=r"there is no Chinese font: install one .* or set source\.chinese=0"):
        rows(chinese_fonts=())
    assert {parse(row.uri).font for row in rows(chinese=0, fonts=())} == {fonts.DEFAULT}
    draw(parse(rows(chinese=0, fonts=())[0].uri))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "none.txt"}, "none.txt cannot be read as UTF-8 text"),
        ({"english": 0, "chinese": 0}, "set one of source.english"),
        ({"fonts": ("none.ttf",)}, "none.ttf is no font file"),
        ({"backgrounds": "nowhere"}, "source.backgrounds=nowhere holds no pictures"),
    ],
)
def test_unusable_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rows(**options)


def test_lines_break_at_spaces_or_between_characters_and_never_before_a_full_stop() -> None:
    assert wrap("one two three", fonts.DEFAULT, 20, "en", 90) == ["one two", "three"]
    assert wrap("unbreakable", fonts.DEFAULT, 20, "en", 30) is None
    assert wrap("山水花。", CHINESE, 20, "zh", 61) == ["山水", "花。"]
    recipe = parse(rows(num_rows=1)[0].uri)
    with pytest.raises(DoesNotFitError, match="does not fit"):
        draw(replace(recipe, template="board", language="en", texts=("word " * 400,)))


def test_scenes_stand_in_the_given_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (90, 60), (10, 200, 30)).save(tmp_path / "green.png")
    row = rows(num_rows=1, pure=0, complex=0, backgrounds=str(tmp_path))[0]
    picture = draw(parse(row.uri))[0]
    assert picture.getpixel((2, 2)) == (10, 200, 30)
    (tmp_path / "green.png").unlink()
    with pytest.raises(FileNotFoundError):
        read_bytes("/", row.uri)


def test_produce_reads_the_same_bytes_twice_and_refuses_other_versions(tmp_path: Path) -> None:
    dataset, plan, made = Dataset.create(tmp_path / "data", 4), make_plan_for(), source(num_rows=6, size=256)
    workers = InlineWorkers(dataset, plan, made.root, FakeEncoders(), SCORERS)
    driver = Driver(dataset=dataset, plan=plan, root=made.root, make_workers=lambda: workers)
    change = driver.list_source(made.find())
    assert driver.produce(driver.pending(), change.num_rows)
    assert all(entry["fault"] is None for entry in rows_of(dataset, SCAN).values())
    assert {entry["reason"] for entry in rows_of(dataset, ROWS).values() if entry["status"] == "fault"} == set()
    recipe = parse(rows(num_rows=1)[0].uri)
    with pytest.raises(FileNotFoundError, match="recipe of version '0'"):
        read_bytes("/", recipe.uri.replace("synthetic:1", "synthetic:0"))
    assert encode_uri("synthetic:1?style=pure").startswith("bytes:")  # a manifest cannot name a recipe
    with pytest.raises(ValueError, match="no style 'other'"):
        parse(recipe.uri.replace(f"style={recipe.style}", "style=other"))


def test_captions_of_every_template_in_both_languages() -> None:
    base = parse(rows(num_rows=1)[0].uri)
    texts = {"paragraph": 2, "paper": 2, "board": 1, "street": 1, "slide": 3, "app": 7, "menu": 5}
    for template, count in texts.items():
        for language, quote in (("en", '"t0"'), ("zh", "“t0”")):
            one: Recipe = replace(
                base, template=template, language=language, texts=tuple(f"t{n}" for n in range(count))
            )
            assert quote in caption(one)
            assert f"t{count - 1}" in caption(one)
