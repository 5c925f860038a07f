"""`produce` as a user runs it: real Ray, the tiny pipeline, mixed photos, bad input, a full disk, signals."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from photo_folder import PhotoFolder, photo, write_photo_folder
from PIL import Image, ImageOps
from produce_command import TIMEOUT_S, produce, start, tree_hash, wait_for
from producer_world import rows_of
from safetensors.torch import load as load_safetensors
from skimage.metrics import structural_similarity
from wandb_file import finished, offline_files

from producers.sources.base import encode_uri
from qwenimg_dist.commands.main import main
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.data.origin import Origin, read_origin
from qwenimg_dist.models.tiny import tiny_pipeline_dir
from qwenimg_dist.models.vae import LatentCodec
from qwenimg_dist.schema import CAPTIONS_PREFIX, LISTING, ROWS, caption_key, is_dedup

RESOLUTIONS = "encode.resolutions=[64,128]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> PhotoFolder:
    return write_photo_folder(tmp_path_factory.mktemp("photos") / "source")


@pytest.fixture(scope="module")
def words(folder: PhotoFolder) -> list[str]:
    return [f"source.path={folder.root}", f"data.path={folder.root.parent / 'data'}", "data.unit_size=8", RESOLUTIONS]


@pytest.fixture(scope="module")
def made(folder: PhotoFolder, words: list[str]) -> Dataset:
    done = produce(*words, "logger=offline")
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in ("listed", "readable", "unique", "admitted", "encoded 64 px", "encoded 128 px", "truncated"):
        assert stage in done.stdout
    assert "images/s" in done.stdout
    assert done.stdout.startswith("model tiny (a toy, for demos), 64 and 128 px, 1 producer on cpu\nwarning: no model=")
    assert "look closer: qwenimg-dist data inspect" in done.stdout
    dataset = Dataset.open(folder.root.parent / "data")
    assert read_origin(dataset) == Origin(kind="folder", root=str(folder.root))
    return dataset


def facet_at(dataset: Dataset, resolution: int) -> str:
    return next(name for name in dataset.facets() if name.startswith(f"latents-{resolution}-"))


def uris(dataset: Dataset) -> dict[int, str]:
    return {row: entry["uri"] for row, entry in rows_of(dataset, LISTING).items()}


def test_every_file_has_a_row_and_every_loss_its_reason(made: Dataset, folder: PhotoFolder) -> None:
    decided, names = rows_of(made, ROWS), uris(made)
    assert len(decided) == folder.num_files + 1  # and the one that metadata names, but is not there
    lost = {names[row]: entry["reason"] for row, entry in decided.items() if entry["status"] != "kept"}
    assert lost == folder.reasons
    assert {names[row] for row, entry in decided.items() if entry["status"] == "kept"} == {
        encode_uri(name) for name in folder.upright
    }
    complete = json.loads((made.root / "source-complete.json").read_text())
    assert complete == {"units": len(made.units(LISTING)), "rows": len(decided)}


def test_the_figures_and_the_funnel_are_in_wandb_s_offline_file(made: Dataset) -> None:
    (file,) = offline_files(made.root / ".tracking")  # hidden: it is no facet
    found = finished(file)
    assert (found.run.run_group, found.run.job_type) == (made.root.name, "produce")
    last = next(line for line in reversed(found.history) if "produce/kept" in line)
    assert last["produce/units"] == len(made.units(ROWS))
    assert last["produce/kept"] == sum(row["status"] == "kept" for row in rows_of(made, ROWS).values()) > 0
    assert [key for line in found.history for key in line if key.startswith("produce/") and key.endswith("/path")]


def test_records_name_the_parts_and_count_the_reasons(made: Dataset) -> None:
    for unit in made.units(ROWS):
        meta = made.meta([part for part in made.parts(ROWS) if part.unit == unit][-1])
        table = made.read_unit(ROWS, unit)
        assert table is not None
        reasons = [reason or "kept" for reason in table["reason"].to_pylist()]
        assert meta["counts"] == {reason: reasons.count(reason) for reason in set(reasons)}
        assert set(meta["inputs"]) == {f for f in made.facets() if f != ROWS and not f.startswith(CAPTIONS_PREFIX)}
        assert set(meta["inputs"].values()) == {1}


def test_decoded_latents_resemble_the_upright_original(made: Dataset, folder: PhotoFolder) -> None:
    codec = LatentCodec.load(tiny_pipeline_dir())
    facet, names = facet_at(made, 128), uris(made)
    upright = {encode_uri(name): picture for name, picture in folder.upright.items()}
    scores = []
    for row, entry in rows_of(made, facet).items():
        sample = read_samples(made, facet)[entry["key"]]
        height, width = entry["bucket_height"], entry["bucket_width"]
        assert sample["mean"].shape == (16, height // 8, width // 8)
        assert sample["mean"].dtype == torch.bfloat16
        original = ImageOps.fit(upright[names[row]], (width, height), Image.Resampling.LANCZOS)
        wanted = np.asarray(original, dtype=np.uint8)
        best = similarity(decoded(codec, encoded(codec, wanted)), wanted)
        got = similarity(decoded(codec, sample["mean"].float()), wanted)
        assert got > similarity(decoded(codec, sample["mean"].float()), wanted[::-1, ::-1]) + 0.1, names[row]
        assert got > best - 0.05, f"{names[row]}: the VAE could do {best:.2f}, the shard gives {got:.2f}"
        scores.append(got)
    assert len(scores) == len(folder.upright)
    assert np.mean(scores) > 0.6  # the tiny VAE cannot hold noise; what it can do was compared above


def test_stock_webdataset_reads_every_tar(made: Dataset) -> None:
    tars = sorted(made.root.rglob("*.tar"))
    assert tars
    keys = {facet: set() for facet in made.facets()}  # type: ignore[var-annotated]
    for tar in tars:
        for sample in webdataset.WebDataset(str(tar), shardshuffle=False):
            assert json.loads(sample["json"])
            assert load_safetensors(sample["safetensors"])
            keys[tar.parent.name].add(sample["__key__"])
    kept = {entry["key"] for entry in rows_of(made, ROWS).values() if entry["status"] == "kept"}
    assert keys[facet_at(made, 64)] == kept
    text = next(facet for facet in made.facets() if facet.startswith("text-"))
    assert {caption_key(""), caption_key("two captions"), caption_key("of one picture")} <= keys[text]


def test_the_same_command_again_has_nothing_to_do(made: Dataset, words: list[str]) -> None:
    before = tree_hash(made.root)
    done = produce(*words)
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stdout
    assert tree_hash(made.root) == before


@pytest.mark.parametrize("signal_number", [signal.SIGTERM])
def test_following_takes_new_files_captions_and_resolutions_until_told_to_stop(
    made: Dataset, folder: PhotoFolder, words: list[str], signal_number: signal.Signals
) -> None:
    old_tars = {file: file.stat().st_mtime_ns for file in made.root.rglob("*.tar")}
    num_rows = len(rows_of(made, LISTING))
    (folder.root / "lossless.txt").write_text("another caption")
    process = start(*words[:-1], "encode.resolutions=[64,96,128]", "follow=true")
    try:
        wait_for(made.root, "source-complete.json", gone_first=True)
        assert facet_at(made, 96)
        photo(30, 130, 130).save(folder.root / "AAA-late.png")
        (folder.root / "AAA-late.txt").write_text("came late, though its name sorts first")
        wait_for(made.root, "source-complete.json", gone_first=True)
        process.send_signal(signal_number)
        out, err = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    assert process.returncode == 0, out + err
    listed, decided = rows_of(made, LISTING), rows_of(made, ROWS)
    assert listed[num_rows]["uri"] == "AAA-late.png"
    assert decided[num_rows]["status"] == "kept"
    recaptioned = next(entry for entry in listed.values() if entry["uri"] == "lossless.png")
    assert recaptioned["captions"] == ["another caption"]
    text = next(facet for facet in made.facets() if facet.startswith("text-"))
    assert caption_key("another caption") in {key for _, key in rows_of(made, text)}
    kept = {row for row, entry in decided.items() if entry["status"] == "kept"}
    assert rows_of(made, facet_at(made, 96)).keys() == kept
    assert {file: file.stat().st_mtime_ns for file in old_tars} == old_tars
    assert not made.strays()
    settled = next(filter(is_dedup, made.facets()))
    assert len(rows_of(made, settled)) >= len(kept)


BAD: dict[str, tuple[list[str], str]] = {
    "empty folder": (["source.path={empty}"], "holds no pictures"),
    "no captions": (["source.path={bare}"], "none of its 2 pictures has a caption"),
    "no such folder": (["source.path={root}/nowhere"], "is not a folder that can be read"),
    "a file, not a folder": (["source.path={bare}/a.png"], "is not a folder that can be read"),
    "source unset": ([], "source.path is not set"),
    "data unset": (["source.path={bare}", "data.path=null"], "data.path is not set"),
    "bad metadata": (["source.path={bad}"], "metadata.jsonl, line 2"),
    "metadata without a name": (["source.path={nameless}"], 'line 1: has no "file_name"'),
    "metadata asked for": (["source.path={bare}", "source.captions=metadata"], "there is no metadata.jsonl"),
    "unknown override": (["source.path={bare}", "encode.resolution=64"], "did you mean 'encode.resolutions'"),
    "unknown filter key": (["source.path={good}", "+filters.aspect.max_ration=2"], "did you mean 'max_ratio'"),
    "unknown filter": (["source.path={good}", "+filters.aspekt.max_ratio=2"], "did you mean 'aspect'"),
    "filter value": (["source.path={good}", "filters.aspect.max_ratio=0.5"], "filters.aspect.max_ratio"),
    "bad aspect": (["source.path={good}", "encode.aspects=['16x9']"], "is not an aspect ratio"),
    "manifest missing": (["source=manifest", "source.path={root}/no.jsonl"], "is not a file that can be read"),
    "manifest of what": (["source=manifest", "source.path={root}/list.csv"], "a .jsonl or a .parquet"),
    "manifest column": (["source=manifest", "source.path={manifest}"], "line 2: has no uri in 'uri'"),
    "no such model": (["source.path={good}", "model.path={root}/model"], "no such directory"),
    "other unit size": (["source.path={good}", "data.unit_size=9", "data.path={made}"], "data.unit_size=4"),
}


@pytest.fixture(scope="module")
def bad_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bad")
    for name in ("empty", "bare", "bad", "nameless", "good"):
        (root / name).mkdir()
    for name in ("a.png", "b.png"):
        photo(1, 70, 70).save(root / "bare" / name)
    photo(1, 70, 70).save(root / "good" / "a.png")
    (root / "good" / "a.txt").write_text("fine")
    (root / "bad" / "metadata.jsonl").write_text('\n{"file_name": \n')
    (root / "nameless" / "metadata.jsonl").write_text('{"text": "x"}\n')
    (root / "manifest.jsonl").write_text('\n{"url": "b.png"}\n')
    Dataset.create(root / "made", 4)
    return root


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_written(
    bad_inputs: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args, message = BAD[case]
    places: dict[str, Any] = {name: bad_inputs / name for name in ("empty", "bare", "bad", "nameless", "good", "made")}
    filled = [word.format(root=bad_inputs, manifest=bad_inputs / "manifest.jsonl", **places) for word in args]
    given = filled if any(word.startswith("data.path") for word in filled) else [f"data.path={bad_inputs}/new", *filled]
    before = tree_hash(bad_inputs)
    assert main(["produce", *given]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("error: ")
    assert tree_hash(bad_inputs) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 1.5 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "none", str(place)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("may not mount a small file system here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_named_and_costs_nothing_that_was_committed(small_disk: Path, tmp_path: Path) -> None:
    for number in range(24):
        photo(number, 70, 70).save(tmp_path / f"{number:02d}.png")
        (tmp_path / f"{number:02d}.txt").write_text(f"picture {number} " + "with a long caption " * 12)
    words = [f"source.path={tmp_path}", f"data.path={small_disk}/data", "data.unit_size=2", "encode.resolutions=[64]"]
    words.append("filters.caption_validity.enabled=false")  # the long captions repeat themselves
    full = produce(*words, "encode.dtype=float32")
    assert full.returncode == 1, full.stdout + full.stderr
    assert "disk" in full.stderr
    assert "full" in full.stderr
    dataset = Dataset.open(small_disk / "data")
    committed = {part: dataset.meta(part)["inputs"] for part in dataset.parts(ROWS)}
    assert committed
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    again = produce(*words, "encode.dtype=float32")
    assert again.returncode == 0, again.stdout + again.stderr
    assert {part: dataset.meta(part)["inputs"] for part in committed} == committed
    assert len(rows_of(dataset, ROWS)) == 24
    assert not dataset.strays()


def read_samples(dataset: Dataset, facet: str) -> dict[str, dict[str, torch.Tensor]]:
    return {
        sample["__key__"]: load_safetensors(sample["safetensors"])
        for tar in sorted((dataset.root / facet).glob("*.tar"))
        for sample in webdataset.WebDataset(str(tar), shardshuffle=False)
    }


def encoded(codec: LatentCodec, pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> torch.Tensor:
    images = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    return codec.encode(images)[0][0]


def decoded(codec: LatentCodec, latents: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    image = codec.decode(latents[None])[0].clamp(-1, 1)
    return ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


def similarity(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    return float(structural_similarity(a, b, channel_axis=2, data_range=255))
