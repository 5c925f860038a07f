"""Sources list what is there, in a stable order, and name what they cannot use."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from producer_world import rows_of

from producers.listing import sync_listing
from producers.sources import open_source
from producers.sources.base import Found, SourceGoneError, encode_uri, locate, read_bytes
from producers.sources.folder import Folder
from qwenimg_dist.compose import load_config
from qwenimg_dist.config import FolderSource, ManifestSource, PromptsSource
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.schema import LISTING


def touch(root: Path, *names: str, text: str | None = None) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
        if text is not None:
            (root / name).with_suffix(".txt").write_text(text)


def describe_pictures(folder: Path, *lines: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def find(root: Path, captions: Any = "auto", **options: float) -> Found:
    found = Folder(FolderSource(kind="folder", path=str(root), captions=captions)).find(**options)
    return replace(found, rows=list(found.rows))


def captions(found: Found) -> dict[str, tuple[str, ...]]:
    return {row.uri: row.captions for row in found.rows}


def faults(found: Found) -> dict[str, str]:
    return {row.uri: row.fault for row in found.rows if row.fault is not None}


def test_rows_are_the_pictures_sorted_by_path(tmp_path: Path) -> None:
    touch(tmp_path, "b.jpg", "a/z.PNG", "a/B.jpeg", "c.webp", "a.tiff", text="words")
    touch(tmp_path, "notes.md", "video.mp4", "archive.ZIP", "extensionless")
    (tmp_path / "alone.txt").write_text("a text without a picture")
    found = find(tmp_path)
    assert [row.uri for row in found.rows] == ["a.tiff", "a/B.jpeg", "a/z.PNG", "b.jpg", "c.webp"]
    assert +found.ignored == {".md": 1, ".mp4": 1, ".zip": 1, "without extension": 1, ".txt": 1}
    assert all(row.captions == ("words",) for row in found.rows)


def test_every_way_to_write_captions(tmp_path: Path) -> None:
    touch(tmp_path, "text.png", "caption.png", "list.png", "twice.png", "null.png", "deep/in.png", "deep/over.png")
    touch(tmp_path, "beside.png", text="  from the file \n")
    (tmp_path / "null.TXT").write_text("beside, in capitals")
    describe_pictures(
        tmp_path,
        {"file_name": "text.png", "text": "no", "other": 3},
        {"file_name": "./caption.png", "caption": "on"},
        {"file_name": "list.png", "captions": ["one", "two", "one", "", None]},
        {"file_name": "twice.png", "text": "first"},
        {"file_name": "twice.png", "text": "second"},
        {"file_name": "null.png", "text": None},
        {"file_name": "deep/over.png", "text": "from above"},
    )
    describe_pictures(
        tmp_path / "deep", {"file_name": "in.png", "text": "deep"}, {"file_name": "over.png", "text": "near"}
    )
    found = find(tmp_path)
    assert captions(found) == {
        "beside.png": ("from the file",),
        "caption.png": ("on",),
        "deep/in.png": ("deep",),
        "deep/over.png": ("near",),
        "list.png": ("one", "two"),
        "null.png": ("beside, in capitals",),
        "text.png": ("no",),
        "twice.png": ("first", "second"),
    }
    assert not faults(found)
    assert faults(find(tmp_path, "metadata")) == {"null.png": "no_caption", "beside.png": "no_caption"}
    assert captions(find(tmp_path, "txt"))["text.png"] == ()


def test_metadata_in_another_order_that_changes_between_the_look_and_its_rows(tmp_path: Path) -> None:
    names = [f"{number:05d}.png" for number in range(5000)]  # more than one batch
    touch(tmp_path, *names[:-2])
    lines = [{"file_name": name, "text": f"words {name}"} for name in reversed(names)]
    describe_pictures(tmp_path, *lines, {"file_name": names[0], "text": "more"})
    found = captions(find(tmp_path))
    assert list(found) == names
    assert found == {name: (f"words {name}", *(["more"] if name == names[0] else [])) for name in names}
    look = Folder(FolderSource(kind="folder", path=str(tmp_path))).find()
    describe_pictures(tmp_path, *lines[1:])
    with pytest.raises(ValueError, match=r"metadata.jsonl was changed while it was read: run the same command again"):
        list(look.rows)


def test_what_is_wrong_with_a_source_is_found_before_any_row(tmp_path: Path) -> None:
    touch(tmp_path / "bare", "a.png", "b.png")
    with pytest.raises(ValueError, match="none of its 2 pictures has a caption"):
        find(tmp_path / "bare")
    describe_pictures(tmp_path / "bare", {"file_name": "a.png", "text": "fine"}, {"name": "b.png"})
    found = find(tmp_path / "bare")
    assert faults(found) == {"b.png": "no_caption", found.rows[-1].uri: "bad_row"}  # type: ignore[index]
    assert found.problems == [
        "1 of 3 rows cannot be used, and become the fault bad_row: "
        f'{tmp_path}/bare/metadata.jsonl, line 2: has no "file_name"; correct the line'
    ]
    lines = ['{"uri": "a.png"}'] * 9000
    (tmp_path / "list.jsonl").write_text("\n".join([*lines, ""]))
    with pytest.raises(ValueError, match="none of its 9000 rows has a caption"):
        manifest(tmp_path / "list.jsonl")
    (tmp_path / "list.jsonl").write_text('[]\n{"url": "a.png"}')
    with pytest.raises(
        ValueError, match=r"line 1: is not a JSON object; correct the line \(none of 2 rows can be used"
    ):
        manifest(tmp_path / "list.jsonl")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "metadata.jsonl").write_text('{"file_name": ')
    with pytest.raises(ValueError, match=r"torn/metadata.jsonl, line 1: is not JSON"):
        find(tmp_path / "torn")


def test_a_broken_line_costs_itself_alone_and_keeps_its_key_when_lines_move(tmp_path: Path) -> None:
    good = [f'{{"uri": "{name}.png", "caption": "words"}}' for name in "abc"]
    (tmp_path / "list.jsonl").write_text("\n".join([good[0], '{"uri": "b.p', *good[1:]]))
    found = manifest(tmp_path / "list.jsonl")
    assert [(row.uri[:15], row.fault) for row in found.rows] == [
        ("a.png", None),
        ("line:list.jsonl", "bad_row"),
        ("b.png", None),
        ("c.png", None),
    ]
    assert found.rows[1].fault_detail.startswith(f"{tmp_path}/list.jsonl, line 2: is not JSON")  # type: ignore[index]
    (tmp_path / "list.jsonl").write_text("\n".join([*good, '{"uri": "b.p', "{}"]) + "\n")
    moved = manifest(tmp_path / "list.jsonl")
    assert moved.rows[3].uri == found.rows[1].uri  # type: ignore[index]
    assert moved.problems[0].startswith("2 of 5 rows cannot be used")


def test_a_last_line_half_written_is_not_there_yet_while_a_source_is_followed(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    text = '{"file_name": "a.png", "uri": "a.png", "text": "x", "caption": "x"}\n{"file_name": "b.p'
    for name in ("list.jsonl", "metadata.jsonl"):
        (tmp_path / name).write_text(text)
    (tmp_path / "prompts.txt").write_text("a red circle\na blue squ")
    prompts = open_source(PromptsSource(kind="prompts", path=str(tmp_path / "prompts.txt")))
    assert [row.captions for row in prompts.find().rows] == [("a red circle",), ("a blue squ",)]
    assert [row.captions for row in prompts.find(min_age_s=1e-9).rows] == [("a red circle",)]
    source = open_source(ManifestSource(kind="manifest", path=str(tmp_path / "list.jsonl")))
    for one in (source, Folder(FolderSource(kind="folder", path=str(tmp_path)))):
        assert [row.fault for row in one.find().rows] == [None, "bad_row"]
        assert [row.fault for row in one.find(min_age_s=1e-9).rows] == [None]


def test_captions_that_are_none(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", text="fine")
    touch(tmp_path, "number.png", "half.png", "latin.png", "empty.png")
    describe_pictures(tmp_path, {"file_name": "number.png", "text": 3}, {"file_name": "half.png", "text": "\ud83d"})
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "empty.txt").write_text(" \n")
    assert faults(find(tmp_path)) == {
        "empty.png": "no_caption",
        "half.png": "bad_caption",
        "latin.png": "bad_caption",
        "number.png": "bad_caption",
    }


def test_metadata_may_name_what_is_not_there_but_not_what_is_outside(tmp_path: Path) -> None:
    touch(tmp_path / "in", "a.png", text="fine")
    touch(tmp_path, "secret.png")
    names = ("gone.jpg", "../secret.png", "/etc/passwd", "sub/../../secret.png", "raw")
    describe_pictures(tmp_path / "in", *({"file_name": name, "text": "words"} for name in names))
    found = find(tmp_path / "in")
    assert faults(found) == {"../secret.png": "outside_root", "/etc/passwd": "outside_root"}
    assert captions(found)["gone.jpg"] == ("words",)
    assert captions(found)["raw"] == ("words",)  # named, so it counts, whatever its extension


def test_odd_and_colliding_names(tmp_path: Path) -> None:
    odd = ["same.jpg", "same.png", "with space.jpg", "ümläut.jpg", "a%20b.jpg", "bytes:x.jpg", ".hidden.jpg", "x.y.jpg"]
    raw = os.fsdecode(b"latin-\xe9.jpg")
    touch(tmp_path, *odd, raw, "-dash.jpg", "new\nline.jpg", text="words")
    describe_pictures(tmp_path, {"file_name": raw, "text": "by its bytes"})
    found = find(tmp_path)
    assert len({row.uri for row in found.rows}) == 11
    for row in found.rows:
        row.uri.encode("utf-8")
        assert read_bytes(str(tmp_path), row.uri) == b"x"
    assert captions(found)["bytes:latin-%E9.jpg"] == ("by its bytes",)
    assert encode_uri("bytes:x.jpg") == "bytes:bytes%3Ax.jpg"


def test_links_that_lead_back_end(tmp_path: Path) -> None:
    touch(tmp_path, "a/b.png", text="fine")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "self.png").symlink_to("self.png")
    assert [row.uri for row in find(tmp_path).rows] == ["a/b.png", "dangling.png", "self.png"]


def test_a_file_that_is_still_being_written_is_left_for_later(tmp_path: Path) -> None:
    touch(tmp_path, "old.png", "new.png", text="words")
    os.utime(tmp_path / "old.png", (time.time() - 60,) * 2)
    assert [row.uri for row in find(tmp_path, min_age_s=30).rows] == ["old.png"]
    touch(tmp_path, "wrong date.png", text="words")
    os.utime(tmp_path / "wrong date.png", (time.time() + 3600,) * 2)
    assert [row.uri for row in find(tmp_path, min_age_s=30).rows] == ["old.png", "wrong date.png"]
    (tmp_path / "wrong date.png").unlink()
    touch(tmp_path, "new raw", "old raw")
    os.utime(tmp_path / "old raw", (time.time() - 60,) * 2)
    names = ("old.png", "new.png", "new raw", "old raw", "gone.png", "gone")
    describe_pictures(tmp_path, *({"file_name": name, "text": "words"} for name in names))
    found = find(tmp_path, min_age_s=30)
    assert [row.uri for row in found.rows] == ["gone", "gone.png", "old raw", "old.png"]


def test_a_root_that_is_gone_is_not_blamed_on_its_files(tmp_path: Path) -> None:
    touch(tmp_path / "in", "a.png")
    with pytest.raises(FileNotFoundError):
        read_bytes(str(tmp_path / "in"), "b.png")
    (tmp_path / "in" / "a.png").unlink()
    (tmp_path / "in").rmdir()
    with pytest.raises(SourceGoneError, match="is gone: mount it again"):
        read_bytes(str(tmp_path / "in"), "a.png")


def manifest(file: Path, **options: Any) -> Found:
    found = open_source(ManifestSource(kind="manifest", path=str(file), **options)).find()
    return replace(found, rows=list(found.rows))


def test_a_manifest_keeps_its_order_and_repeats(tmp_path: Path) -> None:
    lines = [
        {"uri": "b.png", "caption": "x"},
        {"uri": "a.png", "caption": ["y", "z"]},
        {"uri": "b.png", "caption": None},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    found = manifest(tmp_path / "list.jsonl")
    assert [(row.uri, row.captions, row.fault) for row in found.rows] == [
        ("b.png", ("x",), None),
        ("a.png", ("y", "z"), None),
        ("b.png", (), "no_caption"),
    ]
    assert locate(str(tmp_path), "b.png") == f"{tmp_path}/b.png"
    assert locate("s3://bucket/dir/", "b.png") == "s3://bucket/dir/b.png"
    assert locate("/root", "https://host/b.png") == "https://host/b.png"


def test_a_name_that_no_file_can_have_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text('{"uri": "a.png", "caption": "x"}\n{"uri": "\\ud83d.png", "caption": "y"}\n')
    assert [row.fault for row in manifest(tmp_path / "list.jsonl").rows] == [None, "bad_row"]
    touch(tmp_path / "folder", "a.png", text="words")
    (tmp_path / "folder" / "metadata.jsonl").write_text('{"file_name": "\\ud83d.png", "text": "y"}\n')
    (last,) = [row for row in find(tmp_path / "folder").rows if row.fault]
    assert re.search(r"metadata\.jsonl, line 1: .*half a character", str(last.fault_detail))


@pytest.mark.parametrize("kind", ["manifest", "edits", "folder"])
def test_bytes_that_are_no_text_in_a_bad_row_do_not_stop_the_listing(tmp_path: Path, kind: str) -> None:
    """Its detail quotes the keys that are there, and is stored."""
    good = {"manifest": {"uri": "a.png", "caption": "x"}, "edits": {"source": "a.png", "target": "b.png"}}.get(kind, {})
    for name in ("a.png", "b.png"):
        touch(tmp_path, name, text="words")
    file = tmp_path / ("metadata.jsonl" if kind == "folder" else "list.jsonl")
    file.write_bytes(json.dumps({**good, "file_name": "a.png", "instruction": "x"}).encode() + b'\n{"\xe9": 1}\n')
    source = open_source(
        load_config([f"source={kind}", f"source.path={tmp_path if kind == 'folder' else file}"]).source
    )
    dataset = Dataset.create(tmp_path / "data", 4)
    sync_listing(dataset, source.find().rows, config_hash="x", before_commit=lambda: None)
    (bad,) = [entry for entry in rows_of(dataset, LISTING).values() if entry["caption_fault"] == "bad_row"]
    assert f"{file}, line 2: " in bad["fault_detail"]
    assert (r"\udce9" in bad["fault_detail"]) == (kind != "folder")


def test_a_parquet_manifest_with_other_columns_and_a_root(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    touch(pictures, "a.png")
    pq.write_table(pa.table({"path": ["a.png"], "texts": [["one", "two"]], "n": [1]}), tmp_path / "list.parquet")
    config = ManifestSource(
        kind="manifest",
        path=str(tmp_path / "list.parquet"),
        uri_column="path",
        caption_column="texts",
        root=f"file://{pictures}",
    )
    source = open_source(config)
    (row,) = source.find().rows
    assert row.captions == ("one", "two")
    assert read_bytes(source.root, row.uri) == b"x"
    with pytest.raises(ValueError, match="has no column uri or caption; there is: path, texts, n"):
        manifest(tmp_path / "list.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        manifest(tmp_path / "torn.parquet")
