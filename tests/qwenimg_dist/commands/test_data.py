"""`data` finds its verb, refuses what does not belong, and its exit codes say what was found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwenimg_dist.commands.main import main
from qwenimg_dist.data.facets import Part
from qwenimg_dist.schema import ROWS
from tests.helpers.picture_dataset import PictureDataset, make_picture_dataset


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> PictureDataset:
    return make_picture_dataset(tmp_path_factory.mktemp("pristine"), rows=20, source=False)


@pytest.fixture
def made(pristine: PictureDataset, tmp_path: Path) -> PictureDataset:
    return pristine.copy(tmp_path)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "inspect, verify, repair, stats, freeze"),
        (["look"], "'look' does not exist"),
        (["stats"], "data.path is not set"),
        (["stats", "data.path=/nowhere"], "is not a data set"),
        (["verify", "data.path=/nowhere", "--json"], "--json does not belong"),
        (["freeze", "data.path=/nowhere", "--check"], "--check needs a file"),
        (["stats", "data.pth=x"], "did you mean"),
    ],
)
def test_unusable_input_is_named(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", *args]) == 2
    assert said in capsys.readouterr().err


def test_stats_as_json_and_as_tables(made: PictureDataset, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "stats", f"data.path={made.dataset.root}", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["funnel"]["admitted"] == 16
    assert told["captions_per_row"] == {"1": 16}
    assert sum(told["buckets"][made.latents[64]].values()) == 16
    assert main(["data", "stats", f"data.path={made.dataset.root}"]) == 0
    shown = capsys.readouterr().out
    assert all(title in shown for title in ("Funnel", "Not admitted", "Buckets", "Text lengths", "Disk"))


def test_freeze_and_what_differs_from_it(made: PictureDataset, capsys: pytest.CaptureFixture[str]) -> None:
    path = f"data.path={made.dataset.root}"
    assert main(["data", "freeze", path]) == 0
    digest = capsys.readouterr().out.split()[0]
    file = made.dataset.root / f"freeze-{digest}.json"
    assert main(["data", "freeze", path, "--check", str(file)]) == 0
    rows = made.dataset.read(Part(facet=ROWS, unit=0, part=0))
    made.dataset.commit(Part(facet=ROWS, unit=0, part=1), rows.slice(0, 0), config_hash="test")
    made.dataset.parquet(Part(facet=ROWS, unit=1, part=0)).unlink()
    capsys.readouterr()
    assert main(["data", "freeze", path, f"--check={file}"]) == 1
    said = capsys.readouterr().out
    assert "new: rows/unit-000000.001.parquet" in said
    assert "missing: rows/unit-000001.000.parquet" in said


def test_an_edited_freeze_is_refused(made: PictureDataset, capsys: pytest.CaptureFixture[str]) -> None:
    path = f"data.path={made.dataset.root}"
    main(["data", "freeze", path])
    file = next(made.dataset.root.glob("freeze-*.json"))
    content = json.loads(file.read_text())
    content["parts"].popitem()
    file.write_text(json.dumps(content))
    assert main(["data", "freeze", path, "--check", str(file)]) == 2
    assert "does not match its own digest" in capsys.readouterr().err


def test_the_digest_is_of_the_data_alone(tmp_path: Path) -> None:
    from qwenimg_dist.commands.data_freeze import freeze

    one = make_picture_dataset(tmp_path / "a", rows=20, source=False)
    two = make_picture_dataset(tmp_path / "b", rows=20, source=False)
    # Tar names hold the attempt's random token, so only facets without tars agree between two makings.
    plain = {name: sha for name, sha in freeze(one.dataset).parts.items() if name.startswith(("listing", "rows"))}
    assert plain == {name: sha for name, sha in freeze(two.dataset).parts.items() if name in plain}
    assert freeze(one.dataset).digest == freeze(one.dataset).digest
    assert freeze(one.dataset).digest != freeze(two.dataset).digest
