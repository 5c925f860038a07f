"""Host memory of each rank: about 500 M parameters are loaded, stepped and saved on 2 ranks, loaded on 4, exported.

Real classes, random weights, few wide blocks, written tensor by tensor as a pipeline directory. Each process takes its
baseline after the imports and the process group's start, then notes the peak (VmHWM, reset by /proc/self/clear_refs
before each stage, so no sample is missed) of: load, step, save; load; export. The bound is the issue's:

    partition (fp32 master and two moments, EMA, fp32 gradients, and the 2 or 4 byte copy that is gathered from)
    + 2 largest tensors in fp32 + activations of the micro-batch (saved tensors of the plain module, measured)

What ZeRO-3 gathers, reduces or copies beyond that is an excess, and is printed as such. The export holds no partition;
its bound is two shards, which are made small (100 MB, where the default is 5 GB), so that holding more would be seen.

    python tests/bench/memory.py [--quick] [--repeats 1] [--precision bf16] [--gather layer] [--export] [--out FILE]

Needs about 25 bytes of free memory per parameter and 20 of free disk. `--export` measures only the export, of a
checkpoint of 234 M parameters that one rank writes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from fake_model import TEXT_WIDTH, architecture, write_pipeline
from harness import ROOT, Figures, Report, answer, num_repeats, parser, run_ranks, scratch

FULL: Final = {"num_layers": 6, "num_heads": 12}
"""Six blocks of width 1536: 523 M parameters."""
QUICK: Final = {"num_layers": 3, "num_heads": 6}
"""Three blocks of width 768: 69 M parameters."""
RESOLUTION: Final = 256
EXPORT: Final = {"num_layers": 6, "num_heads": 8}
"""Six blocks of width 1024: 234 M parameters."""
TEXT_TOKENS: Final = 128
MB: Final = 1e6
EMA_DECAY: Final = 0.999
SHARD_BYTES: Final = 100_000_000
"""Of the export: no smaller, or what the command imports while it runs would decide."""


class Meter:
    """Peaks of this process over its baseline, by stage."""

    def __init__(self) -> None:
        self.baseline = _status()["VmRSS"]
        self.peaks: dict[str, float] = {}
        self.after: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Note the peak within the block, and what stays."""
        Path("/proc/self/clear_refs").write_text("5")
        yield
        status = _status()
        self.peaks[name] = (status["VmHWM"] - self.baseline) / MB
        self.after[name] = (status["VmRSS"] - self.baseline) / MB


def _status() -> dict[str, int]:
    """Bytes by name of /proc/self/status."""
    lines = (line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if "kB" in line)
    return {name: int(value.split()[0]) * 1024 for name, value in lines}


def worker(job: dict[str, Any]) -> None:
    """One rank, or the export."""
    if job["task"] == "write":
        write_pipeline(Path(job["pipeline"]), job["architecture"], job["precision"])
    elif job["task"] == "activations":
        answer(job, _activations(job))
    elif job["task"] == "export":
        answer(job, _export(job))
    else:
        answer(job, _train(job))


def _batch(job: Mapping[str, Any], rank: int) -> dict[str, Any]:
    import torch

    seeded = torch.Generator().manual_seed(rank)
    side = RESOLUTION // 8
    return {
        "noisy": torch.randn((1, 16, side, side), generator=seeded),
        "sigma": torch.full((1,), 0.5),
        "text": torch.randn((1, TEXT_TOKENS, TEXT_WIDTH), generator=seeded),
        "text_mask": None,
    }


def _config(job: Mapping[str, Any]) -> Any:
    from qwenimg_dist.compose import load_config

    engine = [f"engine.precision={job['precision']}", f"engine.gather={job['gather']}"]
    return load_config([*engine, f"optim.ema_decay={EMA_DECAY}", *job.get("overrides", [])])


