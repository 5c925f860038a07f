"""The same small run on a GPU: the CPU's numbers in fp32, and the compiled bf16 path with its resume."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_run import numbers, overrides, run_gang, write_input

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train_gpu")
    write_input(folder)
    return folder


def run(root: Path, name: str, *settings: str, device: str = "cuda") -> list[dict[str, object]]:
    """The numbers of a run on one rank."""
    command = ["-m", "consumers", *overrides(root, name, f"cluster.device={device}", *settings)]
    env = {"DS_ACCELERATOR": device}
    (ended,) = run_gang(command, 1, root / f"logs-{name}", env=env, timeout_s=400)
    assert ended.code == 0, ended.output[-4000:]
    return numbers(root / name)


def test_fp32_gives_the_numbers_of_the_cpu(root: Path) -> None:
    on_cpu = run(root, "cpu", "engine.precision=fp32", device="cpu")
    on_gpu = run(root, "gpu", "engine.precision=fp32")
    assert len(on_gpu) == len(on_cpu) == 12
    for here, there in zip(on_gpu, on_cpu, strict=True):
        assert here == pytest.approx(there, rel=1e-3)


def test_compiled_bf16_resumes_where_it_stopped(root: Path) -> None:
    settings = ("engine.precision=bf16", "engine.compile=true", "engine.activation_checkpointing=true")
    unbroken = run(root, "unbroken", *settings)
    run(root, "broken", *settings, "train.stop_after=6")
    resumed = run(root, "broken", *settings)
    assert [line["step"] for line in resumed] == list(range(1, 13))
    for here, there in zip(resumed, unbroken, strict=True):
        assert here == pytest.approx(there, rel=1e-3)
