"""Range reads equal slices, exports load in stock diffusers, damage is named, ids follow content."""

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file

from qwenimg_dist.config import ModelConfig
from qwenimg_dist.models.pipeline import pipeline_dir
from qwenimg_dist.models.tiny import tiny_pipeline_dir
from qwenimg_dist.models.weights import (
    SafetensorsDirectory,
    TensorSource,
    WeightsError,
    fingerprint_component,
    resolve_pipeline,
    verify,
    write_sharded,
)


@pytest.fixture(scope="module")
def tiny() -> Path:
    return tiny_pipeline_dir()


def sources(tensors: dict[str, torch.Tensor]) -> list[TensorSource]:
    return [(name, t.shape, t.dtype, lambda t=t: t) for name, t in tensors.items()]  # type: ignore[misc]


def small_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(7, 5, generator=generator).to(torch.bfloat16),
        "a.weight": torch.randn(3, 4, 2, generator=generator),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "count": torch.arange(5),
    }


def test_reads_every_tensor_as_the_safetensors_library_does(tiny: Path) -> None:
    for component in ("transformer", "vae", "text_encoder"):
        weights = SafetensorsDirectory(tiny / component)
        (file,) = (tiny / component).glob("*.safetensors")
        reference = load_file(file)
        assert weights.names == sorted(reference)
        for name, tensor in reference.items():
            assert weights.shape(name) == tuple(tensor.shape)
            assert weights.dtype(name) == tensor.dtype
            assert torch.equal(weights.read(name), tensor)


def test_flat_range_reads_equal_slices(tmp_path: Path) -> None:
    tensors = small_tensors()
    write_sharded(tmp_path, sources(tensors), max_shard_bytes=100)
    weights = SafetensorsDirectory(tmp_path)
    for name, tensor in tensors.items():
        flat = tensor.reshape(-1)
        for start in range(0, flat.numel() + 1, 3):
            for stop in range(start, flat.numel() + 1, 4):
                assert torch.equal(weights.read_flat_range(name, start, stop), flat[start:stop])
    for start, stop in ((-1, 2), (3, 2), (0, 36)):
        with pytest.raises(ValueError, match=r"b\.weight"):
            weights.read_flat_range("b.weight", start, stop)


def test_export_in_several_shards_loads_in_stock_diffusers(tiny: Path, tmp_path: Path) -> None:
    model = QwenImageTransformer2DModel.from_pretrained(tiny / "transformer")
    model.save_config(tmp_path)
    asked: list[str] = []

    def counted(name: str, tensor: torch.Tensor) -> torch.Tensor:
        asked.append(name)
        return tensor

    state = model.state_dict()
    files = write_sharded(
        tmp_path,
        [(name, t.shape, t.dtype, lambda n=name, t=t: counted(n, t)) for name, t in state.items()],
        max_shard_bytes=3_000_000,
    )
    assert len(files) > 2
    assert files[0].name == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    assert asked == list(state), "sources must be asked once each, in the given order"
    assert not list(tmp_path.glob(".*")), "no temporary file stays"
    again = QwenImageTransformer2DModel.from_pretrained(tmp_path).state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    assert max(f.stat().st_size for f in files) < 3_000_000 + 100_000


def test_export_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    given: list[weakref.ref[torch.Tensor]] = []

    def fresh() -> torch.Tensor:
        assert not [ref for ref in given if ref() is not None], "an earlier tensor is still held"
        tensor = torch.zeros(8)
        given.append(weakref.ref(tensor))
        return tensor

    write_sharded(tmp_path, [(f"w{i}", (8,), torch.float32, fresh) for i in range(6)], max_shard_bytes=64)
    assert len(given) == 6


def test_one_shard_has_no_index_and_mixed_dtypes_are_aligned(tmp_path: Path) -> None:
    tensors = small_tensors()
    (file,) = write_sharded(tmp_path, sources(tensors))
    assert file.name == "diffusion_pytorch_model.safetensors"
    assert not list(tmp_path.glob("*.index.json"))
    loaded = load_file(file)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    for entry in SafetensorsDirectory(tmp_path).entries.values():
        assert entry.start % entry.dtype.itemsize == 0


