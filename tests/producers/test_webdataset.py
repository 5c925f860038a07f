"""Tars of samples: what is a row, what is passed over, torn and hostile tars, and reading members by their range."""

from __future__ import annotations

import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import webdataset
from producer_world import SCORERS, FakeEncoders, draw, make_plan_for, rows_of
from tar_samples import Members, samples, write_tar

from producers.driver import Driver
from producers.sources import open_source, tars
from producers.sources import webdataset as webdataset_source
from producers.sources.base import Found, can_be_read, encode_uri, read_bytes
from producers.workers import InlineWorkers
from qwenimg_dist.config import WebdatasetSource
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.schema import LISTING, ROWS, SCAN


def find(path: Any, **options: Any) -> Found:
    found = open_source(WebdatasetSource(kind="webdataset", path=path, **options)).find()
    return replace(found, rows=list(found.rows))


def test_every_picture_of_a_sample_is_a_row_and_reads_back(tmp_path: Path) -> None:
    write_tar(tmp_path / "b.tar", samples(4, 7))
    write_tar(tmp_path / "a.tar", samples(0, 4))
    found = find(str(tmp_path))
    assert [row.captions for row in found.rows] == [(f"words {number}",) for number in range(7)]
    assert [row.identity for row in found.rows][3:5] == ["tar:a.tar#000000003.jpg", "tar:b.tar#000000004.jpg"]
    for number, row in enumerate(found.rows):
        assert read_bytes(str(tmp_path), row.uri) == b"picture %d" % number * 40
    assert found.problems == []
    with webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False) as stock:  # the same samples
        assert [one["__key__"] for one in stock] == [f"{number:09d}" for number in range(4)]


def test_captions_of_json_and_txt(tmp_path: Path) -> None:
    members: Members = [
        ("one.jpg", b"1"),
        ("one.json", json.dumps({"texts": ["a", "b"]}).encode()),
        ("one.txt", b"beside"),
        ("two.left.png", b"2"),
        ("two.right.webp", b"3"),
        ("two.txt", "\ufeffzwei, größer".encode()),
        ("three.jpg", b"4"),
        ("three.json", b"{broken"),
        ("four.jpg", b"5"),
        ("four.txt", b"\xff\xfe"),
        ("five.jpg", b"6"),
        ("six.txt", b"no picture"),
        ("seven.cls", b"0"),
        ("eight.jpg", b"7"),
        ("eight.txt", b"x" * (1024**2 + 1)),
    ]
    file = write_tar(tmp_path / "a.tar", members)
    found = find(str(file), caption_column="texts")
    faults = [(row.captions, row.fault) for row in found.rows]
    assert faults == [
        (("a", "b"), None),
        (("zwei, größer",), None),
        (("zwei, größer",), None),
        ((), "bad_caption"),
        ((), "bad_caption"),
        ((), "no_caption"),
        ((), "bad_caption"),
    ]
    assert found.ignored == {".txt": 1, ".cls": 1}
    assert find(str(file), captions="txt").rows[0].captions == ("beside",)
    with pytest.raises(ValueError, match=r"no picture has a caption.*'other' \(source.caption_column\)"):
        find(str(file), captions="json", caption_column="other")


