"""`data verify` passes a sound data set and names every kind of damage: file, unit, what to do."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from qwenimg_dist.commands import data_reading
from qwenimg_dist.commands.data_verify import Tally, problems, verify
from qwenimg_dist.data.facets import Dataset, Part
from qwenimg_dist.schema import DEDUP, LISTING, ROWS, SCAN
from tests.helpers.picture_dataset import TEXT, PictureDataset, make_picture_dataset

Damage = Callable[[PictureDataset], Path]


def tar_of(made: PictureDataset, facet: str, unit: int = 1) -> Path:
    return made.dataset.tar(facet, made.dataset.tars(Part(facet=facet, unit=unit, part=0))[0].name)


def edit(made: PictureDataset, part: Part, change: Callable[[pa.Table], pa.Table]) -> Path:
    """Rewrite a committed parquet, which nobody may do: the commit record stays."""
    file = made.dataset.parquet(part)
    table = pq.read_table(file)
    changed = change(table).replace_schema_metadata(table.schema.metadata)
    file.unlink()
    pq.write_table(changed, file)
    return file


def _flip(made: PictureDataset) -> Path:
    file = tar_of(made, made.latents[64])
    with open(file, "r+b") as handle:
        handle.seek(2000)
        byte = handle.read(1)
        handle.seek(2000)
        handle.write(bytes([byte[0] ^ 1]))
    return file


def _cut(made: PictureDataset) -> Path:
    file = tar_of(made, TEXT)
    os.truncate(file, file.stat().st_size - 512)
    return file


def _remove_tar(made: PictureDataset) -> Path:
    file = tar_of(made, TEXT)
    file.unlink()
    return file


def _garble_parquet(made: PictureDataset) -> Path:
    file = made.dataset.parquet(Part(facet=SCAN, unit=1, part=0))
    file.write_bytes(b"PAR1 nothing PAR1")
    return file


def _no_commit_record(made: PictureDataset) -> Path:
    file = made.dataset.parquet(Part(facet=DEDUP, unit=1, part=0))
    table = pq.read_table(file).replace_schema_metadata({})
    pq.write_table(table, file)
    return file


def _other_schema(made: PictureDataset) -> Path:
    file = made.dataset.parquet(Part(facet=ROWS, unit=1, part=0))
    table = pq.read_table(file)
    meta = json.loads(table.schema.metadata[b"qwenimg_dist"])
    meta["schema_version"] = 99
    pq.write_table(table.replace_schema_metadata({b"qwenimg_dist": json.dumps(meta).encode()}), file)
    return file


def _moved_place(made: PictureDataset) -> Path:
    part = Part(facet=made.latents[64], unit=1, part=0)

    def change(table: pa.Table) -> pa.Table:
        places = table["offset"].to_pylist()
        places[0] += 2
        at = table.column_names.index("offset")
        return table.set_column(at, "offset", pa.array(places, pa.int64()))

    edit(made, part, change)
    return tar_of(made, made.latents[64])


def _lost_index_row(made: PictureDataset) -> Path:
    edit(made, Part(facet=TEXT, unit=1, part=0), lambda table: table.slice(1))
    return tar_of(made, TEXT)


def _lost_decision(made: PictureDataset) -> Path:
    return edit(made, Part(facet=ROWS, unit=1, part=0), lambda table: table.slice(1))


def _repeated_row(made: PictureDataset) -> Path:
    part = Part(facet=DEDUP, unit=1, part=0)
    return edit(made, part, lambda table: pa.concat_tables([table, table.slice(0, 1)]))


def _missing_column(made: PictureDataset) -> Path:
    return edit(made, Part(facet=SCAN, unit=1, part=0), lambda table: table.drop_columns(["sha256"]))


def _lost_part(made: PictureDataset) -> Path:
    made.dataset.parquet(Part(facet=made.latents[96], unit=1, part=0)).unlink()
    return made.dataset.parquet(Part(facet=ROWS, unit=1, part=0))


def _lost_listing(made: PictureDataset) -> Path:
    made.dataset.parquet(Part(facet=LISTING, unit=1, part=0)).unlink()
    return made.dataset.root / DEDUP / "unit-000001.000.parquet"


def _repeated_key(made: PictureDataset) -> Path:
    """A key of unit 0 once more in unit 1, consistently in every facet that has keys."""
    first = made.dataset.read(Part(facet=LISTING, unit=0, part=0))["key"][9].as_py()

    def change(table: pa.Table) -> pa.Table:
        keys = [first if row == 19 else key for row, key in zip(table["row"].to_pylist(), table["key"].to_pylist())]
        return table.set_column(table.column_names.index("key"), "key", pa.array(keys))

    edit(made, Part(facet=ROWS, unit=1, part=0), change)
    return edit(made, Part(facet=LISTING, unit=1, part=0), change)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "a flipped bit": (_flip, "another sha256"),
    "a cut tar": (_cut, "bytes, committed were"),
    "a tar that is gone": (_remove_tar, "is missing"),
    "a garbled parquet": (_garble_parquet, "is damaged"),
    "a parquet without commit record": (_no_commit_record, "no readable commit record"),
    "another schema": (_other_schema, "schema version 99"),
    "an index row that points elsewhere": (_moved_place, "lie elsewhere"),
    "a lost index row": (_lost_index_row, "index does not name"),
    "a lost decision": (_lost_decision, "no decision on 1 listed rows (first: row 16)"),
    "a repeated row": (_repeated_row, "1 rows more than once (first: 16)"),
    "a missing column": (_missing_column, "sha256 (string, found None)"),
    "a lost part": (_lost_part, "of which 0 are there"),
    "a lost listing": (_lost_listing, "no listing part"),
    "a repeated key": (_repeated_key, "has the key"),
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> PictureDataset:
    return make_picture_dataset(tmp_path_factory.mktemp("pristine"), rows=20, source=False)


@pytest.fixture
def made(pristine: PictureDataset, tmp_path: Path) -> PictureDataset:
    return pristine.copy(tmp_path)


def told(dataset: Dataset) -> tuple[int, str]:
    out = io.StringIO()
    code = verify(dataset, Console(file=out, width=100))
    return code, out.getvalue()


def test_a_sound_data_set_passes(made: PictureDataset) -> None:
    tally = Tally()
    assert list(problems(made.dataset, tally)) == []
    assert (tally.rows, tally.parts) == (20, 2 * 7)
    assert tally.tars > 6  # latents of a unit spread over several tars
    code, text = told(made.dataset)
    assert code == 0
    assert "sound" in text


def test_it_says_how_far_it_is(made: PictureDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_reading, "_LINE_EVERY_S", 0.0)
    code, text = told(made.dataset)
    assert code == 0
    lines = re.findall(r"^read ([\d.]+) (\w+) of ([\d.]+) (\w+), .*/s, about \d+ s left$", text, re.MULTILINE)
    assert lines
    assert lines[-1][:2] == lines[-1][2:]  # all of it
    assert "1 of 2 units compared" in text


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(made: PictureDataset, name: str) -> None:
    damage, said = DAMAGES[name]
    file = damage(made)
    found = list(problems(made.dataset, Tally()))
    assert any(said in p.what for p in found), found
    problem = next(p for p in found if said in p.what)
    assert problem.file == str(file.relative_to(made.dataset.root))
    assert problem.unit == 1
    assert problem.remedy
    assert told(made.dataset)[0] == 1


def test_a_lost_caption_is_named(made: PictureDataset) -> None:
    """Index and tar agree, but a kept row's caption has no features."""
    part = Part(facet=TEXT, unit=1, part=0)
    for tar in made.dataset.tars(part):
        made.dataset.tar(TEXT, tar.name).unlink()
    table = made.dataset.read(part).slice(0, 0)
    made.dataset.parquet(part).unlink()
    made.dataset.commit(part, table, config_hash="test")
    found = list(problems(made.dataset, Tally()))
    assert len(found) == 1
    assert "lacks the features of" in found[0].what