def test_interrupted_export_leaves_nothing_loadable_and_can_be_repeated(tmp_path: Path) -> None:
    tensors = small_tensors()

    def fails() -> torch.Tensor:
        raise OSError("disk full")

    broken = [*sources(tensors), ("last", (1,), torch.float32, fails)]
    with pytest.raises(OSError, match="disk full"):
        write_sharded(tmp_path, broken, max_shard_bytes=100)
    assert not list(tmp_path.iterdir())
    # What a SIGKILL between two renames leaves: a shard under its final name, without an index.
    stale = tmp_path / "diffusion_pytorch_model-00001-of-00009.safetensors"
    stale.write_bytes(b"torn")
    write_sharded(tmp_path, sources(tensors), max_shard_bytes=100)
    assert not stale.exists()
    with pytest.raises(ValueError, match="exists"):
        write_sharded(tmp_path, sources(tensors))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (("w", (2,), torch.float32, lambda: torch.zeros(3)), "announced"),
        (("w", (2,), torch.float32, lambda: torch.zeros(2).bfloat16()), "announced"),
        (("w", (2,), torch.float32, lambda: torch.tensor([1.0, float("nan")])), "NaN"),
    ],
)
def test_export_refuses_what_was_not_announced(tmp_path: Path, source: TensorSource, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_sharded(tmp_path, [source])
    assert not list(tmp_path.iterdir())


def test_verify_names_the_difference(tmp_path: Path) -> None:
    write_sharded(tmp_path, [("w", (2,), torch.float32, lambda: torch.ones(2))])
    verify(tmp_path, [("w", (2,), torch.float32)])
    with pytest.raises(WeightsError, match="'w' is"):
        verify(tmp_path, [("w", (1, 2), torch.float32)])
    with pytest.raises(WeightsError, match=r"missing tensors \['v'\]"):
        verify(tmp_path, [("w", (2,), torch.float32), ("v", (2,), torch.float32)])


def write_raw(file: Path, header: dict[str, object], data: bytes) -> None:
    raw = json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def entry(begin: int, end: int, *, count: int | None = None) -> dict[str, object]:
    return {"dtype": "U8", "shape": [end - begin if count is None else count], "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "num_bytes", "message"),
    [
        ({"first": entry(0, 4), "second": entry(4, 8)}, 6, "truncated.*'second'"),
        ({"first": entry(0, 4), "second": entry(2, 6)}, 6, "'second' overlaps"),
        ({"first": entry(0, 4), "second": entry(6, 8)}, 8, "'second' leaves a gap"),
        ({"first": entry(0, 4)}, 9, "5 bytes after"),
        ({"first": entry(0, 4, count=3)}, 4, "'first'.*cannot lie in 4 bytes"),
        ({"first": {"dtype": "F6", "shape": [], "data_offsets": [0, 1]}}, 1, "'first' has dtype 'F6'"),
        ({"first": {"dtype": "U8"}}, 0, "'first'.*malformed"),
        ({"first": entry(-2, 2)}, 4, "'first'.*malformed"),
    ],
)
def test_damaged_headers_are_refused(tmp_path: Path, header: dict[str, object], num_bytes: int, message: str) -> None:
    write_raw(tmp_path / "model.safetensors", header, b"\0" * num_bytes)
    with pytest.raises(WeightsError, match=message) as error:
        SafetensorsDirectory(tmp_path)
    assert "model.safetensors" in str(error.value)


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_torn_file_is_detected_on_opening(tiny: Path, tmp_path: Path, keep: int) -> None:
    data = (tiny / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(data[:keep])
    with pytest.raises(WeightsError, match=r"diffusion_pytorch_model\.safetensors: (truncated|torn)"):
        SafetensorsDirectory(tmp_path)


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such component"):
        SafetensorsDirectory(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match="found nothing"):
        SafetensorsDirectory(tmp_path)
    files = write_sharded(tmp_path, sources(small_tensors()), max_shard_bytes=100)
    with pytest.raises(WeightsError, match="no tensor 'c'"):
        SafetensorsDirectory(tmp_path).read("c")
    files[-1].unlink()
    with pytest.raises(WeightsError, match=files[-1].name):
        SafetensorsDirectory(tmp_path)


def test_index_may_not_point_outside(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "outside.safetensors")
    inside = tmp_path / "inside"
    inside.mkdir()
    index = {"weight_map": {"w": "../outside.safetensors"}}
    (inside / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="outside the directory"):
        SafetensorsDirectory(inside)


def test_fingerprint_follows_content_not_packaging(tiny: Path, tmp_path: Path) -> None:
    original = fingerprint_component(tiny / "transformer")
    assert len(original) == 12
    resharded = tmp_path / "resharded"
    resharded.mkdir()
    config = json.loads((tiny / "transformer" / "config.json").read_text())
    (resharded / "config.json").write_text(json.dumps({**config, "_diffusers_version": "9.9"}))
    weights = SafetensorsDirectory(tiny / "transformer")
    tensors = {name: weights.read(name) for name in weights.names}
    write_sharded(resharded, sources(tensors), max_shard_bytes=2_000_000)
    assert fingerprint_component(resharded) == original

    (resharded / "config.json").write_text(json.dumps({**config, "num_layers": 5}))
    assert fingerprint_component(resharded) != original
    trained = tmp_path / "trained"
    shutil.copytree(tiny / "transformer", trained)
    (trained / "diffusion_pytorch_model.safetensors").unlink()
    write_sharded(trained, sources({name: t * (1 + 1e-3) for name, t in tensors.items()}))
    assert fingerprint_component(trained) != original
    assert fingerprint_component(tiny / "tokenizer") != fingerprint_component(tiny / "scheduler")


def test_resolve_pipeline(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_pipeline(str(tiny)) == tiny
    with pytest.raises(ValueError, match=r"model_index\.json is missing"):
        resolve_pipeline(str(tmp_path))
    with pytest.raises(ValueError, match="no such directory"):
        resolve_pipeline(str(tmp_path / "nowhere"))
    partial = tmp_path / "partial"
    shutil.copytree(tiny, partial, ignore=shutil.ignore_patterns("text_encoder"))
    with pytest.raises(ValueError, match="text_encoder"):
        resolve_pipeline(str(partial))
    assert resolve_pipeline(str(partial), components=["transformer", "vae"]) == partial
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"Qwen-Image-2512: no such directory.*pin it"):
        resolve_pipeline("Qwen/Qwen-Image-2512")


def test_pipeline_of_the_configured_model(tiny: Path) -> None:
    assert pipeline_dir(ModelConfig(name="tiny")) == tiny
    assert pipeline_dir(ModelConfig(name="other", path=str(tiny))) == tiny
    with pytest.raises(ValueError, match="model=qwen_image_2512"):
        pipeline_dir(ModelConfig(name="qwen_image_2512"))


def test_hub_id_offline_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"cannot get Qwen/Qwen-Image-2512 at revision abc.*model\.path to a local directory"
    ):
        resolve_pipeline("Qwen/Qwen-Image-2512", "abc", components=["vae"])
