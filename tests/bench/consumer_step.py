"""The trainer's step against a bare DeepSpeed ZeRO-3 loop on the same shapes, on one and two gloo ranks.

The trainer runs as it is, `consumers.trainer.train` on a data set and a model directory; after each of its steps its
heartbeat hook runs one step of the bare loop in the same processes, so both alternate step by step:

    trainer   read, noise and sigma by slot, loss, finite check, backward, clip, step, EMA, counters, log
    bare      the same model class under `zero.Init`, `deepspeed.initialize`, forward, mse, backward, step, EMA;
              DeepSpeed's sizes as `consumers/zero_settings.py` sets them, AdamW's fused kernel, random data already in
              memory
    default   the same loop with DeepSpeed's own default sizes (prefetch, persistence, buckets, sub-groups), no EMA

About 90 M parameters, so that Python does not decide. CPU seconds are those of rank 0's process with all its threads;
on a machine that others use too they are steadier than wall time.

    python tests/bench/consumer_step.py [--quick] [--repeats 12] [--out FILE]
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fake_model import TEXT_WIDTH, architecture, write_pipeline
from harness import Figures, Report, answer, num_repeats, parser, run_ranks, scratch

FULL: Final = {"num_layers": 4, "num_heads": 6}
QUICK: Final = {"num_layers": 2, "num_heads": 2}
RESOLUTION: Final = 256
TEXT_TOKENS: Final = 64
SAMPLES_PER_RANK: Final = 2
"""Two micro-batches of one sample each."""
WARMUP: Final = 2
LR: Final = 1e-5


class Enough(Exception):
    """All rounds are done; leaves the trainer without its last checkpoint, which is not what is measured."""


def overrides(job: Mapping[str, Any]) -> list[str]:
    """The trainer's settings: one phase of constant shapes, nothing but steps."""
    world, resolution = job["world_size"], job.get("resolution", RESOLUTION)
    phase = (
        f"{{low: {{resolutions: {{{resolution}: 1.0}}, share: 1.0, steps: null, "
        f"global_batch: {SAMPLES_PER_RANK * world}, micro_batch_tokens: 1, lr_scale: 1.0, where: null}}}}"
    )
    return [
        "optim=qwen_image_2512",
        "optim.warmup_steps=0",
        f"model.path={job['pipeline']}",
        f"data.path={job['data']}",
        f"run.path={job['run']}",
        f"cluster.ranks={world}",
        "train.steps=100000",
        "checkpoint.every=1000000",
        "evaluate.every=0",
        "evaluate.grid_every=0",
        "data.held_out=0",
        "objective.caption_dropout=0",
        "~curriculum.phases",
        f"+curriculum.phases={phase}",
    ]


def write_data(folder: Path, job: Mapping[str, Any]) -> None:
    """Captions of one length, so that every micro-batch has the same shape."""
    from fake_data import FakeData

    from consumers.run_directory import facets_of
    from qwenimg_dist.compose import load_config

    config = load_config(overrides(job))
    unit_size = 32
    data = FakeData(folder, facets_of(config, Path(job["pipeline"])), unit_size=unit_size, text_width=TEXT_WIDTH)
    for _ in range(4):
        data.unit([job.get("text_tokens", TEXT_TOKENS)] * unit_size)


class Bare:
    """What anyone would write with DeepSpeed alone."""

    def __init__(self, config: Any, model: Mapping[str, Any], *, default_sizes: bool) -> None:
        import deepspeed
        import torch

        from consumers.ranks import Ranks
        from consumers.zero_settings import deepspeed_config
        from qwenimg_dist.models import transformer as qwen

        dist = torch.distributed
        ranks = Ranks(rank=dist.get_rank(), world_size=dist.get_world_size(), device=torch.device("cpu"))
        with torch.device("meta"):
            shapes = {n: tuple(p.shape) for n, p in qwen.build_transformer(model).named_parameters()}
        settings = copy.deepcopy(deepspeed_config(config, shapes, ranks))
        settings["gradient_accumulation_steps"] = SAMPLES_PER_RANK
        if default_sizes:
            kept = ("stage", "contiguous_gradients", "reduce_scatter")
            zero = settings["zero_optimization"]
            # Its CPU path cannot overlap; all else is left to DeepSpeed.
            settings["zero_optimization"] = {**{key: zero[key] for key in kept}, "overlap_comm": False}
        with deepspeed.zero.Init(config_dict_or_path=settings):
            module = qwen.build_transformer(model)
        qwen.rebuild_rope(module)
        adam = torch.optim.AdamW(module.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=adam, config=settings, dist_init_required=False)
        masters = [] if default_sizes else self._engine.optimizer.fp32_partitioned_groups_flat
        self._averages = [(master, master.detach().clone()) for master in masters]
        self._decay = config.optim.ema_decay
        side = RESOLUTION // 8
        self._latents = torch.randn(SAMPLES_PER_RANK, 1, 16, side, side)
        self._text = torch.randn(SAMPLES_PER_RANK, 1, TEXT_TOKENS, TEXT_WIDTH).to(torch.bfloat16)

    def step(self) -> None:
        import torch

        from qwenimg_dist.models import transformer as qwen

        for latents, text in zip(self._latents, self._text, strict=True):
            sigma, noise = torch.rand(1), torch.randn_like(latents)
            noisy = (1 - sigma) * latents + sigma * noise
            velocity = qwen.predict_velocity(self._engine, noisy, sigma, text)
            loss = torch.nn.functional.mse_loss(velocity, noise - latents)
            self._engine.backward(loss)
            self._engine.step()
        with torch.no_grad():
            for master, average in self._averages:
                average.lerp_(master, 1.0 - self._decay)


