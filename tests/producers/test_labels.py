"""Labels that a source gives reach `where` and `data.weights`, from every kind of source that has columns."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from producer_world import FINGERPRINT, FakeEncoders, draw, make_plan_for, produce_here, rows_of

from producers.sources import open_source
from qwenimg_dist.compose import ConfigError, load_config
from qwenimg_dist.data.catalog import Catalog, RunFacets
from qwenimg_dist.data.catalog_build import build_catalog
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.data.pins import ready_units
from qwenimg_dist.data.row_columns import load_row_columns
from qwenimg_dist.data.where import compile_where
from qwenimg_dist.schema import LISTING, ROWS, SCAN, latents_facet, text_facet

FACETS = RunFacets(text=text_facet(FINGERPRINT), latents={64: latents_facet(64, FINGERPRINT)})
GIVEN: list[dict[str, Any]] = [
    {"theme": "sea", "TextLevel": 0},
    {"theme": "city", "TextLevel": 2},
    {"theme": "", "TextLevel": 1.0},
    {"TextLevel": None},
    {"theme": "sea", "TextLevel": 2},
]
COLUMNS = "source.label_columns={theme: theme, text_level: TextLevel}"


def write_source(root: Path, kind: str, given: list[dict[str, Any]]) -> Path:
    """Five pictures with captions and these columns."""
    rows = [{"caption": f"a picture of number {number}", **entry} for number, entry in enumerate(given)]
    for number in range(len(rows)):
        if not (root / "pictures" / f"{number}.png").exists():
            draw(root / "pictures" / f"{number}.png", number)
    if kind == "folder":
        lines = [json.dumps({"file_name": f"{n}.png", **row}) for n, row in enumerate(rows)]
        (root / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
        return root / "pictures"
    listed = [{"uri": f"pictures/{n}.png", **row} for n, row in enumerate(rows)]
    if kind == "jsonl":
        (root / "list.jsonl").write_text("\n".join(map(json.dumps, listed)))
        return root / "list.jsonl"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(listed), root / "list.parquet")
        return root / "list.parquet"
    with tarfile.open(root / "0.tar", "w") as tar:
        for number, row in enumerate(rows):
            for name, data in (
                (f"{number}.json", json.dumps(row).encode()),
                (f"{number}.png", (root / "pictures" / f"{number}.png").read_bytes()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return root / "0.tar"


SOURCES = {"folder": "folder", "jsonl": "manifest", "parquet": "manifest", "webdataset": "webdataset"}


def catalog_of(dataset: Dataset, folder: Path) -> Catalog:
    return Catalog.open(build_catalog(dataset, ready_units(dataset, FACETS), FACETS, folder).folder, dataset.root)


@pytest.mark.parametrize("kind", SOURCES)
def test_labels_of_a_source_select_what_is_trained_on(kind: str, tmp_path: Path) -> None:
    path = write_source(tmp_path, kind, GIVEN)
    words = (f"source={SOURCES[kind]}", COLUMNS)
    dataset = Dataset.create(tmp_path / "data", 2)
    produce_here(path, dataset, make_plan_for(*words), FakeEncoders(), *words)
    columns = catalog_of(dataset, tmp_path / "catalog").columns
    for expression, rows in (
        ("theme == 'sea'", [0, 4]),
        ("label_theme in ('city', 'sea') and text_level == 2", [1, 4]),
        ("text_level >= 1", [1, 2, 4]),
        ("text_level < 5", [0, 1, 2, 4]),  # what has none is not selected
        ("theme == ''", [2, 3]),
    ):
        mask = compile_where(expression).mask(columns, 5)
        assert columns["row"][mask].tolist() == rows, expression
    looked_at = load_row_columns(dataset)
    assert "theme" in looked_at.labels
    assert "text_level" in looked_at.scores


def test_changed_labels_encode_nothing_and_switched_on_later_they_reach_old_rows(tmp_path: Path) -> None:
    dataset = Dataset.create(tmp_path / "data", 2)
    produce_here(write_source(tmp_path, "folder", GIVEN), dataset, make_plan_for(), FakeEncoders())
    before = rows_of(dataset, LISTING)
    assert all(row["labels"] is None for row in before.values())
    plan = make_plan_for(COLUMNS)
    changed = [*GIVEN[:4], {"theme": "forest"}]
    for given, expected in ((GIVEN, ["sea", 2.0]), (changed, ["forest", None])):
        encoders = FakeEncoders()
        path = write_source(tmp_path, "folder", given)
        reports = produce_here(path, dataset, plan, encoders, COLUMNS)
        assert encoders.num_pictures == encoders.num_captions == sum(one.decoded for one in reports) == 0
        entry = rows_of(dataset, ROWS)[4]
        assert [entry["label_theme"], entry["score_text_level"]] == expected
        assert produce_here(path, dataset, plan, FakeEncoders(), COLUMNS) == []
    assert [len(dataset.unit_parts(SCAN, unit)) for unit in dataset.units(SCAN)] == [1, 1, 1]


def test_a_label_that_is_no_scalar_is_the_fault_of_its_row_until_it_is_mended(tmp_path: Path) -> None:
    path = write_source(tmp_path, "jsonl", [{"theme": ["sea"]}, {"theme": "sea"}])
    words = ("source=manifest", "source.label_columns=[theme]")
    dataset = Dataset.create(tmp_path / "data", 2)
    produce_here(path, dataset, make_plan_for(*words), FakeEncoders(), *words)
    entry = rows_of(dataset, ROWS)[0]
    assert (entry["status"], entry["reason"]) == ("fault", "bad_label")
    assert entry["detail"] == "'theme' is \"['sea']\": a label is text or a finite number"
    produce_here(
        write_source(tmp_path, "jsonl", [GIVEN[0]] * 2), dataset, make_plan_for(*words), FakeEncoders(), *words
    )
    assert rows_of(dataset, ROWS)[0]["status"] == "kept"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("[Theme]", "no name for a label"),
        ("{and: theme}", "no name for a label"),
        ("[aspect]", "a name that the index has already"),
        ("[label_theme]", "a name that the index has already"),
        ("[category]", r"is what filters\.category gives: choose another name"),
    ],
)
def test_names_that_where_could_not_take_are_refused(columns: str, message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        make_plan_for(f"source.label_columns={columns}")
    taken = load_config(["source.label_columns=[category]", "filters.category.enabled=false"])
    assert taken.source.label_columns == {"category": "category"}  # type: ignore[union-attr]


def test_a_parquet_manifest_without_the_column_is_refused(tmp_path: Path) -> None:
    path = write_source(tmp_path, "parquet", GIVEN)
    config = load_config(["source=manifest", f"source.path={path}", "source.label_columns=[level]"])
    with pytest.raises(ValueError, match="has no column level; there is: "):
        open_source(config.source).find()
