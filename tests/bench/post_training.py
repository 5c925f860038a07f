"""Memory and time of preference training and of GRPO beside finetuning, with the same pictures per micro-batch.

    sft               flow matching on 4 pictures
    dpo precomputed   2 pairs, the reference's errors given with the batch: no second model
    dpo online        2 pairs, a second, frozen model asked for the reference's errors
    grpo              4 pictures of one prompt, drawn, judged by their brightness, and trained on: the demo's rule has
                      nothing to choose among an untrained model's, and a group whose rewards are alike is left out

Memory: one step of the engine (loss, backward, clip, AdamW, EMA) by the objectives and the engine themselves, every
variant in a process of its own. It is the peak (VmHWM) over the baseline after imports and start of the process group,
which holds weights, gradients, moments, EMA and activations. 234 M parameters in two blocks of width 1792.

Time: whole steps of the trainer on data sets of pictures, pairs and prompts, one micro-batch each. The theory counts
forwards: one without a backward is 1, one with it 3, so that in steps of finetuning

    sft = dpo precomputed = 1        dpo online = (1 + 3) / 3        grpo = g (steps + reference + 3 window updates) / 3

g is 2 with guidance, whose forwards have the empty prompt's rows beside; `reference` is the window with a KL weight. It
leaves out AdamW, the decoder and the reward, which here is next to nothing: `rollout s`, `reward s` (what is waited for
after the last picture) and `update s` are the step's own parts, as the run logs them.

    python tests/bench/post_training.py [--quick] [--repeats 3] [--only memory|time] [--out FILE]

Needs about 35 bytes of free memory per parameter (`--quick`: 22 M of them, and the times are of these in any case).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Final

from fake_model import TEXT_WIDTH, architecture, write_pipeline
from harness import Figures, Report, answer, num_repeats, parser, run_ranks, scratch
from memory import MB, Meter

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

FULL: Final = {"num_layers": 2, "num_heads": 14}
QUICK: Final = {"num_layers": 2, "num_heads": 4}
MODELS: Final = ("sft", "dpo precomputed", "dpo online")
TIMED: Final = (*MODELS, "grpo", "grpo guided")
RESOLUTION: Final = 256
TEXT_TOKENS: Final = 64
PICTURES: Final = 4
WARMUP: Final = 1
STEPS: Final = 3
"""Of a process, after the warm-up."""
_PARTS: Final = ("rollout", "reward", "update")


def worker(job: dict[str, Any]) -> None:
    """On a rank."""
    answer(job, _memory(job) if job["task"] == "memory" else _time(job))


def _memory(job: dict[str, Any]) -> Figures:
    """Build, step, and tell the peak."""
    import torch

    from consumers.ema import Ema
    from consumers.engine import build_engine, build_frozen, start_distributed, stop_distributed
    from consumers.objectives import build_objective
    from qwenimg_dist.compose import load_config
    from qwenimg_dist.config import DpoConfig
    from qwenimg_dist.models.transformer import load_transformer_config
    from qwenimg_dist.models.weights import SafetensorsDirectory

    kind, _, reference = job["variant"].partition(" ")
    words = ["stage=dpo", f"objective.reference={reference}"] if kind == "dpo" else ["stage=sft"]
    config = load_config([*words, "optim=qwen_image_2512", f"model.path={job['pipeline']}"])
    component = Path(job["pipeline"]) / "transformer"
    model, source = load_transformer_config(component), SafetensorsDirectory(component)
    torch.manual_seed(0)
    ranks = start_distributed("cpu")
    meter = Meter()
    with meter.stage("all"):
        engine = build_engine(model, config, ranks, source)
        ema = Ema(engine, 0.99)
        frozen = build_frozen(model, config, ranks, source) if reference == "online" else None
        objective = build_objective(config, frozen.predict if frozen else None)
        draws = config.objective.draws if isinstance(config.objective, DpoConfig) else None
        micro = _batch(kind == "dpo", draws if reference == "precomputed" else None)
        for step in range(WARMUP + 1):
            output = objective.loss(engine.predict, micro.to("cpu"), step=step)
            engine.backward(output.loss / len(micro.weights), last=True)
            del output
            engine.step(1e-6)
            ema.update()
    stop_distributed()
    return {"peak MB": meter.peaks["all"], "baseline MB": meter.baseline / MB}


def _batch(pairs: bool, draws: int | None) -> Any:
    """4 pictures with their texts; as pairs 2 and 2."""
    import torch

    from consumers.batch import MicroBatch
    from qwenimg_dist.schema import Bucket

    rows, side = PICTURES // (1 + pairs), RESOLUTION // 8
    latents = torch.randn(PICTURES, 16, side, side).to(torch.bfloat16)
    return MicroBatch(
        latents=latents[:rows],
        logvar=None,
        text=torch.randn(rows, TEXT_TOKENS, TEXT_WIDTH).to(torch.bfloat16),
        text_mask=None,
        weights=torch.ones(rows),
        slots=torch.arange(rows),
        num_slots=rows,
        bucket=Bucket(height=RESOLUTION, width=RESOLUTION),
        rejected=latents[rows:] if pairs else None,
        numbers=torch.arange(rows) if pairs else None,
        reference=torch.ones(rows, draws, 2) if draws else None,
    )


def overrides(variant: str, pipeline: Path, folder: Path) -> list[str]:
    """A run of the trainer: steps of one micro-batch of 4 pictures, and nothing beside them."""
    kind, _, how = variant.partition(" ")
    data = {"sft": "images", "dpo": "pairs", "grpo": "prompts"}[kind]
    samples = {"sft": PICTURES, "dpo": PICTURES // 2, "grpo": 1}[kind]
    phase = (
        f"{{low: {{resolutions: {{{RESOLUTION}: 1.0}}, share: 1.0, steps: null, global_batch: {samples}, "
        "micro_batch_tokens: 1000000, lr_scale: 1.0, where: null}}"
    )
    of_kind = {
        "sft": [],
        "dpo": [f"objective.reference={how}", "objective.draws=1"],
        "grpo": [
            f"objective.group_size={PICTURES}",
            f"objective.guidance={4 if how else 1}",
            "objective.group_grid_every=0",
            "objective.max_failed_rounds=100",
            "reward.weights.shapes=1",
            f"evaluate.data_path={folder / 'images'}",
        ],
    }[kind]
    return [
        f"stage={kind}",
        "optim=qwen_image_2512",
        "optim.warmup_steps=0",
        f"model.path={pipeline}",
        f"data.path={folder / data}",
        f"run.path={folder / 'run'}",
        f"train.steps={WARMUP + STEPS}",
        "train.report=off",
        "train.log_every=1",
        "checkpoint.every=1000",
        "checkpoint.certify=off",
        "evaluate.every=0",
        "evaluate.weights=raw",
        "evaluate.guard=warn",
        "data.held_out=0",
        "~curriculum.phases",
        f"+curriculum.phases={phase}",
        *of_kind,
    ]


def theory(config: Any) -> float:
    """A step in steps of finetuning, see above."""
    objective = config.objective
    if objective.kind == "dpo":
        return 4 / 3 if objective.reference == "online" else 1.0
    if objective.kind != "grpo":
        return 1.0
    reference = objective.window if objective.kl_weight else 0
    forwards = objective.num_steps + reference + 3 * objective.window * objective.inner_updates
    return float((2 if objective.guidance > 1 else 1) * forwards / 3)


def write_data(pipeline: Path, folder: Path) -> None:
    """Pictures, pairs and prompts."""
    from dataclasses import replace

    from fake_dataset import FakeProducer, make_rows

    from consumers.run_directory import facets_of
    from qwenimg_dist.compose import load_config
    from qwenimg_dist.demo.shapes import all_captions

    captions = all_captions()[:8]
    for variant, name in (("sft", "images"), ("dpo online", "pairs"), ("grpo", "prompts")):
        producer = FakeProducer(
            folder / name,
            unit_size=8,
            resolutions=(RESOLUTION,),
            pairs=name == "pairs",
            prompts=name == "prompts",
        )
        producer.facets = facets_of(load_config(overrides(variant, pipeline, folder)), pipeline)
        rows = make_rows(len(captions), sizes=((RESOLUTION, RESOLUTION),))
        producer.add([replace(row, captions=(caption,)) for row, caption in zip(rows, captions, strict=True)])
        producer.produce(complete=True)


def _time(job: dict[str, Any]) -> Figures:
    """A run of the trainer on this rank, by its own log."""
    import shutil

    from trying_rewards import Bright

    from consumers.hooks import Hooks
    from consumers.trainer import train
    from qwenimg_dist.compose import load_config
    from qwenimg_dist.rewards.base import WeightedRewards

    folder = Path(job["data"])
    config = load_config(overrides(job["variant"], Path(job["pipeline"]), folder))
    before = time.process_time()
    train(config, Hooks(score=WeightedRewards([Bright()], {"bright": 1.0}).score))
    used = time.process_time() - before
    log = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()][WARMUP:]
    shutil.rmtree(folder / "run")
    if config.objective.kind == "grpo" and not all("reward/group_std" in line for line in log):
        raise RuntimeError("a group's rewards were alike: nothing was trained on, and the times mean nothing")

    def median(name: str) -> float:
        return float(statistics.median(line[name] for line in log))

    parts = {f"{part} s": median(f"train/{part}_s") for part in _PARTS} if config.objective.kind == "grpo" else {}
    return {"s/step": median("train/step_s"), "theory": theory(config), **parts, "CPU s of the run": used}


def main() -> int:
    options = parser(__doc__, repeats=3)
    options.add_argument("--only", choices=("memory", "time"), default=None)
    args = options.parse_args()
    if args.worker is not None:
        worker(args.worker)
        return 0
    report = Report(
        name="post_training",
        what="memory and steps of DPO and GRPO beside finetuning's, with the same pictures per micro-batch",
        targets=["peak MB: dpo precomputed / sft <= 1.05", "s/step: VARIANT / sft = `theory`"],
        notes=[
            "peak is over the baseline after imports",
            "theory, in steps of sft: dpo online (1 + 3) / 3, grpo g (steps + reference + 3 window updates) / 3",
        ],
    )
    repeats = 1 if args.quick and args.repeats is None else num_repeats(args)
    report.settings = {"resolution": RESOLUTION, "pictures": PICTURES, "precision": "bf16", "ranks": 1}
    with scratch("post-training") as folder:
        if args.only != "time":
            _measure_memory(report, folder, QUICK if args.quick else FULL, repeats)
        if args.only != "memory":
            _measure_times(report, folder, repeats)
    return report.finish(args)


def _measure_memory(report: Report, folder: Path, size: dict[str, int], repeats: int) -> None:
    pipeline = folder / "for-memory"
    num_parameters = write_pipeline(pipeline, architecture(**size), "bf16")
    report.settings |= {"memory of": f"{num_parameters / 1e6:.0f}M", "text_tokens": TEXT_TOKENS}
    found: dict[str, list[Figures]] = {variant: [] for variant in MODELS}
    for _ in range(repeats):
        for variant in MODELS:
            job = {"task": "memory", "variant": variant, "pipeline": str(pipeline)}
            found[variant] += run_ranks(__file__, 1, job, folder / variant.replace(" ", "-"))
    for variant, figures in found.items():
        report.add(f"memory, {variant}", figures)
    for variant in MODELS[1:]:
        report.add_ratio(f"peak MB: {variant} / sft", "peak MB", f"memory, {variant}", "memory, sft")


def _measure_times(report: Report, folder: Path, repeats: int) -> None:
    from fake_dataset import WIDTH

    pipeline, data = folder / "for-time", folder / "data"
    model = {**architecture(**QUICK), "joint_attention_dim": WIDTH}
    num_parameters = write_pipeline(pipeline, model, "bf16")
    report.settings["times of"] = f"{num_parameters / 1e6:.0f}M"
    write_data(pipeline, data)
    found: dict[str, list[Figures]] = {variant: [] for variant in TIMED}
    for _ in range(repeats):
        for variant in TIMED:
            job = {"task": "time", "variant": variant, "pipeline": str(pipeline), "data": str(data)}
            found[variant] += run_ranks(__file__, 1, job, folder / f"time-{variant.replace(' ', '-')}")
    for variant, figures in found.items():
        report.add(f"time, {variant}", figures)
    for variant in TIMED[1:]:
        expected = found[variant][0]["theory"]
        report.add_ratio(f"s/step: {variant} / sft (theory {expected:.3g})", "s/step", f"time, {variant}", "time, sft")


if __name__ == "__main__":
    sys.exit(main())
