"""Pairs and edits from tables: what each layout gives, what is dropped and counted, and which row is to blame."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from producers.sources import open_source, parquet_cells, sample_kind
from producers.sources.base import Found, SourceGoneError, can_be_read, encode_uri, locate, read_bytes
from qwenimg_dist.config import EditsSource, PairsSource
from qwenimg_dist.schema import EDIT, IMAGE, PREFERENCE


def pairs(path: Path, **options: Any) -> Found:
    return open_source(PairsSource(kind="pairs", path=str(path), **options)).find()


def edits(path: Path, **options: Any) -> Found:
    return open_source(EditsSource(kind="edits", path=str(path), **options)).find()


def lines(file: Path, *entries: Any) -> Path:
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return file


def named(found: Found) -> list[tuple[str, tuple[str, ...], tuple[str, ...], str | None]]:
    return [(row.uri, row.others, row.captions, row.fault) for row in found.rows]


def test_both_layouts_give_chosen_and_rejected(tmp_path: Path) -> None:
    plain = lines(
        tmp_path / "plain.jsonl",
        {"prompt": " a ", "chosen": "x.png", "rejected": "y.png", "source": "people"},
        {"prompt": None, "chosen": "x.png", "rejected": "z.png"},
        {"prompt": ["two", "prompts"], "chosen": "x.png", "rejected": "z.png"},
    )
    assert named(pairs(plain)) == [
        ("x.png", ("y.png",), ("a",), None),
        ("x.png", ("z.png",), (), "no_caption"),
        ("x.png", ("z.png",), (), "bad_caption"),
    ]
    metas = [row.meta for row in pairs(plain, meta_columns=("source",)).rows]
    assert metas == ['{"source": "people"}', '{"source": null}', '{"source": null}']
    assert all(row.kind == PREFERENCE for row in pairs(plain).rows)
    labelled = [("a", 1, 0), ("b", 0.0, 1.0), ("tie", 0.5, 0.5), ("none", None, 1), ("nan", float("nan"), 0.0)]
    table = lines(
        tmp_path / "labels.jsonl",
        *[{"caption": c, "jpg_0": "0", "jpg_1": "1", "label_0": x, "label_1": y} for c, x, y in labelled],
    )
    found = pairs(table)
    assert named(found) == [("0", ("1",), ("a",), None), ("1", ("0",), ("b",), None)]
    assert found.dropped == {"ties": 1, "pairs without labels": 2}
    other = lines(tmp_path / "o.jsonl", {"text": "t", "best": "b", "worst": "w", "label_0": 3, "label_1": 1})
    chosen = pairs(other, layout="chosen", prompt_column="text", picture_columns=("worst", "best"))
    assert named(chosen) == [("w", ("b",), ("t",), None)]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"prompt": "a", "chosen": "x.png"}, r"line 2: has no picture in 'rejected' \(there is: prompt, chosen\)"),
        ({"prompt": "a", "chosen": "", "rejected": "y"}, "line 2: has no picture in 'chosen'"),
        ({"prompt": "a", "chosen": ["x", "y"], "rejected": "y"}, "line 2: 'chosen' names 2 pictures, one is wanted"),
        ({"prompt": "a", "chosen": 3, "rejected": "y"}, "line 2: has no picture in 'chosen'"),
        ([1], "line 2: is not a JSON object"),
    ],
)
def test_a_pair_that_is_none_costs_itself_alone(tmp_path: Path, entry: Any, message: str) -> None:
    table = lines(tmp_path / "t.jsonl", {"prompt": "a", "chosen": "x", "rejected": "y"}, entry)
    found = pairs(table)
    assert re.search(message, found.problems[0])
    good, bad = found.rows
    assert (good.fault, bad.fault, bad.kind) == (None, "bad_row", PREFERENCE)
    assert bad.uri.startswith("line:t.jsonl#")


def test_tables_that_give_no_pair_say_why(tmp_path: Path) -> None:
    tie = {"caption": "c", "jpg_0": "0", "jpg_1": "1", "label_0": 1, "label_1": 1}
    with pytest.raises(ValueError, match=r"gives no pair \(1 ties\); is source\.path right\?"):
        pairs(lines(tmp_path / "ties.jsonl", tie))
    with pytest.raises(ValueError, match="line 1: labels \\['x', 1\\] are no numbers"):
        pairs(lines(tmp_path / "words.jsonl", {**tie, "label_0": "x"}))
    with pytest.raises(ValueError, match=r"none of its 1 pairs has a prompt in 'prompt'; set source\.prompt_column"):
        pairs(lines(tmp_path / "mute.jsonl", {"chosen": "0", "rejected": "1"}))
    with pytest.raises(ValueError, match="neither a folder nor a"):
        pairs(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.jsonl or \.parquet file"):
        pairs(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"source\.path is not set"):
        open_source(PairsSource(kind="pairs"))
    pq.write_table(pa.table({"caption": ["a"], "chosen": ["x"]}), tmp_path / "short.parquet")
    with pytest.raises(ValueError, match="has no column rejected; there is: caption, chosen"):
        pairs(tmp_path / "short.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"torn\.parquet cannot be read as parquet"):
        pairs(tmp_path / "torn.parquet")


def test_edits_with_one_or_several_sources_and_wordings(tmp_path: Path) -> None:
    table = lines(
        tmp_path / "t.jsonl",
        {"source": "s.png", "instruction": "do", "target": "t.png"},
        {"source": ["a.png", "b.png"], "instruction": ["one", "two"], "target": "t.png"},
        {"source": "s.png", "instruction": "", "target": "t.png"},
    )
    assert named(edits(table)) == [
        ("t.png", ("s.png",), ("do",), None),
        ("t.png", ("a.png", "b.png"), ("one", "two"), None),
        ("t.png", ("s.png",), (), "no_caption"),
    ]
    limited = edits(table, max_sources=1)
    assert "line 2: has 2 source pictures, source.max_sources is 1" in limited.problems[0]
    assert [row.fault for row in limited.rows] == [None, "bad_row", "no_caption"]
    columns = lines(tmp_path / "c.jsonl", {"first": "1", "second": "2", "words": "w", "after": "t"})
    found = edits(columns, source_columns=("second", "first"), instruction_column="words", target_column="after")
    assert named(found) == [("t", ("2", "1"), ("w",), None)]
    with pytest.raises(ValueError, match="line 1: has no picture in 'source'"):
        edits(columns)
    with pytest.raises(ValueError, match="line 1: has no picture in 'source'"):
        edits(lines(tmp_path / "e.jsonl", {"source": [], "instruction": "x", "target": "t"}))
    own = edits(table, instruction=" all of them ", source_columns=("target",))
    assert named(own)[:2] == [("t.png", ("t.png",), ("all of them",), None)] * 2
    assert named(edits(table, instruction="", max_sources=2))[1] == ("t.png", ("a.png", "b.png"), (), None)
    with pytest.raises(ValueError, match=r"none of its 1 edits has an instruction in 'instruction'"):
        edits(lines(tmp_path / "m.jsonl", {"source": "s", "target": "t"}))


@pytest.mark.parametrize("form", ["bytes", "image", "list of images", "list of bytes"])
def test_pictures_in_the_table_are_read_from_their_cells(tmp_path: Path, form: str) -> None:
    """One picture per cell and several, as bytes and as Hugging Face datasets write them; over row groups and files."""
    folder = tmp_path / "odd #1 %/é"
    folder.mkdir(parents=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

    def cell(number: int) -> Any:
        raw = bytes([number]) * (number + 1)
        return raw if "bytes" in form else {"bytes": raw, "path": f"{number}.png"}

    kind = pa.binary() if "bytes" in form else image
    several = "list" in form
    sources: list[Any] = [[cell(n), cell(n + 100)] if several else cell(n) for n in range(5)]
    table = pa.table(
        {
            "source": pa.array(sources, pa.list_(kind) if several else kind),
            "instruction": [f"do {n}" for n in range(5)],
            "target": pa.array([cell(n + 50) for n in range(5)], kind),
        }
    )
    pq.write_table(table.slice(0, 3), folder / "a.parquet", row_group_size=2)
    pq.write_table(table.slice(3), folder / "b.parquet")
    source = open_source(EditsSource(kind="edits", path=str(tmp_path / "odd #1 %")))
    rows = list(source.find().rows)
    assert [row.captions for row in rows] == [(f"do {n}",) for n in range(5)]
    for number, row in reversed(list(enumerate(rows))):
        wanted = [number, number + 100] if several else [number]
        assert [read_bytes(source.root, uri) for uri in row.others] == [bytes([n]) * (n + 1) for n in wanted]
        assert read_bytes(source.root, row.uri) == bytes([number + 50]) * (number + 51)
        assert can_be_read(source.root, row.uri)
    (folder / "a.parquet").unlink()
    with pytest.raises(FileNotFoundError):
        read_bytes(source.root, rows[0].uri)
    assert not can_be_read(source.root, rows[0].uri)
    assert read_bytes(source.root, rows[4].uri) == bytes([54]) * 55


def test_listing_a_table_reads_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "source": pa.array([[{"bytes": b"x" * 1000, "path": "p"}]], pa.list_(image)),
            "instruction": ["do"],
            "target": pa.array([b"y" * 1000], pa.binary()),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    taken: list[str] = []
    real = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, group, columns: taken.extend(columns) or real(self, group, columns=columns),
    )
    assert len(list(edits(tmp_path / "t.parquet").rows)) == 1
    assert taken
    assert all(name.endswith(".path") for name in taken)


def test_a_table_that_was_written_anew_gives_its_new_bytes_and_a_shorter_one_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "t.parquet"
    pq.write_table(pa.table({"c": pa.array([b"one", b"two", None], pa.binary())}), file)
    uri = parquet_cells.uri_of("t.parquet", 0, 1, "c")
    assert read_bytes(str(tmp_path), uri) == b"two"
    assert read_bytes(str(tmp_path), parquet_cells.uri_of("t.parquet", 0, 2, "c")) == b""
    pq.write_table(pa.table({"c": pa.array([b"1", b"another"], pa.binary())}), file)
    assert read_bytes(str(tmp_path), uri) == b"another"
    for gone in ((0, 2, "c"), (1, 0, "c"), (0, 0, "d")):
        with pytest.raises(OSError, match="the file was changed"):
            read_bytes(str(tmp_path), parquet_cells.uri_of("t.parquet", *gone))
    file.write_bytes(b"PAR1 nothing")
    with pytest.raises(OSError, match="cannot be read as parquet"):
        read_bytes(str(tmp_path), uri)
    with pytest.raises(SourceGoneError):
        read_bytes(str(tmp_path / "gone"), uri)


def test_row_groups_that_no_worker_could_hold_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_cells, "MAX_BYTES", 3000)
    table = pa.table({"caption": ["a"], "chosen": [b"x" * 2000], "rejected": [b"y" * 2000]})
    pq.write_table(table, tmp_path / "t.parquet", use_dictionary=False)
    with pytest.raises(ValueError, match=r"row group 0 \(chosen, rejected\) have .* with smaller row groups"):
        pairs(tmp_path / "t.parquet")


def test_names_that_look_like_cells_are_files(tmp_path: Path) -> None:
    uri = encode_uri("cell:0/0//c/t.parquet")
    assert locate("/root", uri) == "/root/cell:0/0//c/t.parquet"


def test_what_a_source_gives() -> None:
    assert sample_kind(PairsSource(kind="pairs")) == PREFERENCE
    assert sample_kind(EditsSource(kind="edits")) == EDIT
    from qwenimg_dist.config import FolderSource

    assert sample_kind(FolderSource(kind="folder")) == IMAGE
