"""Pictures behind http URLs: each fault is its row's alone, what may have passed is tried again, odd URLs are named."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from http_server import CUT, Web, web_server
from producer_world import SCORERS, FakeEncoders, draw, make_plan_for, rows_of

from producers.driver import Driver
from producers.load import ImageFault
from producers.scan import read_or_fault
from producers.sources import open_source, urls
from producers.sources.base import Found
from producers.workers import InlineWorkers
from qwenimg_dist.config import EditsSource, ManifestSource
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.schema import ROWS


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(urls, "_FIRST_WAIT_S", 0.001)
    with web_server() as running:
        yield running


@pytest.fixture
def nobody() -> Iterator[str]:
    """URL of a port that nobody listens at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def fault(url: str) -> tuple[str, str]:
    with pytest.raises(ImageFault) as caught:
        read_or_fault("/elsewhere", url)
    return caught.value.reason, caught.value.detail


def test_every_answer_is_the_picture_or_a_fault_of_its_row(web: Web, nobody: str) -> None:
    web.files = {"/a%201%3F.png": b"bytes of a", "/late.png": b"late", "/cut-once.png": b"whole"}
    web.faults = {
        "/403": [403],
        "/410": [410],
        "/429": [429],
        "/500": [500],
        "/cut": [CUT],
        "/late.png": [429, 503, 200],
        "/cut-once.png": [CUT, 200],
    }
    assert read_or_fault(web.url, "a 1%3F.png") == b"bytes of a"
    assert read_or_fault("/elsewhere", f"{web.url}/late.png") == b"late"
    assert read_or_fault(web.url, "cut-once.png") == b"whole"
    assert web.seen == {"/a%201%3F.png": 1, "/late.png": 3, "/cut-once.png": 2}
    web.seen.clear()
    assert fault(f"{web.url}/403") == ("unreadable", "HTTP 403 Forbidden")
    assert fault(f"{web.url}/429") == ("unreadable", "HTTP 429 Too Many Requests")
    assert fault(f"{web.url}/404")[0] == fault(f"{web.url}/410")[0] == "missing_file"
    assert fault(f"{web.url}/500") == ("unreadable", "HTTP 500 Internal Server Error")
    assert fault(f"{web.url}/cut")[0] == "unreadable"
    assert web.seen == {"/403": 1, "/404": 1, "/410": 1, "/429": 3, "/500": 3, "/cut": 3}
    assert fault(f"{nobody}/a.png")[0] == "unreadable"
    assert fault("http://127.0.0.1:none/a.png")[0] == "unreadable"
    assert fault("htp://127.0.0.1/a.png")[0] == "unreadable"


