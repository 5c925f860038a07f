"""Preference pairs, edits and prompts through the whole unit pipeline, and what is refused on the way."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image
from producer_world import (
    FakeEncoders,
    caption_features,
    draw,
    edit_features,
    further,
    make_plan_for,
    produce_here,
    rows_of,
    tensor_at,
)
from safetensors.numpy import load as load_safetensors

from producers.listing import check_kind
from producers.load import render
from producers.pictures import area_size
from producers.sources.base import SourceRow
from producers.write import EditPrompt
from qwenimg_dist.commands.data_verify import Tally, problems
from qwenimg_dist.data.buckets import place
from qwenimg_dist.data.catalog import Catalog, RunFacets
from qwenimg_dist.data.catalog_build import build_catalog
from qwenimg_dist.data.facets import DataError, Dataset
from qwenimg_dist.data.pins import ready_units
from qwenimg_dist.schema import (
    EDIT,
    IMAGE,
    LISTING,
    PREFERENCE,
    ROWS,
    SCAN,
    caption_key,
    edit_caption_key,
    row_key,
)

PLAN = make_plan_for(resolutions=(64, 96))
PAIRS = ("source=pairs",)
EDITS = ("source=edits",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(8):
        draw(tmp_path / "source" / f"{number}.png", number, size_of(number)[::-1])
    return tmp_path / "source"


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset.create(tmp_path / "data", 4)


def write_lines(file: Path, *lines: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def size_of(number: int) -> tuple[int, int]:
    """(h, w) of picture `number`."""
    return 160, 180 + 40 * (number % 3)


def pair(prompt: str, chosen: int, rejected: int) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": f"{chosen}.png", "rejected": f"{rejected}.png"}


def decided(dataset: Dataset) -> dict[int, tuple[str, str]]:
    return {row: (one["reason"] or one["status"], one["detail"]) for row, one in rows_of(dataset, ROWS).items()}


def block_means(image: Image.Image) -> np.ndarray[Any, Any]:
    pixels = np.asarray(image, dtype=np.float32)
    return pixels.reshape(image.height // 8, 8, image.width // 8, 8, 3).mean(axis=(1, 3, 4))


def sound(dataset: Dataset) -> bool:
    return not list(problems(dataset, Tally()))


def test_both_pictures_of_a_pair_lie_in_the_chosen_one_s_bucket(folder: Path, dataset: Dataset) -> None:
    lines = write_lines(folder / "pairs.jsonl", pair("a", 0, 1), pair("b", 2, 3), pair("c", 4, 2))
    encoders = FakeEncoders()
    produce_here(lines, dataset, PLAN, encoders, *PAIRS)
    assert decided(dataset) == dict.fromkeys(range(3), ("kept", ""))
    assert encoders.num_pictures == 2 * 2 * 3
    for resolution, facet in PLAN.latents_facets.items():
        for row, (chosen, rejected) in enumerate([(0, 1), (2, 3), (4, 2)]):
            entry = rows_of(dataset, facet)[row]
            own = PLAN.placements(*size_of(chosen))[resolution]
            other = place(*size_of(rejected), (own.bucket,), upscale=False)
            assert other is not None
            assert (entry["bucket_height"], entry["bucket_width"]) == (own.bucket.height, own.bucket.width)
            for at, number, placement in ((entry, chosen, own), (further(entry)["rejected"], rejected, other)):
                with Image.open(folder / f"{number}.png") as image:
                    expected = block_means(Image.fromarray(render(image, placement)))
                assert at["shape"] == [16, own.bucket.height // 8, own.bucket.width // 8]
                assert np.allclose(tensor_at(dataset, facet, at)[3], expected, atol=0.01)
    assert {key for _, key in rows_of(dataset, PLAN.text_facet)} == {caption_key(text) for text in ("", *"abc")}
    assert sound(dataset)
    assert produce_here(lines, dataset, PLAN, FakeEncoders(), *PAIRS) == []


def test_every_tar_reads_with_stock_webdataset(folder: Path, dataset: Dataset) -> None:
    lines = write_lines(folder / "pairs.jsonl", pair("a", 0, 1), pair("b", 2, 3))
    produce_here(lines, dataset, PLAN, FakeEncoders(), *PAIRS)
    facet = PLAN.latents_facets[64]
    tars = [str(file) for file in sorted((dataset.root / facet).glob("*.tar"))]
    samples = list(wds.WebDataset(tars, shardshuffle=False, empty_check=False))
    entry = rows_of(dataset, facet)[0]
    assert sorted(sample["__key__"] for sample in samples) == sorted(
        one["key"] for one in rows_of(dataset, facet).values()
    )
    sample = next(sample for sample in samples if sample["__key__"] == entry["key"])
    tensors = load_safetensors(sample["safetensors"])
    assert sorted(tensors) == ["mean", "rejected"]
    assert np.array_equal(tensors["rejected"], tensor_at(dataset, facet, further(entry)["rejected"]))
    info = json.loads(sample["json"])
    assert (info["kind"], info["further"]["rejected"]["uri"]) == (PREFERENCE, "1.png")
    assert info["further"]["rejected"]["bucket"] == info["bucket"]


def test_a_fault_in_either_picture_faults_the_pair_and_names_it(folder: Path, dataset: Dataset) -> None:
    (folder / "1.png").unlink()
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:-300])
    (folder / "5.png").write_text("no picture")
    draw(folder / "7.png", 7, (70, 70))
    lines = write_lines(
        folder / "pairs.jsonl",
        *[pair("gone", 0, 1), pair("cut", 2, 3), pair("text", 5, 4), pair("", 0, 2), pair("small", 2, 7)],
    )
    produce_here(lines, dataset, make_plan_for(resolutions=(96,)), FakeEncoders(), *PAIRS)
    found = decided(dataset)
    assert found[0] == ("missing_file", "rejected: the source names it, but it is not there")
    assert found[1][0] in ("truncated", "decode_error")
    assert found[1][1].startswith("rejected: PNG")
    assert found[2][0] == "not_an_image"
    assert found[2][1].startswith("chosen: ")
    assert found[3][0] == "no_caption"
    assert found[4] == ("too_small", "rejected: 70x70 is smaller than the chosen one's bucket at 96 px")
    draw(folder / "1.png", 1, size_of(1)[::-1])
    produce_here(lines, dataset, make_plan_for(resolutions=(96,)), FakeEncoders(), *PAIRS)
    assert decided(dataset)[0] == ("kept", "")
    shutil.copy(folder / "6.png", folder / "1.png")
    produce_here(lines, dataset, PLAN, FakeEncoders(), *PAIRS)
    # What was encoded of the bytes that were scanned stays; another class of them cannot be made any more.
    status, detail = decided(dataset)[0]
    assert status == "kept"
    assert detail.startswith("changed_file: rejected: not the bytes that were scanned")


def test_pairs_are_duplicates_only_as_a_whole(folder: Path, dataset: Dataset) -> None:
    for copy, original in (("8", "0"), ("9", "1")):
        shutil.copy(folder / f"{original}.png", folder / f"{copy}.png")
    rows = [pair("a", 0, 1), pair("b", 0, 1), pair("a", 0, 2), pair("a", 1, 0), pair("a", 8, 9)]
    lines = write_lines(folder / "pairs.jsonl", *rows)
    produce_here(lines, dataset, PLAN, FakeEncoders(), *PAIRS)
    assert [reason for reason, _ in decided(dataset).values()] == ["kept"] * 4 + ["duplicate"]
    assert decided(dataset)[4][1] == "same pictures, and text where it counts, as row 0"
    write_lines(folder / "pairs.jsonl", *rows, {**pair("a", 8, 1)})
    produce_here(lines, dataset, PLAN, FakeEncoders(), *PAIRS)  # the index is read anew from what was settled
    assert decided(dataset)[5][0] == "duplicate"


def test_keys_of_images_stay_and_those_of_other_kinds_follow_from_all_that_tells_rows_apart() -> None:
    def key(*uris: str, kind: Any = PREFERENCE, text: str = "a") -> str:
        return row_key(SourceRow(kind=kind, uri=uris[0], others=uris[1:], captions=(text,)).identity)

    assert key("b.png", kind=IMAGE, text="x") == row_key("b.png") == key("b.png", kind=IMAGE)
    pairs = [
        key("b", "c"),
        key("c", "b"),
        key("b", "d"),
        key("b", "c", text="z"),
        key("b", "c", kind="edit"),
        key("bc"),
    ]
    assert len(set(pairs)) == len(pairs)
    assert key("b", "c", kind="edit") == key("b", "c", kind="edit", text="other words")


def edit(sources: list[int], instruction: Any, target: int) -> dict[str, Any]:
    return {"source": [f"{one}.png" for one in sources], "instruction": instruction, "target": f"{target}.png"}


def seen(folder: Path, sources: list[int], side: int) -> tuple[np.ndarray[Any, Any], ...]:
    pictures = []
    for number in sources:
        with Image.open(folder / f"{number}.png") as image:
            height, width = area_size(image.height, image.width, side)
            pictures.append(np.asarray(image.resize((width, height), Image.Resampling.LANCZOS)))
    return tuple(pictures)


def test_an_edit_has_its_target_its_conditions_and_texts_that_saw_them(folder: Path, dataset: Dataset) -> None:
    rows = [
        edit([1], "make it red", 0),
        edit([2, 3], ["join them", "put them together"], 4),
        edit([1], "make it red", 5),
    ]
    lines = write_lines(folder / "edits.jsonl", *rows)
    encoders = FakeEncoders()
    produce_here(lines, dataset, PLAN, encoders, *EDITS)
    assert [reason for reason, _ in decided(dataset).values()] == ["kept"] * 3
    assert encoders.num_captions == 1 + 2 + 3  # the empty prompt; texts of row 2 are those of row 0
    scans = rows_of(dataset, SCAN)
    texts = {key: entry for (_, key), entry in rows_of(dataset, PLAN.text_facet).items()}
    for row, sources, words in ((0, [1], ["make it red"]), (1, [2, 3], ["join them", "put them together"])):
        pictures = seen(folder, sources, PLAN.edit.vision_side)
        for text in ("", *words):
            at = texts[edit_caption_key(text, [one["sha256"] for one in scans[row]["others"]])]
            expected = edit_features(EditPrompt(text=text, pictures=pictures))
            assert np.allclose(tensor_at(dataset, PLAN.text_facet, at), expected)
    for resolution, facet in PLAN.latents_facets.items():
        entry = rows_of(dataset, facet)[1]
        assert list(further(entry)) == ["condition_0", "condition_1"]
        for at, picture in zip(further(entry).values(), seen(folder, [2, 3], resolution), strict=True):
            assert picture.shape[0] % 32 == picture.shape[1] % 32 == 0
            assert np.allclose(tensor_at(dataset, facet, at)[0], block_means(Image.fromarray(picture)), atol=0.01)
    assert sound(dataset)
    assert produce_here(lines, dataset, PLAN, FakeEncoders(), *EDITS) == []


def test_another_instruction_encodes_text_alone_and_verify_misses_it_if_it_is_not_there(
    folder: Path, dataset: Dataset
) -> None:
    lines = write_lines(folder / "edits.jsonl", edit([1], "first", 0), edit([2], "other", 3))
    produce_here(lines, dataset, PLAN, FakeEncoders(), *EDITS)
    write_lines(lines, edit([1], ["first", "second"], 0), edit([2], "other", 3))
    encoders = FakeEncoders()
    produce_here(lines, dataset, PLAN, encoders, *EDITS)
    assert (encoders.num_pictures, encoders.num_captions) == (0, 1)
    assert sound(dataset)
    newest = dataset.unit_parts(PLAN.text_facet, 0)[-1]
    dataset.parquet(newest).unlink()
    assert any("instructions of kept edits" in problem.what for problem in problems(dataset, Tally()))


def test_reconstruction_is_an_edit_without_words(folder: Path, dataset: Dataset, tmp_path: Path) -> None:
    """Whatever its table says; caption filters have nothing to judge, and training gives it the empty instruction."""
    words = (*EDITS, "source.instruction=''", "source.source_columns=[target]", "filters.caption_length.enabled=true")
    plan = make_plan_for(*words, resolutions=(64, 96))
    lines = write_lines(folder / "edits.jsonl", {"target": "0.png"}, {"target": "1.png", "instruction": "unread"})
    produce_here(lines, dataset, plan, FakeEncoders(), *words)
    assert [reason for reason, _ in decided(dataset).values()] == ["kept"] * 2
    assert sound(dataset)
    facets = RunFacets(text=plan.text_facet, latents=dict(plan.latents_facets), kind=EDIT)
    made = build_catalog(dataset, ready_units(dataset, facets), facets, tmp_path / "index")
    catalog = Catalog.open(made.folder, dataset.root)
    scans = rows_of(dataset, SCAN)
    for row in range(2):
        assert [one["sha256"] for one in scans[row]["others"]] == [scans[row]["sha256"]]
        (text,) = catalog.caption_text[catalog.caption_start[row] : catalog.caption_start[row + 1]]
        assert text == catalog.empty_texts(np.array([row]))[0]
        assert catalog.text_keys[text].decode() == edit_caption_key("", [scans[row]["sha256"]])


def test_a_condition_side_of_its_own_holds_for_every_class(folder: Path, dataset: Dataset) -> None:
    plan = make_plan_for("encode.edit.condition_side=128", resolutions=(64, 96))
    lines = write_lines(folder / "edits.jsonl", edit([1], "x", 0))
    produce_here(lines, dataset, plan, FakeEncoders(), *EDITS, "encode.edit.condition_side=128")
    height, width = area_size(*size_of(1), 128)
    assert (height, width) == (96, 160)
    for facet in plan.latents_facets.values():
        assert further(rows_of(dataset, facet)[0])["condition_0"]["shape"] == [16, height // 8, width // 8]


def test_the_template_for_one_picture_takes_no_edits_of_several(folder: Path, dataset: Dataset) -> None:
    words = ("encode.edit.template=single",)
    lines = write_lines(folder / "edits.jsonl", edit([1], "x", 0), edit([1, 2], "y", 3))
    produce_here(lines, dataset, make_plan_for(*words, resolutions=(64,)), FakeEncoders(), *EDITS, *words)
    assert [reason for reason, _ in decided(dataset).values()] == ["kept", "too_many_pictures"]


@pytest.mark.parametrize("form", ["txt", "jsonl"])
def test_prompts_have_text_alone(tmp_path: Path, dataset: Dataset, form: str) -> None:
    texts = ["one", "two words", "one", ""]
    file = tmp_path / f"prompts.{form}"
    if form == "txt":
        file.write_text("\n".join([*texts[:2], "", *texts[2:]]))
    else:
        write_lines(file, *({"prompt": text, "count": number} for number, text in enumerate(texts)))
    words = ("source=prompts", "source.meta_columns=[count]")
    encoders = FakeEncoders()
    produce_here(file, dataset, PLAN, encoders, *words)
    expected = ["kept", "kept", "duplicate", "no_caption"]
    assert [reason for reason, _ in decided(dataset).values()] == (expected[:3] if form == "txt" else expected)
    assert (encoders.num_pictures, encoders.num_captions) == (0, 3)
    if form == "jsonl":
        assert json.loads(rows_of(dataset, LISTING)[1]["meta"]) == {"count": 1}
    assert sound(dataset)
    assert produce_here(file, dataset, PLAN, FakeEncoders(), *words) == []


def test_a_data_set_holds_one_kind(folder: Path, dataset: Dataset) -> None:
    check_kind(dataset, IMAGE)
    produce_here(write_lines(folder / "pairs.jsonl", pair("a", 0, 1)), dataset, PLAN, FakeEncoders(), *PAIRS)
    check_kind(dataset, PREFERENCE)
    with pytest.raises(DataError, match="holds rows of kind preference, this source gives image: choose another"):
        check_kind(dataset, IMAGE)


def test_parts_from_before_there_were_kinds_are_images(folder: Path, dataset: Dataset) -> None:
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"caption {number}")
    for number in range(3, 8):
        (folder / f"{number}.png").unlink()
    produce_here(folder, dataset, PLAN, FakeEncoders())
    before = {facet: rows_of(dataset, facet) for facet in (LISTING, ROWS, PLAN.dedup.facet)}
    for facet, gone in (
        (LISTING, ["kind", "others", "meta"]),
        (SCAN, ["others"]),
        (PLAN.latents_facets[64], ["further"]),
    ):
        for part in dataset.parts(facet):
            table = pq.read_table(dataset.parquet(part))
            pq.write_table(table.drop_columns(gone), dataset.parquet(part))
    check_kind(dataset, IMAGE)
    assert produce_here(folder, dataset, PLAN, FakeEncoders()) == []
    draw(folder / "9.png", 1, size_of(1)[::-1], "late")  # a copy of 1.png
    produce_here(folder, dataset, make_plan_for(resolutions=(64, 96, 32)), FakeEncoders())
    assert {row: entry["key"] for row, entry in before[LISTING].items()}.items() <= {
        row: entry["key"] for row, entry in rows_of(dataset, LISTING).items()
    }.items()
    assert decided(dataset)[3] == ("duplicate", "same bytes as row 1")
    assert sound(dataset)


def png(number: int) -> bytes:
    rng = np.random.default_rng(number)
    sink = io.BytesIO()
    coarse = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
    coarse.resize((100, 100), Image.Resampling.BICUBIC).save(sink, "PNG")
    return sink.getvalue()


def test_pick_a_pic_with_bytes_in_its_columns(tmp_path: Path, dataset: Dataset) -> None:
    table = pa.table(
        {
            "caption": ["a", "b", "tie", "none", "e"],
            "jpg_0": [png(0), png(2), png(4), png(6), None],
            "jpg_1": [png(1), png(3), png(5), png(7), png(9)],
            "label_0": [1.0, 0.0, 0.5, None, 1.0],
            "label_1": [0.0, 1.0, 0.5, None, 0.0],
        }
    )
    (tmp_path / "parts").mkdir()
    pq.write_table(table, tmp_path / "parts" / "0.parquet", row_group_size=2)
    produce_here(tmp_path / "parts", dataset, PLAN, FakeEncoders(), *PAIRS)
    assert {row: reason for row, (reason, _) in decided(dataset).items()} == {0: "kept", 1: "kept", 2: "empty_file"}
    facet = PLAN.latents_facets[64]
    for row, (chosen, rejected) in ((0, (0, 1)), (1, (3, 2))):
        entry = rows_of(dataset, facet)[row]
        for at, number in ((entry, chosen), (further(entry)["rejected"], rejected)):
            with Image.open(io.BytesIO(png(number))) as image:
                expected = block_means(image.resize((64, 64), Image.Resampling.LANCZOS))
            assert np.allclose(tensor_at(dataset, facet, at)[0], expected, atol=0.01)
    assert np.allclose(caption_features("a"), tensor_at(dataset, PLAN.text_facet, text_of(dataset, "a")))


def text_of(dataset: Dataset, caption: str) -> dict[str, Any]:
    return rows_of(dataset, PLAN.text_facet)[0, caption_key(caption)]