def test_lost_latents_are_named(made: PictureDataset) -> None:
    """Index and tar agree, but not every kept row that is large enough has latents."""
    part = Part(facet=made.latents[96], unit=1, part=0)
    for tar in made.dataset.tars(part):
        made.dataset.tar(part.facet, tar.name).unlink()
    table = made.dataset.read(part).slice(0, 0)
    made.dataset.parquet(part).unlink()
    made.dataset.commit(part, table, config_hash="test")
    found = list(problems(made.dataset, Tally()))
    assert [p.what for p in found] == ["lacks the latents of 2 kept rows that are large enough"]


def test_a_gap_in_the_parts_is_named(made: PictureDataset) -> None:
    rows = made.dataset.read(Part(facet=ROWS, unit=1, part=0))
    made.dataset.commit(Part(facet=ROWS, unit=1, part=2), rows, config_hash="test")
    found = list(problems(made.dataset, Tally()))
    assert any("is one of parts [0, 2]" in p.what for p in found)


def test_leftovers_are_noted_and_no_problem(made: PictureDataset) -> None:
    (made.dataset.root / TEXT / ".tmp-unit-000002.000-x-000.tar-1").write_bytes(b"half")
    (made.dataset.root / TEXT / "unit-000002.000-abcd-000.tar").write_bytes(b"whole, not named")
    code, text = told(made.dataset)
    assert code == 0
    assert text.count("left by a killed or working `produce`") == 2


def test_an_unfinished_unit_is_noted(made: PictureDataset) -> None:
    made.dataset.parquet(Part(facet=ROWS, unit=1, part=0)).unlink()
    code, text = told(made.dataset)
    assert code == 0
    assert "1 listed units are not finished (first: 1)" in text


def test_a_tar_with_a_strange_order_is_named(made: PictureDataset, tmp_path: Path) -> None:
    from qwenimg_dist.commands.data_tar import check_tar
    from qwenimg_dist.data.facets import Tar

    file = tmp_path / "odd.tar"
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("a.safetensors", "a.json"):
            member = tarfile.TarInfo(name)
            member.size = 2
            tar.addfile(member, io.BytesIO(b"{}"))
    import hashlib

    sha = hashlib.sha256(file.read_bytes()).hexdigest()
    wrong = check_tar(file, Tar(name=file.name, sha256=sha, size_bytes=file.stat().st_size), {})
    assert wrong
    assert "too short" in wrong[0]
