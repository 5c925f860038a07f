"""A folder of every kind of hostile file, through the real `produce`: all accounted for, and what is kept is right."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hostile_folder import HostileFolder, encoded, scene, write_hostile_folder
from PIL import Image, ImageOps
from produce_command import produce
from producer_world import FakeEncoders, make_plan_for, produce_here, rows_of

from producers.listing import sync_listing
from producers.load import load_image
from producers.sources import open_source
from producers.sources.base import encode_uri, read_bytes
from qwenimg_dist.commands.main import main
from qwenimg_dist.compose import load_config
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.models.tiny import tiny_pipeline_dir
from qwenimg_dist.models.vae import LatentCodec
from qwenimg_dist.schema import LISTING, ROWS, caption_key

Pixels = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> HostileFolder:
    return write_hostile_folder(tmp_path_factory.mktemp("hostile") / "source")


@pytest.fixture(scope="module")
def made(folder: HostileFolder) -> Dataset:
    data = folder.root.parent / "data"
    words = [f"source.path={folder.root}", f"data.path={data}", "data.unit_size=64", "encode.resolutions=[64]"]
    done = produce(*words, "filter_set=qwen_image_2512")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return Dataset.open(data)


@pytest.fixture(scope="module")
def by_uri(made: Dataset) -> dict[str, dict[str, Any]]:
    """uri -> what was listed and decided."""
    decided = rows_of(made, ROWS)
    return {entry["uri"]: {**entry, **decided[row]} for row, entry in rows_of(made, LISTING).items()}


def kept_pictures(folder: HostileFolder) -> dict[str, Image.Image]:
    return {encode_uri(name): seen for name, seen in folder.expected.items() if isinstance(seen, Image.Image)}


def test_every_file_is_kept_or_lost_for_its_reason(folder: HostileFolder, by_uri: Mapping[str, Any]) -> None:
    wanted = {encode_uri(name): one if isinstance(one, str) else "" for name, one in folder.expected.items()}
    got = {uri: entry["reason"] for uri, entry in by_uri.items()}
    assert got == wanted
    assert len(kept_pictures(folder)) > 80
    assert all((entry["status"] == "kept") == (entry["reason"] == "") for entry in by_uri.values())
    assert all(entry["detail"] for entry in by_uri.values() if entry["status"] != "kept")


def test_kept_files_are_upright_and_in_their_own_colours(folder: HostileFolder) -> None:
    for uri, seen in kept_pictures(folder).items():
        loaded = load_image(read_bytes(str(folder.root), uri)).image
        assert loaded.size == seen.size, uri
        assert difference(np.asarray(loaded), np.asarray(seen)) < 4, uri
        assert difference(np.asarray(loaded), np.asarray(ImageOps.mirror(seen))) > 12, uri


def test_the_shards_hold_them_upright_undistorted_and_in_their_own_colours(
    made: Dataset, folder: HostileFolder, by_uri: Mapping[str, Any]
) -> None:
    codec = LatentCodec.load(tiny_pipeline_dir())
    facet = next(name for name in made.facets() if name.startswith("latents-64-"))
    latents = {entry["key"]: entry for entry in rows_of(made, facet).values()}
    pictures = kept_pictures(folder)
    assert latents.keys() == {by_uri[uri]["key"] for uri in pictures}
    for uri, seen in pictures.items():
        entry = latents[by_uri[uri]["key"]]
        # An independent way to the bucket: centred, never squashed.
        size = (entry["bucket_width"], entry["bucket_height"])
        wanted = np.asarray(ImageOps.fit(seen, size, Image.Resampling.LANCZOS))
        got = decoded(codec, stored(made, facet, entry))
        best = decoded(codec, codec.encode(as_batch(wanted))[0])
        assert difference(got, best) < 5, uri
        assert difference(got, wanted) < difference(best, wanted) + 3, uri


def test_captions_come_through_unchanged(made: Dataset, folder: HostileFolder, by_uri: Mapping[str, Any]) -> None:
    assert {uri: by_uri[uri]["captions"] for uri in folder.captions} == {
        uri: [text] for uri, text in folder.captions.items()
    }
    assert by_uri["described/twice.png"]["captions"] == ["said first", "said second"]
    facet = next(name for name in made.facets() if name.startswith("text-"))
    texts = {key for _, key in rows_of(made, facet)}
    kept = {text for entry in by_uri.values() if entry["status"] == "kept" for text in entry["captions"]}
    assert texts == {caption_key(text) for text in kept | {""}}


def test_what_was_written_verifies_and_a_second_look_finds_nothing_new(made: Dataset, folder: HostileFolder) -> None:
    assert main(["data", "verify", f"data.path={made.root}"]) == 0
    source = open_source(load_config([f"source.path={folder.root}"]).source)

    def never() -> None:
        raise AssertionError("the listing changed")

    change = sync_listing(made, source.find().rows, config_hash="x", before_commit=never)
    assert (change.added, change.recaptioned, change.num_rows) == (0, 0, len(folder.expected))


BROKEN_METADATA: dict[str, tuple[bytes, str]] = {
    "torn": (b'{"file_name": "a.png", "text": "x"}\n{"file_name": "b.p', "line 2: is not JSON"),
    "binary": (bytes(range(256)), "line 1: is not JSON"),
    "utf-16": ('{"file_name": "a.png", "text": "x"}'.encode("utf-16"), "line 1: is not JSON"),
    "a list": (b'["a.png", "x"]\n', "line 1: is not a JSON object"),
    "nested": (b"[" * 100_000, "line 1: is not JSON"),
    "nameless": (b'\n\n{"text": "x"}\n', 'line 3: has no "file_name"'),
    "number": (b'{"file_name": 7, "text": "x"}\n', 'line 1: has no "file_name"'),
    "half a character": (rb'{"file_name": "\ud83d.png", "text": "x"}', "holds half a character"),
}


@pytest.mark.parametrize("case", BROKEN_METADATA)
def test_a_broken_line_of_metadata_is_a_fault_of_its_own(case: str, tmp_path: Path) -> None:
    """Whose captions such a line holds cannot be known: it gets a row that names file, line and reason."""
    content, message = BROKEN_METADATA[case]
    (tmp_path / "source" / "deep").mkdir(parents=True)
    (tmp_path / "source" / "a.png").write_bytes(encoded(scene(1, 96, 96)))
    (tmp_path / "source" / "a.txt").write_text("a picture")
    (tmp_path / "source" / "deep" / "metadata.jsonl").write_bytes(content)
    dataset = Dataset.create(tmp_path / "data", 4)
    produce_here(tmp_path / "source", dataset, make_plan_for(), FakeEncoders())
    decided = list(rows_of(dataset, ROWS).values())
    assert decided[0]["status"] == "kept"
    assert {entry["status"] for entry in decided[1:]} == {"fault"}
    broken = next(entry for entry in decided if entry["reason"] == "bad_row")
    assert message in broken["detail"]
    assert broken["detail"].startswith(f"{tmp_path / 'source' / 'deep' / 'metadata.jsonl'}, line ")
    assert rows_of(dataset, LISTING)[broken["row"]]["uri"].startswith("line:deep/metadata.jsonl#")
    assert produce_here(tmp_path / "source", dataset, make_plan_for(), FakeEncoders()) == []


def stored(dataset: Dataset, facet: str, entry: Mapping[str, Any]) -> torch.Tensor:
    """(1, 16, h, w) of a row, read by its place alone."""
    with open(dataset.tar(facet, entry["tar"]), "rb") as file:
        file.seek(entry["offset"])
        data = bytearray(file.read(entry["nbytes"]))
    assert entry["dtype"] == "bfloat16"
    return torch.frombuffer(data, dtype=torch.bfloat16).reshape(1, *entry["shape"]).float()


def as_batch(pixels: Pixels) -> torch.Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def decoded(codec: LatentCodec, latents: torch.Tensor) -> Pixels:
    image = codec.decode(latents)[0].clamp(-1, 1)
    return ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


def difference(a: Pixels, b: Pixels) -> float:
    """Mean absolute difference, levels of 255."""
    return float(np.abs(a.astype(np.int16) - b.astype(np.int16)).mean())