class Alternate:
    """The heartbeat: closes the trainer's step, runs each bare step, opens the trainer's next."""

    def __init__(self, config: Any, model: Mapping[str, Any], repeats: int) -> None:
        self._config, self._model, self._repeats = config, model, repeats
        self._bare: dict[str, Bare] = {}
        self._since = (0.0, 0.0)
        self.found: dict[str, list[Figures]] = {"trainer": [], "bare": [], "default": []}

    def __call__(self, step: int) -> None:
        import torch

        torch.distributed.barrier()
        if not self._bare:
            self._bare = {
                "bare": Bare(self._config, self._model, default_sizes=False),
                "default": Bare(self._config, self._model, default_sizes=True),
            }
        else:
            self._note("trainer", step)
        for name, bare in self._bare.items():
            self._since = _now()
            bare.step()
            torch.distributed.barrier()
            self._note(name, step)
        if step > self._repeats + WARMUP:
            raise Enough
        self._since = _now()

    def _note(self, name: str, step: int) -> None:
        wall, cpu = (now - since for now, since in zip(_now(), self._since, strict=True))
        if step > WARMUP + 1:
            self.found[name].append({"s/step": wall, "CPU s/step": cpu})


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def worker(job: dict[str, Any]) -> None:
    from consumers.hooks import Hooks
    from consumers.trainer import train
    from qwenimg_dist.compose import load_config
    from qwenimg_dist.models.transformer import load_transformer_config

    config = load_config(overrides(job))
    alternate = Alternate(config, load_transformer_config(Path(job["pipeline"]) / "transformer"), job["repeats"])
    try:
        train(config, Hooks(heartbeat=alternate))
    except Enough:
        answer(job, alternate.found)


def main() -> int:
    args = parser(__doc__, repeats=12).parse_args()
    if args.worker is not None:
        worker(args.worker)
        return 0
    size = QUICK if args.quick else FULL
    report = Report(
        name="consumer_step",
        what="the trainer's optimiser step against a bare DeepSpeed ZeRO-3 loop",
        targets=["trainer / bare <= 1.02"],
        notes=["trainer and bare have an EMA, default has none; on a busy machine only CPU seconds mean something"],
    )
    with scratch("consumer-step") as folder:
        pipeline = folder / "pipeline"
        num_parameters = write_pipeline(pipeline, architecture(**size), "bf16")
        report.settings = {
            "parameters": f"{num_parameters / 1e6:.0f}M",
            "resolution": RESOLUTION,
            "text_tokens": TEXT_TOKENS,
            "micro_batches": SAMPLES_PER_RANK,
            "precision": "bf16",
        }
        for world_size in (1, 2):
            job = {
                "pipeline": str(pipeline),
                "data": str(folder / "data"),
                "run": str(folder / f"run-{world_size}"),
                "world_size": world_size,
                "repeats": num_repeats(args),
            }
            if world_size == 1:
                write_data(folder / "data", job)
            found = run_ranks(__file__, world_size, job, folder / f"ranks-{world_size}")[0]
            for name, repeats in found.items():
                report.add(f"{world_size} rank{'s' * (world_size > 1)}, {name}", repeats)
    for prefix in ("1 rank", "2 ranks"):
        for other in ("bare", "default"):
            for figure in ("s/step", "CPU s/step"):
                label = f"{prefix}, {figure}: trainer / {other}"
                report.add_ratio(label, figure, f"{prefix}, trainer", f"{prefix}, {other}")
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(main())
