"""Single events on a unit, with exact counts of what was decoded, encoded and committed."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from producer_world import (
    SCORERS,
    FakeEncoders,
    caption_features,
    draw,
    make_plan_for,
    produce_here,
    rows_of,
    tensor_at,
)

from producers.commit import UnitConflictError
from producers.dedup import DigestIndex
from producers.filters import FILTERS
from producers.listing import sync_listing
from producers.sources.base import SourceRow
from producers.unit import produce_unit
from qwenimg_dist.commands.data_verify import Tally, problems
from qwenimg_dist.data.catalog import RunFacets
from qwenimg_dist.data.facets import DataError, Dataset
from qwenimg_dist.data.pins import ready_units
from qwenimg_dist.report.funnel import funnel
from qwenimg_dist.schema import LISTING, ROWS, caption_key

PLAN = make_plan_for(resolutions=(64, 96))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    for number in range(6):
        draw(root / f"{number}.png", number, (100, 70 + 30 * (number % 2)), f"caption {number}")
    return root


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset.create(tmp_path / "data", 4)


def statuses(dataset: Dataset) -> dict[int, str]:
    return {row: entry["reason"] or entry["status"] for row, entry in rows_of(dataset, ROWS).items()}


def counts(dataset: Dataset, unit: int) -> dict[str, int]:
    return dict(dataset.meta([part for part in dataset.parts(ROWS) if part.unit == unit][-1])["counts"])


def test_tightening_encodes_nothing_and_loosening_only_what_is_new(source: Path, dataset: Dataset) -> None:
    tight = make_plan_for("filters.resolution.min_side=80", resolutions=(64,))
    loose = make_plan_for(resolutions=(64,))
    first = FakeEncoders()
    produce_here(source, dataset, tight, first)
    assert first.num_pictures == 3
    assert statuses(dataset) == {0: "too_small", 1: "kept", 2: "too_small", 3: "kept", 4: "too_small", 5: "kept"}
    assert counts(dataset, 0) == {"too_small": 2, "kept": 2}
    loosened = FakeEncoders()
    produce_here(source, dataset, loose, loosened)
    assert loosened.num_pictures == loosened.num_captions == 3
    assert set(statuses(dataset).values()) == {"kept"}
    tightened = FakeEncoders()
    reports = produce_here(source, dataset, tight, tightened)
    assert tightened.num_pictures == tightened.num_captions == sum(report.decoded for report in reports) == 0
    assert list(statuses(dataset).values()).count("too_small") == 3
    back = FakeEncoders()
    produce_here(source, dataset, loose, back)
    assert back.num_pictures == 0


def test_a_picture_is_decoded_once_for_all_resolutions(source: Path, dataset: Dataset) -> None:
    encoders = FakeEncoders()
    reports = produce_here(source, dataset, PLAN, encoders)
    assert sum(report.decoded for report in reports) == 6
    assert encoders.num_pictures == sum(report.latents for report in reports)
    left_out = dataset.meta(dataset.parts(ROWS)[0])["left_out"]
    assert left_out == {"64": 0, "96": 2}


def test_text_is_encoded_once_per_caption_with_the_empty_prompt_in_each_unit(source: Path, dataset: Dataset) -> None:
    for number in range(4):
        (source / f"{number}.txt").write_text("the same")
    encoders = FakeEncoders()
    produce_here(source, dataset, PLAN, encoders)
    assert encoders.num_captions == (1 + 1) + (1 + 2)
    texts = rows_of(dataset, PLAN.text_facet)
    same = texts[0, caption_key("the same")]
    assert np.array_equal(tensor_at(dataset, PLAN.text_facet, same), caption_features("the same"))
    assert (1, caption_key("")) in texts


def test_pixels_in_the_shard_are_those_of_the_crop(source: Path, dataset: Dataset) -> None:
    produce_here(source, dataset, PLAN, FakeEncoders())
    facet = PLAN.latents_facets[64]
    entry = rows_of(dataset, facet)[1]
    from producers.load import load_image, render

    placement = PLAN.placements(100, 100)[64]
    assert (entry["resized_height"], entry["resized_width"]) == placement.resized
    pixels = render(load_image((source / "1.png").read_bytes()).image, placement)
    means = pixels.reshape(placement.bucket.height // 8, 8, placement.bucket.width // 8, 8, 3).mean(axis=(1, 3, 4))
    assert np.allclose(tensor_at(dataset, facet, entry)[0], means, atol=0.01)


def test_files_that_change_or_vanish_cost_only_what_had_to_be_read_anew(source: Path, dataset: Dataset) -> None:
    small, large = PLAN.latents_facets[64], PLAN.latents_facets[96]
    produce_here(source, dataset, make_plan_for(resolutions=(64,)), FakeEncoders())
    encoded = rows_of(dataset, small)
    shutil.copy(source / "1.png", source / "5.png")
    (source / "3.png").unlink()
    draw(source / "6.png", 6, (100, 100), "comes and goes")
    produce_here(source, dataset, make_plan_for("filters.resolution.min_side=101", resolutions=(64,)), FakeEncoders())
    (source / "6.png").unlink()  # scanned, but never encoded
    produce_here(source, dataset, PLAN, FakeEncoders())
    assert statuses(dataset) == dict.fromkeys(range(6), "kept") | {6: "missing_file"}
    details = {row: entry["detail"] for row, entry in rows_of(dataset, ROWS).items() if entry["status"] == "kept"}
    assert details[3] == "missing_file: the source names it, but it is not there; no latents at 96 px"
    assert details[5].startswith("changed_file: not the bytes that were scanned")
    assert [details[row] for row in (0, 1, 2, 4)] == [""] * 4
    assert rows_of(dataset, small) == encoded
    assert rows_of(dataset, large).keys() == {1}
    assert list(problems(dataset, Tally())) == []
    assert {
        one.unit for one in ready_units(dataset, RunFacets(text=PLAN.text_facet, latents=dict(PLAN.latents_facets)))
    } == {0, 1}
    # The files come back, one of them in time.
    assert produce_here(source, dataset, PLAN, FakeEncoders()) == []
    draw(source / "3.png", 3, (100, 100))
    encoders = FakeEncoders()
    produce_here(source, dataset, PLAN, encoders)
    assert encoders.num_pictures == 1
    assert rows_of(dataset, large).keys() == {1, 3}
    assert rows_of(dataset, ROWS)[3]["detail"] == ""
    assert produce_here(source, dataset, PLAN, FakeEncoders()) == []
    assert list(problems(dataset, Tally())) == []


def test_a_filter_added_after_the_file_is_gone_leaves_the_row_unscored(source: Path, dataset: Dataset) -> None:
    first = make_plan_for("filters.texture.enabled=false", resolutions=(64,))
    produce_here(source, dataset, first, FakeEncoders())
    (source / "3.png").unlink()
    produce_here(source, dataset, make_plan_for(resolutions=(64,)), FakeEncoders())
    entry = rows_of(dataset, ROWS)[3]
    assert (entry["status"], entry["detail"][-15:]) == ("kept", "not scored anew")
    name = next(name for name in FILTERS["texture"].names)
    assert entry[f"score_{name}"] is None
    assert rows_of(dataset, ROWS)[2][f"score_{name}"] is not None


def test_a_file_that_metadata_names_beforehand_is_taken_when_it_comes(source: Path, dataset: Dataset) -> None:
    (source / "metadata.jsonl").write_text('{"file_name": "zz.png", "text": "not yet there"}\n')
    produce_here(source, dataset, PLAN, FakeEncoders())
    assert statuses(dataset)[6] == "missing_file"
    draw(source / "zz.png", 77, (100, 100))
    produce_here(source, dataset, PLAN, FakeEncoders())
    assert statuses(dataset)[6] == "kept"


def test_duplicates_are_settled_in_source_order_and_stay(source: Path, dataset: Dataset) -> None:
    shutil.copy(source / "2.png", source / "4.png")
    (source / "2.txt").unlink()  # without a caption it does not stand in the way
    produce_here(source, dataset, PLAN, FakeEncoders())
    assert statuses(dataset)[2] == "no_caption"
    assert statuses(dataset)[4] == "kept"
    (source / "2.txt").write_text("too late")
    produce_here(source, dataset, PLAN, FakeEncoders())
    assert statuses(dataset)[2] == "duplicate"
    assert rows_of(dataset, ROWS)[2]["detail"] == "same bytes as row 4"
    assert statuses(dataset)[4] == "kept"


def test_an_admitted_row_stays_when_only_larger_classes_are_asked_for(source: Path, dataset: Dataset) -> None:
    produce_here(source, dataset, make_plan_for(resolutions=(64,)), FakeEncoders())
    produce_here(source, dataset, make_plan_for(resolutions=(128,)), FakeEncoders())
    assert set(statuses(dataset).values()) == {"kept"}
    alone = Dataset.create(dataset.root.parent / "alone", 4)
    produce_here(source, alone, make_plan_for(resolutions=(128,)), FakeEncoders())
    assert set(statuses(alone).values()) == {"too_small"}
    assert all(alone.meta(part)["inputs"] for part in alone.parts(ROWS))


def test_a_part_that_somebody_else_committed_meanwhile_is_a_conflict(source: Path, dataset: Dataset) -> None:
    class Rival(FakeEncoders):
        def latents(self, pixels):  # type: ignore[no-untyped-def]
            if dataset.next_part(ROWS, 0).part == 0:
                produce_unit(dataset, 0, plan=PLAN, root=str(source), encoders=FakeEncoders(), scorers=SCORERS)
            return super().latents(pixels)

    with contextlib.suppress(Done):  # listing, scan and dedup of unit 0 are there then
        produce_here(source, dataset, PLAN, Ended())
    with pytest.raises(UnitConflictError, match="committed by somebody else"):
        produce_unit(dataset, 0, plan=PLAN, root=str(source), encoders=Rival(), scorers=SCORERS)
    assert not dataset.strays()
    produce_here(source, dataset, PLAN, FakeEncoders())
    assert set(statuses(dataset).values()) == {"kept"}


def test_decoding_threads_change_nothing(source: Path, tmp_path: Path, dataset: Dataset) -> None:
    produce_here(source, dataset, PLAN, FakeEncoders())
    other = Dataset.create(tmp_path / "threads", 4)
    with contextlib.suppress(Done):
        produce_here(source, other, PLAN, Ended())
    produce_unit(other, 0, plan=PLAN, root=str(source), encoders=FakeEncoders(), scorers=SCORERS, num_threads=3)
    for facet in PLAN.facets:
        mine = {key: entry for key, entry in rows_of(other, facet).items() if entry in _unit_0(other, facet)}
        theirs = {key: entry for key, entry in rows_of(dataset, facet).items() if entry in _unit_0(dataset, facet)}
        assert mine.keys() == theirs.keys()
        assert all(
            np.array_equal(tensor_at(other, facet, mine[key]), tensor_at(dataset, facet, theirs[key])) for key in mine
        )


class Done(Exception):
    pass


class Ended(FakeEncoders):
    def latents(self, pixels):  # type: ignore[no-untyped-def]
        raise Done


def _unit_0(dataset: Dataset, facet: str) -> list[dict[str, object]]:
    table = dataset.read_unit(facet, 0)
    assert table is not None
    return list(table.to_pylist())


def test_the_listing_fills_its_last_unit_first_and_supersedes_captions(dataset: Dataset) -> None:
    def look(*rows: tuple[str, str]) -> tuple[int, int, int, tuple[int, ...]]:
        listed = [SourceRow(uri=uri, captions=(text,)) for uri, text in rows]
        change = sync_listing(dataset, listed, config_hash="x", before_commit=lambda: None)
        return change.num_rows, change.added, change.recaptioned, change.units

    assert look(("b", "1"), ("d", "2")) == (2, 2, 0, (0,))
    assert look(("b", "1"), ("d", "2")) == (2, 0, 0, ())
    assert look(("a", "0"), ("b", "new"), ("c", "3"), ("d", "2"), ("e", "4"), ("e", "twice")) == (6, 4, 1, (0, 1))
    listed = rows_of(dataset, LISTING)
    assert [entry["uri"] for _, entry in sorted(listed.items())] == ["b", "d", "a", "c", "e", "e"]
    assert listed[0]["captions"] == ["new"]
    assert len({entry["key"] for entry in listed.values()}) == 6
    dataset.parquet(dataset.parts(LISTING)[0]).unlink()
    with pytest.raises(DataError, match="has gaps"):
        look(("b", "1"))


def test_the_digest_index_finds_what_was_added_across_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("producers.key_index._MERGE_AT", 50)
    rng = np.random.default_rng(0)
    digests = [rng.bytes(31) + bytes([number % 3]) for number in range(400)]  # every third ends in NUL
    index = DigestIndex()
    for row, digest in enumerate(digests):
        assert index.find_many([digest]) == [[]]
        index.add([(digest, row)])
    assert index.find_many(digests) == [[row] for row in range(400)]
    assert index.find_many([digests[0][:-1] + b"\7"]) == [[]]
    assert len(index) == 400
    index.add([(digests[3], 500), (b"\1" * 32, 501), (b"\1" * 32, 502)])
    assert index.find_many([digests[3], b"\1" * 32, digests[4]]) == [[3, 500], [501, 502], [4]]


def test_every_part_of_every_facet_is_there_even_if_nothing_was_kept(tmp_path: Path, dataset: Dataset) -> None:
    draw(tmp_path / "tiny" / "a.png", 1, (20, 20), "too small for anything")
    produce_here(tmp_path / "tiny", dataset, PLAN, FakeEncoders())
    inputs = dataset.meta(dataset.parts(ROWS)[0])["inputs"]
    assert inputs == dict.fromkeys([*PLAN.settled, *PLAN.facets], 1)
    assert (0, caption_key("")) in rows_of(dataset, PLAN.text_facet)


def test_the_funnel_counts_what_each_stage_took(source: Path, dataset: Dataset) -> None:
    shutil.copy(source / "0.png", source / "2.png")
    (source / "3.png").write_bytes((source / "3.png").read_bytes()[:-200])
    (source / "4.txt").write_text("https://example.org/picture.jpg")
    draw(source / "5.png", 5, (30, 30))
    produce_here(source, dataset, PLAN, FakeEncoders())
    counted = funnel(dataset)
    assert {reason: counted.stages[reason] for _, reason in counted.reasons} == {
        "duplicate": 1,
        "truncated": 1,
        "caption_url": 3,
        "too_small": 1,
    }
    table = next(table for table in counted.tables() if table.title == "By stage")
    assert [row[:2] + row[3:4] for row in table.rows] == [("1. files, sizes, duplicates", 3, 3), ("3. captions", 1, 2)]
