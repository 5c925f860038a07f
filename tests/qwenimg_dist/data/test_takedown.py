"""Rows that are taken down are in no later generation; recorded generations are repeated as they were."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from fake_dataset import FakeProducer, make_rows

from qwenimg_dist.data.facets import DataError, Dataset, Part
from qwenimg_dist.data.generation_log import FILE, read_lines
from qwenimg_dist.data.generations import Generations
from qwenimg_dist.data.ledger_config import LedgerConfig
from qwenimg_dist.data.phases import PlannedPhase
from qwenimg_dist.data.pins import UnitPins
from qwenimg_dist.data.takedown import Takedown, read_takedown, rows_taken_down
from qwenimg_dist.schema import LISTING, LISTING_COLUMNS, SCAN, SCAN_COLUMNS


def config(takedown: Path | None, held_out: float = 0.0) -> LedgerConfig:
    phase = PlannedPhase(
        index=0,
        first_step=0,
        last_step=1000,
        weights={32: 1.0},
        global_batch=2,
        micro_batch_tokens=100,
        lr_scale=1.0,
        where=None,
    )
    return LedgerConfig(
        phases=(phase,),
        seed=0,
        caption_dropout=0.0,
        where=None,
        held_out=held_out,
        max_held_out=4,
        takedown=str(takedown) if takedown else None,
    )


def open_run(
    run: Path, producer: FakeProducer, settings: LedgerConfig, *, follow: bool = False, early_steps: int = 0
) -> Generations:
    generations = Generations(run, producer.dataset, producer.facets, settings, follow=follow, early_steps=early_steps)
    generations.verify()
    return generations


def keys_of(generations: Generations, steps: range) -> list[str]:
    found: list[str] = []
    for step in steps:
        if generations.advance(step) == "wait":
            break
        found += generations.ledger.catalogs.keys(generations.ledger.batch(step).rows)
    return found


@pytest.fixture
def producer(tmp_path: Path) -> FakeProducer:
    made = FakeProducer(tmp_path / "data")
    made.add(make_rows(12))
    made.produce()
    return made


def test_uris_keys_and_sha256_take_rows_down_without_rewriting_anything(tmp_path: Path, producer: FakeProducer) -> None:
    rows = producer.rows
    before = {file: file.stat().st_mtime_ns for file in producer.dataset.root.rglob("*") if file.is_file()}
    takedown = tmp_path / "takedown.txt"
    sha256 = producer.dataset.read_unit("scan", 1, ["row", "sha256"]).to_pylist()[1]["sha256"]  # type: ignore[union-attr]
    takedown.write_text(f"# asked for\n\n{rows[0].uri}\n  {rows[3].key} \n{sha256}\nnot/here.png\n")
    for held_out in (0.0, 1.0):
        generations = open_run(tmp_path / f"run-{held_out}", producer, config(takedown, held_out))
        if held_out:
            (tmp_path / "run-1.0").mkdir()
            assert generations.advance(0) == "ready"
        kept = set(keys_of(generations, range(6)))
        out = {rows[0].key, rows[3].key, rows[5].key}
        held = {key for bucket in generations.held_out(32, 9) for key in generations.ledger.catalogs.keys(bucket.rows)}
        assert not (kept | held) & out
        note = generations.takedown_matches_nothing or ""
        assert note.startswith("1 of 4 entries of data.takedown name no row of the data so far (not/here.png): ")
        assert kept | held == {row.key for row in rows} - out
    assert before == {file: file.stat().st_mtime_ns for file in producer.dataset.root.rglob("*") if file.is_file()}


def test_a_settled_run_repeats_its_generation_and_says_that_later_rows_stay(
    tmp_path: Path, producer: FakeProducer
) -> None:
    takedown, run = tmp_path / "takedown.txt", tmp_path / "run"
    takedown.write_text(producer.rows[0].uri)
    first = open_run(run, producer, config(takedown))
    order = keys_of(first, range(12))
    assert first.not_yet_taken_down is None
    assert first.takedown_matches_nothing is None
    takedown.write_text(f"{producer.rows[0].uri}\n{producer.rows[1].uri}")
    shutil.rmtree(run / "index")  # made again by the recorded list, not by the newer one
    resumed = open_run(run, producer, config(takedown))
    assert keys_of(resumed, range(12)) == order
    assert producer.rows[1].key in order
    assert "stay in it" in (resumed.not_yet_taken_down or "")
    with pytest.raises(DataError, match=r"left rows out by a takedown list.*set data.takedown again"):
        open_run(run, producer, config(None))
    fresh = keys_of(open_run(tmp_path / "other", producer, config(takedown)), range(12))
    assert not {producer.rows[0].key, producer.rows[1].key} & set(fresh)


@pytest.mark.parametrize("early_steps", [0, 16])
def test_with_follow_rows_leave_with_the_next_generation(
    tmp_path: Path, producer: FakeProducer, early_steps: int
) -> None:
    producer.complete()
    takedown, run = tmp_path / "takedown.txt", tmp_path / "run"
    takedown.write_text("")
    generations = open_run(run, producer, config(takedown), follow=True, early_steps=early_steps)
    assert generations.advance(0) == "ready"
    if early_steps:  # the next one was made ahead of need, with the list as it was
        assert generations._early._look is not None
        assert generations._early._look.result()
    else:
        assert len(set(keys_of(generations, range(6)))) == 12
    takedown.write_text(producer.rows[4].key)
    assert "from the next generation on" in (generations.not_yet_taken_down or "")
    assert len(set(keys_of(generations, range(6)))) == 12
    assert set(keys_of(generations, range(6, 12))) == {row.key for row in producer.rows} - {producer.rows[4].key}
    assert [bool(line.takedown) for line in read_lines(run / FILE)[0]] == [False, True]
    generations.close()
    shutil.rmtree(run / "index")
    (copy,) = (run / "takedown").iterdir()
    again = open_run(run, producer, config(takedown), follow=True)
    assert producer.rows[4].key in keys_of(again, range(6))
    assert producer.rows[4].key not in keys_of(again, range(6, 12))
    shutil.rmtree(run / "index")
    copy.write_text("[]")
    with pytest.raises(DataError, match="is gone or damaged"):
        open_run(run, producer, config(takedown), follow=True)


def test_a_row_goes_with_any_of_its_pictures(tmp_path: Path) -> None:
    dataset = Dataset.create(tmp_path / "data", 8)
    listing = [
        {"row": 0, "key": "k0", "uri": "a.png", "others": ["b.png"]},
        {"row": 1, "key": "k1", "uri": "c.png", "others": None},
        {"row": 2, "key": "k2", "uri": "d.png", "others": ["e.png", "f.png"]},
        {"row": 3, "key": "k3", "uri": "g.png", "others": []},
    ]
    scan = [{"row": n, "sha256": f"s{n}", "others": [{"sha256": f"o{n}"}] if n % 2 == 0 else None} for n in range(4)]
    for facet, columns, rows in ((LISTING, LISTING_COLUMNS, listing), (SCAN, SCAN_COLUMNS, scan)):
        table = pa.Table.from_pylist(rows, schema=columns)
        dataset.commit(Part(facet=facet, unit=0, part=0), table, config_hash="")
    units = [UnitPins(unit=0, rows_parts=1, inputs={LISTING: 1, SCAN: 1})]
    for entries, expected in ((("f.png",), [2]), (("b.png", "k1"), [0, 1]), (("o2", "s3"), [2, 3]), (("x",), [])):
        assert rows_taken_down(dataset, units, Takedown(entries=entries)).rows.tolist() == expected


def test_a_picture_in_a_tar_stays_taken_down_when_its_tar_is_written_anew(tmp_path: Path) -> None:
    dataset = Dataset.create(tmp_path / "data", 8)
    listed = [
        [(0, "tar:a.tar#0.jpg@512+9", ["tar:a.tar#0b.jpg@1536+9"]), (1, "tar:a.tar#1.jpg@2560+9", None)],
        [(0, "tar:a.tar#0.jpg@1024+9", ["tar:a.tar#0b.jpg@2048+9"])],  # shifted
        [(2, "mail@12+34", None), (3, "tar:a@1+2.tar#x@3+4.jpg@99+9", None)],
    ]
    for part, entries in enumerate(listed):
        rows = [{"row": row, "key": f"k{row}", "uri": uri, "others": others} for row, uri, others in entries]
        table = pa.Table.from_pylist(rows, schema=LISTING_COLUMNS)
        dataset.commit(Part(facet=LISTING, unit=0, part=part), table, config_hash="")
    units = [UnitPins(unit=0, rows_parts=1, inputs={LISTING: 3})]
    for entry, expected in (
        ("tar:a.tar#0.jpg@512+9", [0]),
        ("tar:a.tar#0.jpg@1024+9", [0]),
        ("tar:a.tar#0.jpg", [0]),
        ("tar:a.tar#0b.jpg@1536+9", [0]),
        ("tar:a.tar#1.jpg", [1]),
        ("mail@12+34", [2]),
        ("mail", []),
        ("tar:a@1+2.tar#x@3+4.jpg", [3]),
        ("tar:a@1+2.tar#x", []),
    ):
        assert rows_taken_down(dataset, units, Takedown(entries=(entry,))).rows.tolist() == expected, entry
    names = ("nothing", "tar:a.tar#0.jpg", "tar:a.tar#0.jpg@512+9", "tar:a.tar#0.jpg@9+9")
    assert rows_taken_down(dataset, units, Takedown(entries=names)).matched == (1, 2, 3)


def test_a_list_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00bad")
    for name in ("list.txt", "none.txt"):
        with pytest.raises(DataError, match=rf"data.takedown=.*{name} cannot be read"):
            read_takedown(tmp_path / name)
    assert read_takedown(None).digest == ""
    assert replace(read_takedown(None), entries=("a",)).digest != ""


def test_naming_a_copy_takes_the_kept_row_with_the_same_bytes_down_too(tmp_path: Path, producer: FakeProducer) -> None:
    """Row 7 is a copy of row 1, as the scan sees it."""
    dataset = producer.dataset
    scan = dataset.read_unit(SCAN, 0)
    assert scan is not None
    kept = scan.to_pylist()[1]
    unit = 7 // dataset.unit_size
    part = Part(facet=SCAN, unit=unit, part=0)
    rows = [
        {**entry, "sha256": kept["sha256"] if entry["row"] == 7 else entry["sha256"]}
        for entry in dataset.read(part).to_pylist()
    ]
    schema, meta = dataset.read(part).schema.remove_metadata(), dataset.meta(part)
    dataset.parquet(part).unlink()
    dataset.commit(part, pa.Table.from_pylist(rows, schema=schema), config_hash=meta["config_hash"])
    takedown = tmp_path / "takedown.txt"
    takedown.write_text(producer.rows[7].uri)
    pins = [UnitPins(unit=number, rows_parts=1, inputs={LISTING: 1, SCAN: 1}) for number in dataset.units(LISTING)]
    assert rows_taken_down(dataset, pins, read_takedown(takedown)).rows.tolist() == [1, 7]
