"""Another source with the same names is refused before anything is written; one that moved goes on."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from producer_world import FakeEncoders, draw, load_config_once, make_plan_for, produce_here, rows_of
from tar_samples import write_tar

from producers.progress import ProduceProgress
from producers.sources import open_source
from qwenimg_dist.commands import produce
from qwenimg_dist.data.facets import DataError, Dataset
from qwenimg_dist.data.origin import Origin, read_origin, remember_origin
from qwenimg_dist.schema import LISTING

UNIT = 4


class Silent(ProduceProgress):
    def __init__(self) -> None: ...

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *args: object) -> None: ...

    def begin(self, num_units: int) -> None: ...

    def say(self, text: str) -> None: ...


def folder(root: Path, first: int, names: range = range(6)) -> Path:
    for name in names:
        draw(root / f"{name:04d}.png", first + name, caption=f"caption {first + name}")
    return root


def tars(root: Path, first: int, names: range = range(6)) -> Path:
    made = folder(root.with_name(f"{root.name}-pictures"), first, names)
    write_tar(root / "00000.tar", [(file.name, file.read_bytes()) for file in sorted(made.iterdir())])
    return root


def drive(root: Path, data: Path, kind: str) -> bool:
    """The command's own way, which starts no Ray where nothing is to be done."""
    config = load_config_once((f"source={kind}", f"source.path={root}", f"data.path={data}", f"data.unit_size={UNIT}"))
    source = open_source(config.source)
    production = produce.Production(
        config=config, source=source, found=source.find(), pipeline_dir=root, plan=make_plan_for()
    )
    return produce.drive(production, Silent(), threading.Event())


def made_from(root: Path, data: Path, kind: str) -> Dataset:
    dataset = Dataset.create(data, UNIT)
    produce_here(root, dataset, make_plan_for(), FakeEncoders(), f"source={kind}")
    remember_origin(dataset, Origin(kind=kind, root=str(root)))
    return dataset


def state(data: Path) -> dict[str, str]:
    files = (file for file in data.rglob("*") if file.is_file() and not file.name.startswith("."))
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize(("kind", "make"), [("folder", folder), ("webdataset", tars)])
def test_another_source_with_the_same_names_is_refused_and_one_that_moved_goes_on(
    tmp_path: Path, kind: str, make: Callable[[Path, int], Path]
) -> None:
    first, second, data = make(tmp_path / "a", 0), make(tmp_path / "b", 100), tmp_path / "data"
    dataset = made_from(first, data, kind)
    before = state(data)
    with pytest.raises(DataError, match=rf"{first}, and {second} has others.*6 of 6 compared differ.*data\.path"):
        drive(second, data, kind)
    assert state(data) == before
    moved = first.rename(tmp_path / "moved")
    assert drive(moved, data, kind)
    assert read_origin(dataset) == Origin(kind=kind, root=str(moved))
    assert {name: digest for name, digest in state(data).items() if not name.endswith("source.json")} == {
        name: digest for name, digest in before.items() if not name.endswith("source.json")
    }


def test_a_moved_source_of_which_single_files_changed_goes_on(tmp_path: Path) -> None:
    made_from(folder(tmp_path / "a", 0), tmp_path / "data", "folder")
    moved = (tmp_path / "a").rename(tmp_path / "moved")
    draw(moved / "0002.png", 77)
    assert drive(moved, tmp_path / "data", "folder")


def test_what_another_source_names_again_is_found_among_its_new_rows(tmp_path: Path) -> None:
    made_from(folder(tmp_path / "a", 0, range(10, 16)), tmp_path / "data", "folder")
    with pytest.raises(DataError, match=r"0015\.png; 1 of 1 compared differ"):
        drive(folder(tmp_path / "b", 100, range(15, 40)), tmp_path / "data", "folder")


def test_rows_that_stand_where_they_stood_are_not_read(tmp_path: Path) -> None:
    """Absolute paths mean the same file, wherever the list lies."""
    made = folder(tmp_path / "pictures", 0)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        lines = [f'{{"uri": "{file}", "caption": "words"}}\n' for file in sorted(made.glob("*.png"))]
        (tmp_path / name / "list.jsonl").write_text("".join(lines))
    dataset = made_from(tmp_path / "one" / "list.jsonl", tmp_path / "data", "manifest")
    remember_origin(dataset, Origin(kind="manifest", root=str(tmp_path / "one")))
    for file in made.glob("*.png"):
        draw(file, 99)  # would differ if it were compared
    assert drive(tmp_path / "two" / "list.jsonl", tmp_path / "data", "manifest")
    assert sorted(rows_of(dataset, LISTING)) == list(range(6))