def _train(job: dict[str, Any]) -> dict[str, Any]:
    """On a rank: load from the pipeline, or from the newest checkpoint; step; save."""
    from consumers import checkpoint
    from consumers.ema import Ema
    from consumers.engine import build_engine, start_distributed
    from qwenimg_dist.models import transformer as qwen
    from qwenimg_dist.models.weights import SafetensorsDirectory

    config = _config(job)
    component = Path(job["pipeline"]) / "transformer"
    model = qwen.load_transformer_config(component)
    ranks = start_distributed("cpu")
    run_dir = Path(job["run"])
    run_dir.mkdir(parents=True, exist_ok=True)
    meter = Meter()
    with meter.stage("load"):
        engine = build_engine(model, config, ranks, SafetensorsDirectory(component))
        ema = Ema(engine, EMA_DECAY)
        if job["task"] == "resume":
            found = checkpoint.load_newest(engine, ema, run_dir)
            if found is None:
                raise RuntimeError(f"no checkpoint in {run_dir}")
    if job["task"] == "store":
        checkpoint.save_checkpoint(engine, ema, run_dir, step=2, state={}, keep=1)
    if job["task"] == "train":
        batch = _batch(job, ranks.rank)
        for number in (1, 2):
            with meter.stage(f"step {number}"):
                loss = engine.predict(**batch).square().mean()
                engine.backward(loss, last=True)
                engine.step(1e-5)
                ema.update()
        if not job.get("save", True):
            return _told(meter, ranks)
        with meter.stage("save"):
            checkpoint.save_checkpoint(engine, ema, run_dir, step=2, state={}, keep=1)
    return _told(meter, ranks)


def _told(meter: Meter, ranks: Any) -> dict[str, Any]:
    from consumers.engine import stop_distributed

    ranks.sum([0.0])  # waits for all
    stop_distributed()
    return {"baseline": meter.baseline / MB, "peaks": meter.peaks, "after": meter.after}


def _activations(job: dict[str, Any]) -> dict[str, Any]:
    """MB that autograd keeps for one micro-batch of the plain module, weights not counted; parameter counts too."""
    import torch

    from qwenimg_dist.models import transformer as qwen

    module = qwen.build_transformer(qwen.load_transformer_config(Path(job["pipeline"]) / "transformer"))
    dtype = torch.bfloat16 if job["precision"] == "bf16" else torch.float32
    module.to(dtype)
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = qwen.predict_velocity(module, **_batch(job, 0)).square().mean()
    numels = {name: p.numel() for name, p in module.named_parameters()}
    block = sum(n for name, n in numels.items() if name.startswith("transformer_blocks.0."))
    return {
        "activations": sum(saved.values()) / MB,
        "parameters": sum(numels.values()),
        "largest": max(numels.values()),
        "block": block,
        "loss": float(loss),
    }


def _export(job: dict[str, Any]) -> dict[str, Any]:
    """The export command, in this process."""
    # The baseline includes what the command imports, as it does on the ranks.
    import qwenimg_dist.models.pipeline
    import qwenimg_dist.models.weights  # noqa: F401
    from qwenimg_dist.commands import ckpt

    run_dir = Path(job["run"])
    tree = _config(job).model_dump(mode="json")
    tree["model"]["path"] = job["pipeline"]
    import yaml

    (run_dir / "config.yaml").write_text(yaml.safe_dump(tree))
    meter = Meter()
    with meter.stage("export"):
        ckpt.run(
            [
                "export",
                f"run.path={run_dir}",
                f"export.path={job['out']}",
                f"export.max_shard_bytes={job['shard_bytes']}",
            ]
        )
    shards = len(list(Path(job["out"], "transformer").glob("*.safetensors")))
    return {"baseline": meter.baseline / MB, "peaks": meter.peaks, "after": meter.after, "shards": shards}


def main() -> int:
    options = parser(__doc__, repeats=1)
    options.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    options.add_argument("--gather", choices=["layer", "block"], default="layer", help="as engine.gather")
    options.add_argument("--export", action="store_true", help="only the export")
    args = options.parse_args()
    if args.worker is not None:
        worker(args.worker)
        return 0
    size = QUICK if args.quick else EXPORT if args.export else FULL
    model = architecture(**size)
    with scratch("memory") as folder:
        job = {
            "pipeline": str(folder / "pipeline"),
            "precision": args.precision,
            "gather": args.gather,
            "architecture": model,
        }
        _alone({**job, "task": "write"}, folder)
        facts = _alone({**job, "task": "activations", "answer": str(folder / "facts.json")}, folder)
        require_memory(25 * facts["parameters"])
        report = _report(args.precision, args.gather, size, facts)
        measure = _export_round if args.export else _round
        rounds = [measure(job, folder / f"round-{number}", facts) for number in range(num_repeats(args))]
    for label in rounds[0]:
        report.add(label, [found[label] for found in rounds])
    _say_misses(report)
    return report.finish(args)


