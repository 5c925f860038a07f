"""The contact sheet of a data set made by the real encoders: pictures found again, latents decoded beside them."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from photo_folder import write_photo_folder
from PIL import Image
from producer_world import produce_here

from producers.encode import PipelineEncoders
from producers.plan import make_plan
from qwenimg_dist.commands.main import main
from qwenimg_dist.compose import load_config
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.data.origin import Origin, remember_origin
from qwenimg_dist.models.identity import latents_facet_names, text_facet_name
from qwenimg_dist.models.tiny import tiny_pipeline_dir

ENCODE = "encode.resolutions=[64,128]"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = write_photo_folder(tmp_path_factory.mktemp("photos") / "source")
    config, pipeline = load_config([ENCODE]), tiny_pipeline_dir()
    plan = make_plan(
        config,
        text_facet=text_facet_name(pipeline, config),
        latents_facets=latents_facet_names(pipeline, config),
    )
    dataset = Dataset.create(folder.root.parent / "data", 8)
    produce_here(folder.root, dataset, plan, PipelineEncoders.load(pipeline, config))
    remember_origin(dataset, Origin(kind="folder", root=str(folder.root)))
    return dataset


def rows_of_sheet(made: Dataset, out: Path, *words: str) -> list[dict[str, Any]]:
    assert main(["data", "inspect", f"data.path={made.root}", f"inspect.out={out}", *words]) == 0
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', out.read_text(), re.DOTALL)
    assert found is not None
    rows: list[dict[str, Any]] = json.loads(found[1])["rows"]
    return rows


def picture(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")


def small(image: Image.Image) -> npt.NDArray[np.float64]:
    return np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=np.float64)


def cropped(row: dict[str, Any], name: str) -> Image.Image:
    """The original as it went into a class."""
    place, original = row["places"][name], picture(row["thumb"])
    (top, left), (height, width) = place["crop"], place["bucket"]
    resized_height, resized_width = place["resized"]
    across, down = original.width / resized_width, original.height / resized_height
    return original.crop(
        (round(left * across), round(top * down), round((left + width) * across), round((top + height) * down))
    )


def test_what_the_model_sees_is_the_picture_beside_it(made: Dataset, tmp_path: Path) -> None:
    rows = rows_of_sheet(made, tmp_path / "sheet.html", ENCODE, "inspect.decode=true")
    kept = [row for row in rows if row["status"] == "kept"]
    assert len(kept) > 4
    assert all(row["thumb"] for row in kept)  # no source.path was given
    assert {row["decoded"][0] for row in kept} == {"128 px"}
    assert all(row["decoded"] is None for row in rows if row["status"] != "kept")
    originals = [small(cropped(row, "128 px")) for row in kept]
    for index, row in enumerate(kept):
        decoded = picture(row["decoded"][1])
        height, width = row["places"]["128 px"]["bucket"]
        assert decoded.size == (width, height)
        away = [float(np.abs(small(decoded) - original).mean()) for original in originals]
        assert away[index] < 20
        assert away[index] <= min(away) + 5  # some photos are near one another


def test_latents_of_another_encoder_are_not_decoded(
    made: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"data.path={made.root}", f"inspect.out={tmp_path / 'sheet.html'}", "inspect.decode=true"]
    assert main(["data", "inspect", *words, "encode.resolutions=[64]", "encode.posterior=mean_logvar"]) == 2
    said = capsys.readouterr().err
    assert "has no latents made by model=tiny" in said
    assert all(facet in said for facet in made.facets() if facet.startswith("latents-"))