def test_a_server_that_is_down_does_not_cost_its_patience_for_every_picture(
    web: Web, nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    get = urls._get
    monkeypatch.setattr(urls, "_get", lambda url: tried.append(url) or get(url))
    for number in range(20):
        fault(f"{nobody}/{number}.png")
    assert len(tried) == 3 * 3 + 7  # three tries, then one, then none
    assert "left alone" in fault(f"{nobody}/a.png")[1]
    web.files["/a.png"] = b"a"
    assert read_or_fault(web.url, "a.png") == b"a"  # another server is another matter
    # One that answers is asked for every picture, if only once.
    tried.clear()
    web.faults = {f"/{number}.png": [503] for number in range(15)} | {"/14.png": [200]}
    for number in range(14):
        fault(f"{web.url}/{number}.png")
    assert len(tried) == 3 * 3 + 11
    web.files["/14.png"] = b"b"
    assert read_or_fault(web.url, "14.png") == b"b"
    web.faults["/15.png"] = [503, 503, 200]
    assert read_or_fault(web.url, "15.png")  # it is trusted again


def manifest(file: Path, uris: list[str], **options: Any) -> Found:
    file.write_text("".join(json.dumps({"uri": uri, "caption": "words"}) + "\n" for uri in uris))
    return open_source(ManifestSource(kind="manifest", path=str(file), **options)).find()


def test_urls_that_nothing_reads_are_bad_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if it were not installed
    urls._driver.cache_clear()
    fine = ["a.png", "https://host/a.png", "file:///a.png", "zip://a.png::https://host/b.zip", "a:b.png"] * 40
    odd = [
        "htp://host/a.png",
        "http:///a.png",
        "http://[half/a.png",
        "://a.png",
        "zip://a.png::htp://b",
        "gs://b/a.png",
    ]
    found = manifest(tmp_path / "list.jsonl", fine + odd)
    details = [row.fault_detail for row in found.rows]
    assert details[: len(fine)] == [None] * len(fine)
    for detail, why in zip(
        details[len(fine) :],
        [
            "line 201: nothing reads htp:// URLs",
            "line 202: 'http:///a.png' names no host",
            "line 203: 'http://[half/a.png' names no host",
            "line 204: nothing reads :// URLs",
            "line 205: nothing reads htp:// URLs",
            "line 206: gs:// cannot be read here: Please install gcsfs",
        ],
        strict=True,
    ):
        assert detail is not None
        assert why in detail
    with pytest.raises(ValueError, match=r"3 of 203 rows name gs:// pictures\. .*install gcsfs.*every machine"):
        manifest(tmp_path / "list.jsonl", fine + ["gs://b/a.png"] * 3)
    with pytest.raises(ValueError, match=r"source\.root=htp://host: nothing reads htp://"):
        manifest(tmp_path / "list.jsonl", fine, root="htp://host")
    edits = tmp_path / "edits.jsonl"
    edits.write_text(json.dumps({"source": "gs://b/a.png", "instruction": "x", "target": "b.png"}) + "\n")
    with pytest.raises(ValueError, match="1 of 1 rows name gs://"):
        open_source(EditsSource(kind="edits", path=str(edits))).find()
    urls._driver.cache_clear()


def test_rows_that_could_not_be_reached_are_tried_again_and_dead_links_only_when_asked(
    web: Web, nobody: str, tmp_path: Path
) -> None:
    names = ["kept", "late", "cut", "refused", "gone"]
    for number, name in enumerate(names):
        draw(tmp_path / f"{name}.png", number)
        web.files[f"/{name}.png"] = (tmp_path / f"{name}.png").read_bytes()
    web.faults = {"/late.png": [503], "/cut.png": [CUT], "/refused.png": [403], "/gone.png": [404]}
    uris = [f"{web.url}/{name}.png" for name in names] + [f"{nobody}/a.png"]
    dataset = Dataset.create(tmp_path / "data", 4)
    found = manifest(tmp_path / "list.jsonl", uris)
    plan = make_plan_for()

    def produce(*, retry_missing: bool = False) -> dict[str, str]:
        """Another command: uri's name -> what became of it."""
        workers = InlineWorkers(dataset, plan, "/", FakeEncoders(), SCORERS)
        driver = Driver(dataset=dataset, plan=plan, root="/", make_workers=lambda: workers, retry_missing=retry_missing)
        change = driver.list_source(manifest(tmp_path / "list.jsonl", uris))
        assert driver.produce(driver.pending(), change.num_rows)
        decided = rows_of(dataset, ROWS)
        driver.pending()  # another look soon after, as with `follow`
        assert driver.pending() == []
        return {name: decided[row]["reason"] for row, name in enumerate([*names, "nobody"])}

    assert found.problems == []
    unreadable = dict.fromkeys(("late", "cut", "refused", "nobody"), "unreadable")
    assert produce() == {"kept": "", **unreadable, "gone": "missing_file"}
    web.faults = {"/cut.png": [CUT]}
    web.seen.clear()
    healed = {"kept": "", "late": "", "refused": "", "cut": "unreadable", "nobody": "unreadable"}
    assert produce() == {**healed, "gone": "missing_file"}
    assert web.seen["/gone.png"] == web.seen["/kept.png"] == 0
    assert produce(retry_missing=True) == {**healed, "gone": ""}
