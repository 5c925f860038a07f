"""Several captions per picture: each is judged alone, and nothing trains on the unfit ones."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from producer_world import FINGERPRINT, FakeEncoders, draw, make_plan_for, produce_here, rows_of
from rich.console import Console

from producers.filters.base import BoundFilter, Facts, Filter, FilterParams, Resources, Scorer, Value
from producers.plan import Plan
from producers.sources import open_source
from qwenimg_dist.commands.data_repair import repair
from qwenimg_dist.commands.data_verify import Tally, problems
from qwenimg_dist.config import FolderSource, ManifestSource, WebdatasetSource
from qwenimg_dist.data.catalog import Catalog, RunFacets
from qwenimg_dist.data.catalog_build import build_catalog
from qwenimg_dist.data.facets import Dataset, Part
from qwenimg_dist.data.pins import ready_units
from qwenimg_dist.schema import LISTING, ROWS, SCAN, caption_key, latents_facet, text_facet

FACETS = RunFacets(text=text_facet(FINGERPRINT), latents={64: latents_facet(64, FINGERPRINT)})


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset.create(tmp_path / "data", 4)


def write(source: Path, captions: dict[str, list[str]]) -> None:
    lines = [json.dumps({"file_name": name, "text": texts}) for name, texts in captions.items()]
    for number, name in enumerate(captions):
        if not (source / name).exists():
            draw(source / name, number, (100, 100))
    (source / "metadata.jsonl").write_text("\n".join(lines))


def trained_on(dataset: Dataset, tmp_path: Path) -> dict[int, set[str]]:
    """Row -> keys of the captions that the catalog gives it."""
    built = build_catalog(dataset, ready_units(dataset, FACETS), FACETS, tmp_path / "catalog")
    catalog = Catalog.open(built.folder, dataset.root)
    keys = [key.decode() for key in catalog.text_keys]
    starts = catalog.caption_start
    return {
        int(row): {keys[text] for text in catalog.caption_text[starts[index] : starts[index + 1]]}
        for index, row in enumerate(catalog.rows)
    }


def keys(*captions: str) -> set[str]:
    return {caption_key(caption) for caption in captions}


MIXED = {
    "a.png": ["a cat on a mat", "IMG_1234", "I'm sorry, I can't help"],
    "b.png": ["IMG_1234", "a dog in a park"],
    "c.png": ["DSC_0001.jpg", "https://example.com/x"],
    "d.png": ["one", "two"],
}


def test_unfit_captions_are_recorded_and_neither_encoded_nor_trained_on(tmp_path: Path, dataset: Dataset) -> None:
    write(tmp_path / "source", MIXED)
    encoders = FakeEncoders()
    produce_here(tmp_path / "source", dataset, make_plan_for(), encoders)
    rows = rows_of(dataset, ROWS)
    faults = {number: entry["caption_faults"] for number, entry in rows.items()}
    assert faults == {
        0: ["", "caption_file_name", "caption_refusal"],
        1: ["caption_file_name", ""],
        2: ["caption_file_name", "caption_url"],
        3: None,
    }
    assert [rows[number]["reason"] for number in range(4)] == ["", "", "caption_file_name", ""]
    assert "none of 2 captions is left" in rows[2]["detail"]
    assert encoders.num_captions == 1 + 4
    assert trained_on(dataset, tmp_path) == {
        0: keys("a cat on a mat"),
        1: keys("a dog in a park"),
        3: keys("one", "two"),
    }
    assert rows[1]["score_caption_tokens"] > 4  # of the first caption that is left
    assert list(problems(dataset, Tally())) == []


def test_loosened_filters_encode_just_the_captions_that_are_fit_now(tmp_path: Path, dataset: Dataset) -> None:
    write(tmp_path / "source", MIXED)
    produce_here(tmp_path / "source", dataset, make_plan_for(), FakeEncoders())
    encoders = FakeEncoders()
    loose = make_plan_for("filters.caption_validity.reject=[refusal,url]")
    produce_here(tmp_path / "source", dataset, loose, encoders)
    assert encoders.num_captions == 2  # IMG_1234 of rows 0 and 1, and DSC_0001.jpg
    assert encoders.num_pictures == 1
    assert trained_on(dataset, tmp_path)[0] == keys("a cat on a mat", "IMG_1234")
    tight = FakeEncoders()
    produce_here(tmp_path / "source", dataset, make_plan_for(), tight)
    assert tight.num_captions == tight.num_pictures == 0
    assert trained_on(dataset, tmp_path)[0] == keys("a cat on a mat")
    assert list(problems(dataset, Tally())) == []


class _Params(FilterParams):
    pass


def similarity(asked: list[tuple[str, ...]]) -> BoundFilter:
    """A filter with a model on picture and captions, which notes what it was asked."""

    def load(params: _Params, resources: Resources) -> Scorer:
        def score(facts: Sequence[Facts]) -> list[dict[str, Value]]:
            asked.extend(one.captions for one in facts)
            return [{"alikeness": float(len("".join(one.captions)))} for one in facts]

        return score

    one: Filter[Any] = Filter(
        params=_Params,
        stage=3,
        looks_at="pixels",
        scores=("alikeness",),
        load=load,
        reads_captions=True,
        admit=lambda values, params: None,
    )
    return BoundFilter(name=f"alikeness-{id(asked)}", filter=one, params=_Params())


def with_similarity(plan: Plan, asked: list[tuple[str, ...]]) -> Plan:
    return replace(plan, filters=(*plan.filters, similarity(asked)))


def test_scores_of_captions_are_made_again_for_just_the_rows_whose_captions_changed(
    tmp_path: Path, dataset: Dataset
) -> None:
    source = tmp_path / "source"
    write(source, MIXED)
    first: list[tuple[str, ...]] = []
    produce_here(source, dataset, with_similarity(make_plan_for(), first), FakeEncoders())
    assert first == [("a cat on a mat",), ("a dog in a park",), ("one", "two")]  # the fit ones

    write(source, {**MIXED, "d.png": ["one", "three"]})
    again: list[tuple[str, ...]] = []
    reports = produce_here(source, dataset, with_similarity(make_plan_for(), again), FakeEncoders())
    assert again == [("one", "three")]
    assert sum(report.decoded for report in reports) == 1
    assert rows_of(dataset, ROWS)[3]["score_alikeness"] == len("onethree")
    assert rows_of(dataset, ROWS)[0]["score_alikeness"] == len("a cat on a mat")

    loosened: list[tuple[str, ...]] = []
    loose = make_plan_for("filters.caption_validity.reject=[refusal,url]")
    produce_here(source, dataset, with_similarity(loose, loosened), FakeEncoders())
    assert loosened == [("a cat on a mat", "IMG_1234"), ("IMG_1234", "a dog in a park"), ("DSC_0001.jpg",)]


def test_captions_that_change_after_a_repair_are_scored_again(tmp_path: Path, dataset: Dataset) -> None:
    """The repair withdraws the record that would say which captions the scores were made of."""
    source = tmp_path / "source"
    write(source, MIXED)
    produce_here(source, dataset, with_similarity(make_plan_for(), []), FakeEncoders())
    dataset.parquet(Part(facet=SCAN, unit=0, part=0)).unlink()
    repair(dataset, Console())
    write(source, {**MIXED, "d.png": ["one", "three"]})
    again: list[tuple[str, ...]] = []
    produce_here(source, dataset, with_similarity(make_plan_for(), again), FakeEncoders())
    assert ("one", "three") in again
    assert rows_of(dataset, ROWS)[3]["score_alikeness"] == len("onethree")


def test_parts_written_before_captions_had_faults_are_read(tmp_path: Path, dataset: Dataset) -> None:
    """Old parts have neither column."""
    write(tmp_path / "source", {"a.png": ["a cat", "a mat"]})
    produce_here(tmp_path / "source", dataset, make_plan_for(), FakeEncoders())
    for facet, column in ((ROWS, "caption_faults"), (LISTING, "caption_kinds")):
        (part,) = dataset.parts(facet)
        table, meta = dataset.read(part).drop_columns([column]), dataset.meta(part)
        dataset.parquet(part).unlink()
        dataset.commit(part, table, config_hash=meta["config_hash"], extra=meta)
    assert list(problems(dataset, Tally())) == []
    assert trained_on(dataset, tmp_path) == {0: keys("a cat", "a mat")}
    assert produce_here(tmp_path / "source", dataset, make_plan_for(), FakeEncoders()) == []
    write(tmp_path / "source", {"a.png": ["a cat", "IMG_0001"]})
    produce_here(tmp_path / "source", dataset, make_plan_for(), FakeEncoders())
    assert trained_on(dataset, tmp_path) == {0: keys("a cat")}


KINDS = {"raw": "text", "recaption": "llava", "fused": "both"}
ENTRY = {"text": "a cat", "llava": ["a tabby cat on a mat", "a cat"], "both": None}
CONFIGURED = "+source.caption_columns={raw: text, recaption: llava, fused: both}"


def listed(source: Any) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    return [(row.captions, row.caption_kinds) for row in open_source(source).find().rows]


def test_every_source_gives_the_kinds_of_its_captions(tmp_path: Path) -> None:
    expected = [(("a cat", "a tabby cat on a mat"), ("raw", "recaption"))]
    draw(tmp_path / "a.png", 1, (100, 100))
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", **ENTRY}))
    (tmp_path / "manifest.jsonl").write_text(json.dumps({"uri": "a.png", **ENTRY}))
    pq.write_table(pa.Table.from_pylist([{"uri": "a.png", **ENTRY, "both": ""}]), tmp_path / "manifest.parquet")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("a.json", json.dumps(ENTRY).encode()), ("a.png", (tmp_path / "a.png").read_bytes())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    sources = [
        FolderSource(kind="folder", path=str(tmp_path), caption_columns=KINDS),
        ManifestSource(kind="manifest", path=str(tmp_path / "manifest.jsonl"), caption_columns=KINDS),
        ManifestSource(kind="manifest", path=str(tmp_path / "manifest.parquet"), caption_columns=KINDS),
        WebdatasetSource(kind="webdataset", path=str(tmp_path / "a.tar"), caption_columns=KINDS),
    ]
    for source in sources:
        assert listed(source) == expected, source.kind
    assert listed(FolderSource(kind="folder", path=str(tmp_path))) == [(("a cat",), ())]
    with pytest.raises(ValueError, match=r"has no column txt; there is: "):
        listed(sources[2].model_copy(update={"caption_columns": {"raw": "txt"}}))
    with pytest.raises(ValueError, match=r"none of its 1 rows has a caption in 'txt', 'tx2'"):
        listed(sources[1].model_copy(update={"caption_columns": {"raw": "txt", "fused": "tx2"}}))


def kinds_in_catalog(dataset: Dataset, tmp_path: Path) -> list[list[str]]:
    built = build_catalog(dataset, ready_units(dataset, FACETS), FACETS, tmp_path / "catalog")
    catalog = Catalog.open(built.folder, dataset.root)
    starts, kinds = catalog.caption_start, [catalog.caption_kinds[kind] for kind in catalog.caption_kind]
    return [kinds[starts[row] : starts[row + 1]] for row in range(catalog.num_rows)]


def test_kinds_reach_the_catalog_beside_the_captions_that_are_left(tmp_path: Path, dataset: Dataset) -> None:
    source = tmp_path / "source"
    draw(source / "a.png", 1, (100, 100))
    draw(source / "b.png", 2, (100, 100), "a dog")
    line = {"file_name": "a.png", "text": "IMG_0001", "llava": "a tabby cat", "both": "a cat"}
    (source / "metadata.jsonl").write_text(json.dumps(line))
    produce_here(source, dataset, make_plan_for(), FakeEncoders())
    assert rows_of(dataset, LISTING)[1]["caption_kinds"] is None
    assert rows_of(dataset, ROWS)[0]["reason"] == "caption_file_name"
    produce_here(source, dataset, make_plan_for(), FakeEncoders(), CONFIGURED)
    assert rows_of(dataset, LISTING)[0]["caption_kinds"] == ["raw", "recaption", "fused"]
    assert kinds_in_catalog(dataset, tmp_path) == [["recaption", "fused"], ["raw"]]
    assert produce_here(source, dataset, make_plan_for(), FakeEncoders(), CONFIGURED) == []
    # The same words under other kinds are a change, and cost no encoding.
    swapped = CONFIGURED.replace("recaption: llava, fused: both", "fused: llava, recaption: both")
    encoders = FakeEncoders()
    produce_here(source, dataset, make_plan_for(), encoders, swapped)
    assert kinds_in_catalog(dataset, tmp_path) == [["fused", "recaption"], ["raw"]]
    assert encoders.num_captions == encoders.num_pictures == 0


def test_enhanced_captions_stand_beside_or_in_place_of_the_sources(tmp_path: Path, dataset: Dataset) -> None:
    source = tmp_path / "source"
    draw(source / "a.png", 1, (100, 100), "a shop sign that says OPEN")
    enhanced = 'a shop sign that says "OPEN", Ultra HD, 4K, cinematic composition'
    for mode, captions, kinds in (
        ("off", ["a shop sign that says OPEN"], None),
        ("add", ["a shop sign that says OPEN", enhanced], ["raw", "enhanced"]),
        ("replace", [enhanced], None),
    ):
        plan = make_plan_for(f"captions.enhance={mode}")
        assert len(produce_here(source, dataset, plan, FakeEncoders())) == 1
        assert rows_of(dataset, LISTING)[0]["captions"] == captions
        assert rows_of(dataset, LISTING)[0]["caption_kinds"] == kinds
        assert trained_on(dataset, tmp_path) == {0: keys(*captions)}
        assert produce_here(source, dataset, plan, FakeEncoders()) == []
