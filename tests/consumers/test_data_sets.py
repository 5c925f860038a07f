"""Which data sets a run trains on, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_dataset import FakeProducer, facets_for, make_rows

from consumers.data_sets import check_ready, data_dirs, ledger_config
from qwenimg_dist.compose import load_config
from qwenimg_dist.config import Config
from qwenimg_dist.data.facets import DataError

MIX = (
    "data.mix={photos: {path: /a, weight: 3, where: 'aspect < 2'}, "
    "text: {path: /b, weight: 1, caption_weights: {raw: 1}}}"
)


def config(*overrides: str) -> Config:
    return load_config(overrides)


def test_one_or_several() -> None:
    assert data_dirs(config("data.path=/a")) == {"": Path("/a")}
    assert (
        data_dirs(config(MIX)) == data_dirs(config(MIX, "data.path=/b")) == {"photos": Path("/a"), "text": Path("/b")}
    )
    several = ledger_config(config(MIX, "data.where='row < 9'"), ())
    assert several.mix is not None
    assert (several.mix.unit, several.mix.amounts) == ("weight", {"photos": 3, "text": 1})
    photos, text = several.selection("photos", 5), several.selection("text", 6)
    assert photos.where is not None
    assert photos.where.expression == "(row < 9) and (aspect < 2)"
    assert text.where is not None
    assert text.where.expression == "row < 9"
    assert (photos.caption_weights, text.caption_weights) == (None, {"raw": 1})
    assert (photos.held_out_below, text.held_out_below) == (5, 6)
    repeats = ledger_config(config("data.mix={a: {path: /a, repeats: 1}, b: {path: /b, repeats: 0.5}}"), ())
    assert repeats.mix is not None
    assert (repeats.mix.unit, repeats.mix.amounts) == ("repeats", {"a": 1, "b": 0.5})


def test_a_mix_of_one_is_that_data_set() -> None:
    one = config("data.mix={photos: {path: /a, weight: 3, where: 'aspect < 2'}}", "follow=true")
    assert data_dirs(one) == {"": Path("/a")}
    alone = ledger_config(one, ())
    assert alone.mix is None
    where = alone.selection("", 0).where
    assert where is not None
    assert where.expression == "aspect < 2"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], r"data\.path is not set"),
        ([MIX, "data.mix.text.path=/x/../a"], r"data\.mix\.photos and data\.mix\.text are the same directory /a"),
        ([MIX, "data.path=/c"], r"data\.path=/c is not among data\.mix \(/a, /b\)"),
        ([MIX, "follow=true"], "follow=true trains on one data set"),
    ],
)
def test_what_is_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        data_dirs(config(*overrides))


def test_a_data_set_of_another_model_is_named(tmp_path: Path) -> None:
    for name, fingerprint in (("a", "0123456789ab"), ("b", "ffffffffffff")):
        producer = FakeProducer(tmp_path / name, fingerprint=fingerprint)
        producer.add(make_rows(4))
        producer.produce()
    dirs = {"photos": tmp_path / "a", "text": tmp_path / "b"}
    check_ready({"photos": tmp_path / "a"}, facets_for((32,)))
    with pytest.raises(DataError, match=r"data\.mix\.text: .*b has text-ffffffffffff, this run needs text-0123"):
        check_ready(dirs, facets_for((32,)))
    with pytest.raises(DataError, match=r"data\.mix\.text: .* is not a data set"):
        check_ready({**dirs, "text": tmp_path / "none"}, facets_for((32,)))
