"""Memory and time of preference training beside finetuning, with the same number of pictures per micro-batch.

    sft               flow matching on 4 pictures
    dpo precomputed   2 pairs, the reference's errors given with the batch: no second model
    dpo online        2 pairs, a second, frozen engine asked for the reference's errors

One step of the engine each (loss, backward, clip, AdamW, EMA), by the objectives and the engine themselves, every
variant in a process of its own. Memory is the peak (VmHWM) over the baseline after imports and start of the process
group, which holds weights, gradients, moments, EMA and activations. Theory: a forward and a backward cost 3 forwards,
so what is asked of the reference costs a third more (4/3), and what was computed beforehand nothing.

    python tests/bench/post_training.py [--quick] [--repeats 3] [--out FILE]

Needs about 30 bytes of free memory per parameter, of 137 M (`--quick`: 25 M).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, Final

from fake_model import TEXT_WIDTH, architecture, write_pipeline
from harness import Figures, Report, answer, num_repeats, parser, run_ranks, scratch
from memory import MB, Meter

FULL: Final = {"num_layers": 5, "num_heads": 7}
QUICK: Final = {"num_layers": 2, "num_heads": 4}
VARIANTS: Final = ("sft", "dpo precomputed", "dpo online")
RESOLUTION: Final = 256
TEXT_TOKENS: Final = 64
PICTURES: Final = 4
WARMUP: Final = 1


def worker(job: dict[str, Any]) -> None:
    """On a rank: build, step, and tell peak and time."""
    import torch

    from consumers.ema import Ema
    from consumers.engine import build_engine, build_frozen, start_distributed, stop_distributed
    from consumers.objectives import build_objective
    from qwenimg_dist.compose import load_config
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
        micro = _batch(kind == "dpo", config.objective.draws if kind == "dpo" and reference == "precomputed" else None)
        times = []
        for step in range(WARMUP + job["steps"]):
            begin = time.perf_counter(), time.process_time()
            output = objective.loss(engine.predict, micro.to("cpu"), step=step)
            engine.backward(output.loss / len(micro.weights), last=True)
            del output
            engine.step(1e-6)
            ema.update()
            times.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    stop_distributed()
    wall, cpu = (sorted(one[i] for one in times[WARMUP:])[job["steps"] // 2] for i in (0, 1))
    answer(job, {"peak MB": meter.peaks["all"], "s/step": wall, "CPU s/step": cpu, "baseline MB": meter.baseline / MB})


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


def main() -> int:
    args = parser(__doc__, repeats=3).parse_args()
    if args.worker is not None:
        worker(args.worker)
        return 0
    report = Report(
        name="post_training",
        what="DPO's memory and step beside finetuning's, with the same pictures per micro-batch",
        targets=[
            "peak MB: dpo precomputed / sft <= 1.05",
            "s/step in theory: dpo precomputed / sft = 1, dpo online / sft = 4/3",
        ],
        notes=["peak is over the baseline after imports; on a busy machine only CPU seconds mean something"],
    )
    found: dict[str, list[Figures]] = {variant: [] for variant in VARIANTS}
    with scratch("post-training") as folder:
        pipeline = folder / "pipeline"
        num_parameters = write_pipeline(pipeline, architecture(**(QUICK if args.quick else FULL)), "bf16")
        report.settings = {
            "parameters": f"{num_parameters / 1e6:.0f}M",
            "resolution": RESOLUTION,
            "text_tokens": TEXT_TOKENS,
            "pictures": PICTURES,
            "precision": "bf16",
        }
        for _ in range(1 if args.quick and args.repeats is None else num_repeats(args)):
            for variant in VARIANTS:
                job = {"variant": variant, "pipeline": str(pipeline), "steps": 3}
                found[variant] += run_ranks(__file__, 1, job, folder / variant.replace(" ", "-"))
    for variant, repeats in found.items():
        report.add(variant, repeats)
    for variant in VARIANTS[1:]:
        for figure in ("peak MB", "CPU s/step", "s/step"):
            report.add_ratio(f"{figure}: {variant} / sft", figure, variant, "sft")
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(main())
