"""A catalog says of every kept row what the parts say, and refuses parts that contradict each other."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_dataset import FakeProducer, bucket_of, facets_for, make_rows, num_tokens

from qwenimg_dist.data.catalog import Catalog
from qwenimg_dist.data.catalog_build import build_catalog
from qwenimg_dist.data.catalogs import CatalogFolder, Catalogs
from qwenimg_dist.data.facets import DataError, Dataset, Part, Tar
from qwenimg_dist.data.part_tables import caption_keys, load_facets
from qwenimg_dist.data.pins import digest_of, pin_from_json, pin_to_json, ready_units
from qwenimg_dist.data.where import compile_where
from qwenimg_dist.schema import (
    LATENTS_COLUMNS,
    LISTING,
    LISTING_COLUMNS,
    ROWS,
    ROWS_COLUMNS,
    SCAN,
    SCAN_COLUMNS,
    TEXT_COLUMNS,
    caption_key,
    row_key,
)

SIZES = ((256, 256), (64, 30), (40, 90), (20, 20))


def build(producer: FakeProducer, folder: Path) -> Catalog:
    units = ready_units(producer.dataset, producer.facets)
    built = build_catalog(producer.dataset, units, producer.facets, folder)
    catalog = Catalog.open(folder, producer.dataset.root)
    assert (built.num_rows, built.num_texts) == (catalog.num_rows, catalog.num_texts)
    return catalog


def captions_of(catalog: Catalog, row: int) -> list[str]:
    part = slice(int(catalog.caption_start[row]), int(catalog.caption_start[row + 1]))
    return [catalog.text_keys[text].decode() for text in catalog.caption_text[part]]


def test_every_kept_row_is_there_as_the_parts_say(tmp_path: Path) -> None:
    producer = FakeProducer(tmp_path / "data", unit_size=5, resolutions=(32, 64), max_shard_bytes=4000)
    rows = make_rows(23, captions=2, sizes=SIZES)
    rows[3] = type(rows[3])(uri=rows[3].uri, captions=rows[3].captions, status="rejected")
    producer.add(rows)
    producer.produce()
    catalog = build(producer, tmp_path / "index")
    kept = [(number, row) for number, row in enumerate(rows) if row.status == "kept"]
    assert catalog.rows.tolist() == [number for number, _ in kept]
    assert [key.decode() for key in catalog.keys] == [row.key for _, row in kept]
    assert catalog.units.tolist() == [number // 5 for number, _ in kept]
    for position, (number, row) in enumerate(kept):
        assert captions_of(catalog, position) == [caption_key(caption) for caption in row.captions]
        text = catalog.caption_text[catalog.caption_start[position]]
        assert catalog.text_tokens[text] == num_tokens(row.captions[0])
        assert f"unit-{number // 5:06d}" in catalog.tars[catalog.text_tar[text]].path.name  # its own unit's features
        for resolution, index in catalog.latents.items():
            expected = bucket_of(row, resolution)
            code = int(index.bucket[position])
            assert (index.buckets[code] if code >= 0 else None) == expected
            assert (index.tar[position] >= 0) == (expected is not None)
    assert catalog.text_keys[catalog.empty_text].decode() == caption_key("")
    columns = catalog.columns
    assert columns["aspect"].tolist() == [row.width / row.height for _, row in kept]
    assert columns["bytes"].tolist() == [1000 + number for number, _ in kept]
    mask = compile_where("sharpness < 0.55 and format == 'PNG' and status == 'kept'").mask(columns, catalog.num_rows)
    assert catalog.rows[mask].tolist() == [0, 1, 2, 4, 5]
    assert all(tar.path.stat().st_size == tar.size_bytes for tar in catalog.tars)


def test_later_parts_supersede_and_add(tmp_path: Path) -> None:
    producer = FakeProducer(tmp_path / "data", unit_size=4, resolutions=(32,))
    producer.add(make_rows(8))
    producer.produce()
    before = build(producer, tmp_path / "before")
    producer.recaption(5, ("quite another caption", "and a second one"))
    producer.facets = facets_for((32, 64))
    producer.produce()
    after = build(producer, tmp_path / "after")
    assert captions_of(after, 5) == [caption_key("quite another caption"), caption_key("and a second one")]
    assert captions_of(after, 4) == captions_of(before, 4)
    assert sorted(after.latents) == [32, 64]
    assert (after.latents[64].bucket >= 0).all()
    assert after.digest != before.digest
    assert len(before.latents) == 1


def test_a_unit_without_kept_rows_and_a_resolution_without_samples_are_fine(tmp_path: Path) -> None:
    producer = FakeProducer(tmp_path / "data", unit_size=2, resolutions=(32, 512))
    rows = make_rows(4)
    producer.add([type(row)(uri=row.uri, captions=row.captions, status="fault") for row in rows[:2]] + rows[2:])
    producer.produce()
    catalog = build(producer, tmp_path / "index")
    assert catalog.rows.tolist() == [2, 3]
    assert (catalog.latents[512].bucket == -1).all()
    assert catalog.latents[512].buckets == ()


def test_a_catalog_built_again_is_the_same_and_replaces_a_leftover(tmp_path: Path) -> None:
    producer = FakeProducer(tmp_path / "data", unit_size=4)
    producer.add(make_rows(8))
    producer.produce()
    first = build(producer, tmp_path / "index")
    contents = {file.name: file.read_bytes() for file in (tmp_path / "index").iterdir()}
    (tmp_path / "index" / "keys.npy").write_bytes(b"torn")
    with pytest.raises(DataError, match="damaged"):
        Catalog.open(tmp_path / "index", producer.dataset.root)
    assert build(producer, tmp_path / "index").digest == first.digest
    assert {file.name: file.read_bytes() for file in (tmp_path / "index").iterdir()} == contents
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".tmp")]


def test_positions_run_through_several_catalogs(tmp_path: Path) -> None:
    producers = [FakeProducer(tmp_path / f"data-{n}", unit_size=4) for n in range(2)]
    catalogs = Catalogs(producers[0].dataset.root)
    for number, producer in enumerate(producers):
        producer.add(make_rows(6, start=6 * number))
        producer.produce()
        catalog = build(producer, tmp_path / f"index-{number}")
        folder = CatalogFolder(
            folder=tmp_path / f"index-{number}", num_rows=catalog.num_rows, num_texts=catalog.num_texts
        )
        assert catalogs.add(folder) == number
        assert catalogs.add(folder) == number
    rows = np.array([11, 0, 6, 5])
    assert catalogs.keys(rows) == [row_key(f"pictures/{n:06d}.png") for n in (11, 0, 6, 5)]
    second = catalogs[1].text_tokens
    assert catalogs.text_tokens(np.array([catalogs.text_base(1) + 2, 0])).tolist()[0] == second[2]


def test_pins_round_trip_and_their_digest_does_not_depend_on_their_order() -> None:
    pins = [pin_from_json(["rows", 3, 1, "ab"]), pin_from_json(["listing", 3, 0, "cd"])]
    assert [pin_from_json(pin_to_json(pin)) for pin in pins] == pins
    assert digest_of(pins) == digest_of(pins[::-1]) != digest_of(pins[:1])


def commit(dataset: Dataset, facet: str, records: list[dict[str, object]], schema: pa.Schema, **extra: object) -> None:
    part = dataset.next_part(facet, 0)
    tars = [Tar(name=name, sha256="0", size_bytes=100) for name in extra.pop("tars", [])]  # type: ignore[attr-defined]
    for tar in tars:
        (dataset.root / facet).mkdir(exist_ok=True)
        (dataset.root / facet / tar.name).write_bytes(b"0" * 100)
    table = pa.Table.from_pylist(records, schema=schema)
    assert dataset.commit(part, table, config_hash="", tars=tars, extra=extra)


def tiny_parts(root: Path, change: str) -> FakeProducer:
    """One row, written by hand, with one contradiction."""
    producer = FakeProducer(root, unit_size=4)
    dataset, text, latents = producer.dataset, producer.facets.text, producer.facets.latents[32]
    place = {"tar": "a.tar", "offset": 0, "nbytes": 64, "dtype": "bfloat16"}
    captions = [] if change == "no caption" else ["a"]
    listed = [] if change == "not listed" else [{"row": 0, "key": "k", "uri": "u", "captions": captions}]
    commit(dataset, LISTING, listed, LISTING_COLUMNS)
    commit(dataset, SCAN, [{"row": 0}], SCAN_COLUMNS)
    texts = [{"key": caption_key(""), "num_tokens": 4, **place, "shape": [4, 8]}]
    if change != "no features":
        texts.append({"key": caption_key("a"), "num_tokens": 4, **place, "shape": [4, 8]})
    if change == "no empty prompt":
        texts = texts[1:]
    if change == "num_tokens":
        texts[-1]["num_tokens"] = 5
    if change == "outside":
        texts[-1]["offset"] = 50
    if change == "nbytes":
        texts[-1]["nbytes"] = 63
    if change == "dtype":
        texts[-1]["dtype"] = "uint8"
    if change == "tar":
        texts[-1]["tar"] = "b.tar"
    commit(dataset, text, texts, TEXT_COLUMNS, tars=["a.tar"])
    shape = [2, 4, 4]
    latent = {"row": 0, "key": "k", "bucket_height": 32, "bucket_width": 32, **place, "shape": shape}
    if change == "bucket":
        latent["bucket_width"] = 16
    commit(dataset, latents, [latent], LATENTS_COLUMNS, tars=["a.tar"])
    inputs = {LISTING: 1, SCAN: 1, text: 1, latents: 1}
    row = {"row": 0, "key": "k", "status": "kept", "reason": "", "detail": "", "width": 32, "height": 32}
    commit(dataset, ROWS, [row], ROWS_COLUMNS, inputs=inputs)
    return producer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no caption", "row k is kept without a caption"),
        ("not listed", "row 0 is kept but not in the listing"),
        ("no features", f"caption {caption_key('a')} of row k (unit 0) has no features in text-"),
        ("no empty prompt", "no features of the empty prompt"),
        ("num_tokens", f"key {caption_key('a')}: num_tokens differs"),
        ("outside", "lies outside its tar"),
        ("nbytes", "nbytes is not what the shape needs"),
        ("dtype", "tensors of type bfloat16, uint8"),
        ("tar", "its tar is not among the tars"),
        ("bucket", "latents-32-0123456789ab, unit 0, key k: the latents' shape is not their bucket's"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, change: str, message: str) -> None:
    producer = tiny_parts(tmp_path / "data", change)
    with pytest.raises(DataError) as caught:
        build(producer, tmp_path / "index")
    assert message in str(caught.value)
    assert not (tmp_path / "index").exists()


def test_the_hand_written_parts_are_otherwise_sound(tmp_path: Path) -> None:
    assert build(tiny_parts(tmp_path / "data", ""), tmp_path / "index").num_rows == 1


def test_no_column_ends_at_two_gib(tmp_path: Path) -> None:
    """Captions themselves are never put one below the other, and the rest has 64-bit offsets."""
    producer = FakeProducer(tmp_path / "data", unit_size=4)
    rows = make_rows(6, captions=2)
    producer.add(rows)
    producer.produce()
    loaded = load_facets(producer.dataset, ready_units(producer.dataset, producer.facets))
    limited = {pa.string(), pa.list_(pa.string()), pa.large_list(pa.string())}
    assert not [field for facet in loaded.values() for field in facet.table.schema if field.type in limited]
    keys = loaded[LISTING].table["caption_keys"].to_pylist()
    assert keys == [[caption_key(caption) for caption in row.captions] for row in rows]
    lists = pa.chunked_array([pa.array([["a", "b"], None, []], pa.list_(pa.string())), pa.array([["c"]])])
    assert caption_keys(lists).to_pylist() == [[caption_key("a"), caption_key("b")], [], [], [caption_key("c")]]


def test_ten_thousand_rows_take_a_moment(tmp_path: Path) -> None:
    """A million rows must build in well under a minute; here a hundredth of them, in units of the default size."""
    producer = FakeProducer(tmp_path / "data", unit_size=512)
    dataset, facets, num = producer.dataset, producer.facets, 10_240
    place = {"tar": "a.tar", "offset": 0, "nbytes": 64, "dtype": "bfloat16"}
    size = {"bucket_height": 32, "bucket_width": 32, "shape": [2, 4, 4], **place}
    keys = [row_key(str(number)) for number in range(num)]
    for unit in range(num // 512):
        numbers = range(512 * unit, 512 * unit + 512)
        captions = ["", *(f"c {n}" for n in numbers)]
        tables: dict[str, tuple[pa.Schema, list[dict[str, object]]]] = {
            LISTING: (LISTING_COLUMNS, [{"row": n, "key": keys[n], "captions": [f"c {n}"]} for n in numbers]),
            SCAN: (SCAN_COLUMNS, [{"row": n, "bytes": 1, "format": "PNG"} for n in numbers]),
            facets.text: (
                TEXT_COLUMNS,
                [{"key": caption_key(c), "num_tokens": 4, **place, "shape": [4, 8]} for c in captions],
            ),
            facets.latents[32]: (LATENTS_COLUMNS, [{"row": n, "key": keys[n], **size} for n in numbers]),
            ROWS: (
                ROWS_COLUMNS,
                [{"row": n, "key": keys[n], "status": "kept", "width": 32, "height": 32} for n in numbers],
            ),
        }
        for facet, (schema, records) in tables.items():
            folder = dataset.root / facet
            folder.mkdir(exist_ok=True)
            tars = []
            if "-" in facet:
                (folder / "a.tar").write_bytes(b"0" * 100)
                tars = [Tar(name="a.tar", sha256="0", size_bytes=100)]
            inputs = {LISTING: 1, SCAN: 1, facets.text: 1, facets.latents[32]: 1}
            table = pa.Table.from_pylist(records, schema=schema)
            part = Part(facet=facet, unit=unit, part=0)
            dataset.commit(part, table, config_hash="", tars=tars, extra={"inputs": inputs})
    begin = time.process_time()
    build(producer, tmp_path / "index")
    assert time.process_time() - begin < 1.5
    begin = time.process_time()
    assert Catalog.open(tmp_path / "index", dataset.root).num_rows == num
    assert time.process_time() - begin < 0.2


def test_kinds_are_a_column_and_others_than_the_run_s_are_refused(tmp_path: Path) -> None:
    producer = FakeProducer(tmp_path / "data", resolutions=(32,))
    producer.add(make_rows(3))
    producer.produce()
    catalog = build(producer, tmp_path / "index")
    assert compile_where("kind == 'image'").mask(catalog.columns, 3).all()
    for part in producer.dataset.parts(LISTING):
        file = producer.dataset.parquet(part)
        table = pq.read_table(file)
        kinds = pa.array(["preference"] * len(table), pa.string())
        pq.write_table(table.set_column(table.column_names.index("kind"), "kind", kinds), file)
    with pytest.raises(DataError, match="holds samples of kind preference, this run trains on kind image: give it"):
        build(producer, tmp_path / "again")
    units = ready_units(producer.dataset, producer.facets)
    facets = replace(producer.facets, kind="preference")
    built = build_catalog(producer.dataset, units, facets, tmp_path / "pairs")
    assert built.num_rows == 3