def test_links_devices_and_paths_that_lead_out_are_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    file = tmp_path / "in" / "a.tar"
    write_tar(file, [*samples(0, 1), ("../secret.jpg", b"x"), ("/etc/passwd.png", b"y")])
    with tarfile.open(file, "a") as tar:
        for kind, name in ((tarfile.SYMTYPE, "l.jpg"), (tarfile.LNKTYPE, "h.jpg"), (tarfile.FIFOTYPE, "f.jpg")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "../secret"
            tar.addfile(member)
        directory = tarfile.TarInfo("d.jpg")
        directory.type = tarfile.DIRTYPE
        tar.addfile(directory)
    found = find(str(tmp_path / "in"))
    assert [row.fault for row in found.rows] == [None, "outside_root", "outside_root"]
    assert found.ignored == {"links and devices": 3}
    for uri in ("tar:../secret", "tar:a.tar#nothing@512+3", "tar:gone.tar#x@512+3", "tar:a.tar#l.jpg@512+0"):
        with pytest.raises(FileNotFoundError):
            read_bytes(str(tmp_path / "in"), uri)
    assert encode_uri("tar:a.tar#b@0+1").startswith("bytes:")  # a manifest cannot name a member


@pytest.mark.parametrize("cut", ["member", "border", "header", "damaged"])
def test_a_torn_tar_is_named_and_gives_what_is_before_the_fault(tmp_path: Path, cut: str) -> None:
    file = write_tar(tmp_path / "a.tar", samples(0, 5))
    write_tar(tmp_path / "b.tar", samples(5, 6))
    third = next(member for member in tars.walk(str(file)) if member.name == "000000003.jpg")
    if cut == "damaged":
        with open(file, "r+b") as torn:
            torn.seek(third.offset - 512)
            torn.write(os.urandom(512))
    else:
        os.truncate(file, third.offset + {"member": 100, "border": -512, "header": -100}[cut])
    found = find(str(tmp_path))
    assert [row.captions[0] for row in found.rows] == ["words 0", "words 1", "words 5"]  # 2 may lack a member
    (problem,) = found.problems
    assert str(file) in problem
    assert "replace it and run again" in problem


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("pipe:cat a.tar", "reads tars on disks, or all of them on s3://"),
        ("https://host/a.tar", "of URLs only s3://BUCKET/FOLDER is supported"),
        ("{root}/none/*.tar", "names no tar"),
        ("{root}/{{000..002}}.tar", "002.tar is not a file that can be read"),
        ("{root}/z.tar.gz", "no picture in 1 tars: .*z.tar.gz is damaged or no plain tar"),
        ("{root}/empty.tar", "no picture in 1 tars: .*empty.tar is damaged"),
        (None, "source.path is not set"),
    ],
)
def test_unusable_paths_are_refused_before_anything_is_written(tmp_path: Path, path: str | None, message: str) -> None:
    write_tar(tmp_path / "000.tar", samples(0, 1))
    write_tar(tmp_path / "001.tar", samples(1, 2))
    (tmp_path / "empty.tar").touch()
    with tarfile.open(tmp_path / "z.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(ValueError, match=message):
        find(path.format(root=tmp_path) if path is not None else None)


def test_globs_ranges_and_lists(tmp_path: Path) -> None:
    for number in range(12):
        write_tar(tmp_path / f"d{number % 2}" / f"{number:03d}.tar", samples(number, number + 1))
    assert len(find(f"{tmp_path}/d*/*.tar").rows) == 12
    one = find([f"{tmp_path}/d1/{{009..009}}.tar", f"{tmp_path}/d0", f"{tmp_path}/d0/000.tar"])
    assert [row.uri.split("#")[0] for row in one.rows][:2] == ["tar:d1/009.tar", "tar:d0/000.tar"]
    assert len(one.rows) == 7


def test_a_further_look_walks_only_what_changed_and_keeps_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", samples(number, number + 1))
    os.truncate(tmp_path / "1.tar", 700)
    walked: list[str] = []
    walk = tars.walk
    monkeypatch.setattr(webdataset_source, "walk", lambda path: walked.append(Path(path).name) or walk(path))
    source = open_source(WebdatasetSource(kind="webdataset", path=str(tmp_path)))

    def look() -> tuple[list[str], int, set[str]]:
        """Captions of the rows given, how much is wrong, and what was walked through."""
        walked.clear()
        found = source.find()
        return [row.captions[0] for row in found.rows], len(found.problems), set(walked)

    assert look() == (["words 0", "words 2"], 1, {"0.tar", "1.tar", "2.tar"})
    assert look() == ([], 1, set())
    write_tar(tmp_path / "1.tar", samples(1, 3))
    assert look() == (["words 1", "words 2"], 0, {"1.tar"})
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="names no tar"):
        look()


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_foreign_names_read_by_their_range(tmp_path: Path, form: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["x" * 150 + ".jpg", "größe 雨.jpg", "a#b@1+2.jpg", "deep/" * 30 + "p.jpg"]
    write_tar(tmp_path / "odd #@.tar", [(name, name.encode() * 9) for name in names] + [("deep.txt", b"x")], form=form)
    found = list(tars.walk(str(tmp_path / "odd #@.tar")))
    monkeypatch.setattr(tars, "_ranges", lambda *_: pytest.fail("the range in the uri is enough"))
    for name, member in zip(names, found):
        uri = tars.member_uri("odd #@.tar", member)
        assert read_bytes(str(tmp_path), uri) == name.encode() * 9


def test_a_tar_written_anew_is_read_by_name_and_changed_members_are_found_by_their_hash(tmp_path: Path) -> None:
    tar, data = tmp_path / "tars" / "a.tar", tmp_path / "data"
    pictures = []
    for number in range(6):
        draw(tmp_path / f"{number}.png", number)
        pictures.append((tmp_path / f"{number}.png").read_bytes())

    def members(*order: int) -> Members:
        return [each for n in order for each in ((f"{n}.png", pictures[n]), (f"{n}.txt", f"words {n}".encode()))]

    def run(*resolutions: int) -> Dataset:
        plan = make_plan_for(resolutions=resolutions)
        dataset = Dataset.create(data, 4)
        source = open_source(WebdatasetSource(kind="webdataset", path=str(tar)))
        workers = InlineWorkers(dataset, plan, source.root, FakeEncoders(), SCORERS)
        driver = Driver(dataset=dataset, plan=plan, root=source.root, make_workers=lambda: workers)
        change = driver.list_source(source.find())
        assert driver.produce(driver.pending(), change.num_rows)
        return dataset

    write_tar(tar, members(0, 1, 2))
    dataset = run(64)
    assert {entry["status"] for entry in rows_of(dataset, ROWS).values()} == {"kept"}
    pictures[1] = pictures[5]
    write_tar(tar, members(4, 1, 2, 0))  # all members moved, one is another picture, one is new
    rows = rows_of(run(48, 64), ROWS)
    assert {row: (entry["status"], entry["reason"]) for row, entry in rows.items()} == {
        0: ("kept", ""),
        1: ("kept", ""),
        2: ("kept", ""),
        3: ("kept", ""),
    }
    # The other picture is not taken for the one that was scanned: its row keeps what it has and gets no more.
    assert rows[1]["detail"].startswith("changed_file: not the bytes that were scanned")
    assert rows_of(dataset, make_plan_for(resolutions=(48, 64)).latents_facets[48]).keys() == {0, 2, 3}
    assert len(rows_of(dataset, LISTING)) == 4
    assert rows_of(dataset, SCAN)[0]["width"] == 80
    gone = rows_of(dataset, LISTING)[0]["uri"]
    assert can_be_read(str(tar.parent), gone)
    write_tar(tar, members(1, 2))
    assert not can_be_read(str(tar.parent), gone)
    with pytest.raises(FileNotFoundError, match=r"has no member '0\.png' now"):
        read_bytes(str(tar.parent), gone)
