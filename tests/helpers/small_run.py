"""A small but complete input for training: a transformer of two blocks, a fake data set for it, and gangs of ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from fake_dataset import WIDTH, FakeProducer, make_rows

from consumers.run_directory import facets_of
from qwenimg_dist.compose import load_config
from qwenimg_dist.data.catalog import RunFacets
from qwenimg_dist.models.identity import latents_facet_names
from qwenimg_dist.models.transformer import build_transformer

REPOSITORY = Path(__file__).resolve().parents[2]
TRANSFORMER = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "guidance_embeds": False,
    "axes_dims_rope": (4, 6, 6),
}


def write_pipeline(folder: Path) -> Path:
    """A pipeline directory with a real transformer; the other components only have an identity."""
    for name in ("vae", "text_encoder", "tokenizer", "scheduler"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps({"_class_name": name}))
    (folder / "model_index.json").write_text("{}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build_transformer(TRANSFORMER).save_pretrained(folder / "transformer")
    return folder


def overrides(root: Path, run: str = "run", *extra: str) -> list[str]:
    """Two short phases, everything logged, on the input that `write_input` made."""
    return [
        f"model.path={root / 'pipeline'}",
        f"data.path={root / 'data'}",
        f"run.path={root / run}",
        "curriculum.phases.low.global_batch=8",
        "curriculum.phases.low.micro_batch_tokens=60",
        "curriculum.phases.high.global_batch=4",
        "curriculum.phases.high.micro_batch_tokens=80",
        "train.steps=12",
        "train.log_every=1",
        "train.log_samples=true",
        "train.report=off",
        "checkpoint.every=4",
        "evaluate.every=6",
        "evaluate.num_samples=4",
        "optim.warmup_steps=2",
        *extra,
    ]


def write_input(root: Path, others: Sequence[int] = (), *, unit_size: int = 16) -> None:
    """`root/pipeline` and `root/data`, which has latents of the classes `others` besides those that are trained."""
    write_pipeline(root / "pipeline")
    producer = FakeProducer(root / "data", unit_size=unit_size, resolutions=(64, 128))
    encoded = f"encode.resolutions={[*others, 64, 128]}".replace(" ", "")
    config = load_config([*overrides(root), encoded])
    trained = facets_of(config, root / "pipeline")
    producer.facets = RunFacets(text=trained.text, latents=latents_facet_names(root / "pipeline", config))
    producer.add(make_rows(60, captions=2, sizes=((256, 256), (256, 128), (128, 256))))
    producer.produce(complete=True)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How one rank ended."""

    code: int
    output: str


def run_gang(
    command: Sequence[str],
    world: int,
    folder: Path,
    *,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 480,
    meanwhile: Callable[[list[subprocess.Popen[bytes]]], None] = lambda ranks: None,
) -> list[Ended]:
    """Start `python COMMAND` on `world` ranks with torchrun's environment; when one fails, the others are ended.

    `meanwhile` is called again and again with the ranks' processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [_start(command, rank, world, port, folder, env or {}) for rank in range(world)]
    deadline = time.monotonic() + timeout_s
    while any(rank.poll() is None for rank in ranks):
        if any(rank.poll() not in (None, 0) for rank in ranks) or time.monotonic() > deadline:
            _end(ranks)
        meanwhile(ranks)
        time.sleep(0.05)
    return [
        Ended(code=rank.returncode, output=(folder / f"rank-{index}.log").read_text(errors="replace"))
        for index, rank in enumerate(ranks)
    ]


def _start(
    command: Sequence[str], rank: int, world: int, port: int, folder: Path, env: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests" / "helpers"), *_python_path()]),
        **env,
    }
    with open(folder / f"rank-{rank}.log", "wb") as sink:
        return subprocess.Popen([sys.executable, *command], env=environment, stdout=sink, stderr=subprocess.STDOUT)


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """A short while for the others to notice by themselves, then SIGKILL."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
        time.sleep(0.05)
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
            rank.wait()


def lines(file: Path) -> list[dict[str, object]]:
    """The objects of a JSON-lines file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def numbers(run_dir: Path) -> list[dict[str, object]]:
    """What of `metrics.jsonl` must not depend on time or machine."""
    kept = ("step", "train/loss", "train/grad_norm", "train/lr", "train/images", "train/epoch")
    return [
        {key: value for key, value in line.items() if key in kept or key.startswith("eval/")}
        for line in lines(run_dir / "metrics.jsonl")
    ]