def _round(job: dict[str, Any], folder: Path, facts: Mapping[str, float]) -> dict[str, Figures]:
    """All stages once: label -> peak, bound and their ratio, of the rank with the highest peak."""
    run = str(folder / "run")
    found: dict[str, Figures] = {}
    for task, num_ranks in (("train", 2), ("resume", 4)):
        told = run_ranks(__file__, num_ranks, {**job, "task": task, "run": run}, folder)
        for stage in told[0]["peaks"]:
            peaks = [rank["peaks"][stage] for rank in told]
            worst = told[peaks.index(max(peaks))]
            limit = bound(facts, num_ranks, job["precision"], stage)
            found[f"{num_ranks} ranks, {stage}"] = _figures(worst, stage, limit)
    return found | _exported(job, run, folder)


def _export_round(job: dict[str, Any], folder: Path, _: Mapping[str, float]) -> dict[str, Figures]:
    """Only the export, of what one rank wrote."""
    run = str(folder / "run")
    run_ranks(__file__, 1, {**job, "task": "store", "run": run}, folder)
    return _exported(job, run, folder)


def _exported(job: dict[str, Any], run: str, folder: Path) -> dict[str, Figures]:
    """The export against two shards."""
    more = {"task": "export", "run": run, "out": str(folder / "export"), "answer": str(folder / "export.json")}
    told = _alone({**job, **more, "shard_bytes": SHARD_BYTES}, folder)
    return {f"export, {told['shards']} shards": _figures(told, "export", 2 * SHARD_BYTES / MB)}


def _figures(told: Mapping[str, Any], stage: str, limit: float) -> Figures:
    peak = told["peaks"][stage]
    return {
        "baseline MB": told["baseline"],
        "peak over baseline MB": peak,
        "bound MB": limit,
        "excess MB": peak - limit,
        "stays MB": told["after"][stage],
    }


def bound(facts: Mapping[str, float], num_ranks: int, precision: str, stage: str) -> float:
    """MB that a rank may grow by, see the module's docstring; activations only where there is a step."""
    activations = facts["activations"] if stage.startswith("step") else 0.0
    return partition(facts, num_ranks, precision) + 2 * facts["largest"] * 4 / MB + activations


def partition(facts: Mapping[str, float], num_ranks: int, precision: str) -> float:
    """MB of all that a rank keeps of every parameter: 12 (AdamW) + 4 (EMA) + 4 (gradient) + 2 (bf16) bytes over the
    ranks; in fp32 the masters are what is gathered from.
    """
    per_parameter = 12 + 4 + 4 + (2 if precision == "bf16" else 0)
    return per_parameter * facts["parameters"] / num_ranks / MB


def _report(precision: str, gather: str, size: Mapping[str, int], facts: Mapping[str, float]) -> Report:
    return Report(
        name="memory",
        what="peak memory growth per process against partition + 2 largest tensors + activations",
        settings={
            "parameters": f"{facts['parameters'] / 1e6:.0f}M",
            **size,
            "precision": precision,
            "gather": gather,
            "largest_tensor_MB": round(facts["largest"] * 4 / MB),
            "block_bf16_MB": round(facts["block"] * 2 / MB),
            "activations_MB": round(facts["activations"]),
            **{f"partition_{n}_ranks_MB": round(partition(facts, n, precision)) for n in (2, 4)},
        },
        targets=["excess <= 0: every process stays under partition + 2 largest tensors (fp32) + activations"],
        notes=["baseline: after imports and start of the process group; peak: the rank with the highest VmHWM"],
    )


def _say_misses(report: Report) -> None:
    for label, figures in report.rows.items():
        excess = figures["excess MB"].median
        if excess > 0:
            report.notes.append(f"{label}: {excess:.0f} MB over the bound")


def _alone(job: dict[str, Any], folder: Path) -> Any:
    """Run a task in a process of its own, so that its memory is its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, __file__, "--worker", json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise RuntimeError(f"{job['task']} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return json.loads(Path(job["answer"]).read_text()) if "answer" in job else None


def require_memory(needed: float) -> None:
    """End here if the machine has less free."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    available = next(int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:")
    if available < needed:
        raise SystemExit(
            f"this benchmark needs {needed / 1e9:.1f} GB of free memory, {available / 1e9:.1f} GB are; try --quick"
        )


if __name__ == "__main__":
    sys.exit(main())
