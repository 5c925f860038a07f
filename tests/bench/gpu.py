"""The model's own speed and memory on one GPU: blocks of real width, the engine that trains, no Ray, no data set.

Three parts, each in processes of its own:

    rate    the rate of a large bf16 matrix product: what utilisation is held against, beside the datasheet's peak
    steps   16 of the 60 blocks under the one-rank ZeRO-3 engine, fp32 masters and both moments included: forward and
            backward of one micro-batch at every resolution, eager and compiled, with and without activation
            checkpointing, without and with a text mask, by attention kernel; and the optimiser's update
    whole   all 60 blocks in bf16, forward and backward, each gradient freed as soon as it is there (no optimiser: its
            states do not fit on one GPU)

FLOPs are those of `models.transformer.forward_flops`, times 3; recomputed ones are not counted. Without a GPU it runs
on the CPU at toy size, which shows only that it runs.

`--cases REGEX` takes only the rows whose name it finds; `--profile` prints where the time of each row's run goes.

    python tests/bench/gpu.py [--quick] [--parts rate,steps,whole] [--cases REGEX] [--repeats 8] [--out FILE]
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from fake_model import TEXT_WIDTH, architecture
from harness import Figures, Report, answer, num_repeats, parser, run_ranks, scratch

from qwenimg_dist.estimate import device_memory
from qwenimg_dist.metrics import peak_flops
from qwenimg_dist.models import transformer as qwen

TEXT_TOKENS: Final = 256
BATCHES: Final = {256: 16, 512: 6, 1024: 2, 1328: 1}
"""Resolution -> images per micro-batch: about 8,000 tokens each."""
TOY: Final = {64: 2, 128: 2}
KERNELS: Final = ("native", "flash", "cudnn", "efficient")
PARTS: Final = ("rate", "steps", "whole")
_WARMUP: Final = 2


class Bench:
    """One process: a device, its clock, and what was found."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.toy: bool = job["toy"]
        self.repeats: int = job["repeats"]
        self.device = torch.device("cpu" if self.toy else "cuda:0")
        self.rows: dict[str, list[Figures]] = {}
        self.notes: list[str] = []
        self.rate: float = job.get("rate", 0.0)
        peak = None if self.toy else peak_flops(torch.cuda.get_device_name(0))
        self.peak = peak or 0.0

    def sync(self) -> None:
        if not self.toy:
            torch.cuda.synchronize()

    def times(self, run: Callable[[], object], before: Callable[[], object]) -> list[float]:
        """Seconds of each of `repeats` runs, after two that are thrown away."""
        found = []
        for number in range(-_WARMUP, self.repeats):
            before()
            self.sync()
            begin = time.perf_counter()
            run()
            self.sync()
            if number >= 0:
                found.append(time.perf_counter() - begin)
        return found

    def measure(
        self,
        label: str,
        run: Callable[[], object],
        flops: float,
        predicted: float,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        """Add a row: seconds, TFLOP/s, utilisation, peak memory. Out of memory is a note, not an end.

        `before` comes before every run and is not timed.
        """
        if not re.search(self.job["cases"], label):
            return
        print(f"[{time.strftime('%H:%M:%S')}] {label}", flush=True)
        try:
            if not self.toy:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            before()
            begin = time.perf_counter()
            run()
            self.sync()
            first = time.perf_counter() - begin
            times = self.times(run, before)
            if self.job["profile"]:
                before()
                self.profile(run)
        except Exception as error:
            self.notes.append(f"{label}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
            traceback.print_exc()
            return
        gigabytes = 0.0 if self.toy else torch.cuda.max_memory_allocated() / 1e9
        fixed = {"first s": first, "peak GB": gigabytes, "predicted GB": predicted / 1e9}
        self.rows[label] = [{"ms": 1e3 * s, **self.shares(flops / s), **fixed} for s in times]
        print(f"    {self.rows[label][len(times) // 2]}", flush=True)

    def profile(self, run: Callable[[], object]) -> None:
        """Print the kernels that take longest."""
        activities = [torch.profiler.ProfilerActivity.CPU if self.toy else torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            run()
            self.sync()
        order = "self_cpu_time_total" if self.toy else "self_device_time_total"
        print(profiler.key_averages().table(sort_by=order, row_limit=16, max_name_column_width=90), flush=True)

    def shares(self, flops_per_s: float) -> Figures:
        found = {"TFLOP/s": flops_per_s / 1e12}
        if self.rate:
            found["of measured"] = flops_per_s / self.rate
        if self.peak:
            found["of datasheet"] = flops_per_s / self.peak
        return found


def rate(bench: Bench) -> None:
    """bf16 matrix products on random data."""
    size = 512 if bench.toy else 8192
    one, other = (torch.randn(size, size, device=bench.device, dtype=torch.bfloat16) for _ in range(2))

    def ten() -> None:
        for _ in range(10):
            one @ other

    bench.job["cases"] = ""  # what the others are held against
    bench.measure(f"matrix product of {size}", ten, 10 * 2.0 * size**3, 0.0)


class Micro:
    """One micro-batch of random tensors."""

    def __init__(self, bench: Bench, resolution: int, batch: int, *, masked: bool = False) -> None:
        side, device, text_tokens = resolution // 8, bench.device, 16 if bench.toy else TEXT_TOKENS
        self.batch, self.resolution, self.masked = batch, resolution, masked
        self.text_tokens = text_tokens
        self.noisy = torch.randn(batch, 16, side, side, device=device)
        self.target = torch.randn_like(self.noisy)
        self.sigma = torch.linspace(0.1, 0.9, batch, device=device)
        self.text = torch.randn(batch, text_tokens, TEXT_WIDTH, device=device, dtype=torch.bfloat16)
        self.mask: torch.Tensor | None = None
        if masked:
            self.mask = torch.ones(batch, text_tokens, device=device, dtype=torch.bool)
            self.mask[0, -8:] = False

    @property
    def image_tokens(self) -> int:
        return (self.resolution // 16) ** 2

    @property
    def tokens(self) -> int:
        return self.batch * (self.image_tokens + self.text_tokens)

    def flops(self, model: dict[str, Any]) -> float:
        return 3 * self.batch * qwen.forward_flops(model, self.image_tokens, self.text_tokens)

    def loss(self, predict: Callable[..., torch.Tensor]) -> torch.Tensor:
        return (predict(self.noisy, self.sigma, self.text, self.mask) - self.target).square().mean()

    def __str__(self) -> str:
        return f"{self.batch} x {self.resolution} px{', masked' if self.masked else ''}"


def micro_batches(bench: Bench, *, masked: Sequence[bool]) -> Iterator[Micro]:
    for resolution, batch in (TOY if bench.toy else BATCHES).items():
        for with_mask in masked:
            yield Micro(bench, resolution, batch, masked=with_mask)


def steps(bench: Bench) -> None:
    """Forward and backward through the engine, and its update."""
    from consumers.engine import build_engine, start_distributed, stop_distributed
    from qwenimg_dist.compose import load_config

    model = architecture(num_layers=2, num_heads=2) if bench.toy else architecture(bench.job["blocks"], num_heads=24)
    ranks = start_distributed("cpu" if bench.toy else "cuda")
    settings = ["model=qwen_image_2512", f"cluster.device={ranks.device.type}", "optim.ema_decay=0"]
    config = load_config([*settings, "engine.activation_checkpointing=false"])
    torch.manual_seed(0)
    engine = build_engine(model, config, ranks, None)
    module = engine.transformer.module
    bench.notes.append(f"steps: {engine.num_parameters / 1e9:.2f} B parameters")

    def run(micro: Micro, label: str, *, checkpointing: bool = False) -> None:
        qwen.activation_checkpointing(module, checkpointing)
        predicted = device_memory(
            model,
            engine.num_parameters,
            num_ranks=1,
            precision="bf16",
            ema=False,
            tokens=micro.tokens,
            activation_checkpointing=checkpointing,
        )
        name = f"{micro}, {label}{', checkpointed' if checkpointing else ''}"

        def once() -> None:
            engine.backward(micro.loss(engine.predict), last=False)

        bench.measure(name, once, micro.flops(model), predicted.total)
        engine.discard_gradients()

    middle = 128 if bench.toy else 1024
    for micro in micro_batches(bench, masked=(False, True)):
        run(micro, "eager")
        if not micro.masked:
            run(micro, "eager", checkpointing=True)
    for kernel in ("native", "math") if bench.toy else KERNELS[1:]:
        qwen.set_attention(module, kernel)
        run(Micro(bench, middle, 2), f"eager, {kernel}")
        if kernel in ("cudnn", "efficient"):
            run(Micro(bench, middle, 2, masked=True), f"eager, {kernel}")
    qwen.set_attention(module, "native" if bench.toy else "cudnn")

    qwen.compile_blocks(module)
    run(Micro(bench, middle, 2), "compiled for this shape")
    run(Micro(bench, middle, 2), "compiled for this shape", checkpointing=True)
    for micro in micro_batches(bench, masked=(False,)):
        run(micro, "compiled")
    run(Micro(bench, middle, 2, masked=True), "compiled")

    for block in module.transformer_blocks:
        del block.forward
    micro = Micro(bench, *next(iter((TOY if bench.toy else BATCHES).items())))

    bench.measure(
        "update (AdamW, clipping, bf16 partition)",
        lambda: engine.step(1e-6),
        0.0,
        0.0,
        lambda: engine.backward(micro.loss(engine.predict), last=True),
    )
    engine.close()
    stop_distributed()


def whole(bench: Bench) -> None:
    """All blocks, forward and backward."""
    model = architecture(num_layers=3, num_heads=2) if bench.toy else architecture(60, num_heads=24)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(bench.device):
        module = qwen.build_transformer(model)
    torch.set_default_dtype(torch.float32)
    qwen.rebuild_rope(module)
    weights = sum(parameter.numel() for parameter in module.parameters())
    bench.notes.append(f"whole: {weights / 1e9:.2f} B parameters")
    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(_free)

    def predict(*inputs: Any) -> torch.Tensor:
        return qwen.predict_velocity(module, *inputs)

    cases = [
        (resolution, 1, mode) for mode in ("checkpointed", "eager") for resolution in (TOY if bench.toy else BATCHES)
    ]
    for resolution, batch, mode in (*cases, (128 if bench.toy else 1024, 2, "compiled")):
        checkpointing = mode == "checkpointed"
        qwen.activation_checkpointing(module, checkpointing)
        if mode == "compiled":
            qwen.set_attention(module, "native" if bench.toy else "cudnn")
            qwen.compile_blocks(module)
        micro = Micro(bench, resolution, batch)
        memory = device_memory(
            model,
            weights,
            num_ranks=1,
            precision="bf16",
            ema=False,
            tokens=micro.tokens,
            activation_checkpointing=checkpointing,
        )

        def once(micro: Micro = micro) -> None:
            micro.loss(predict).backward()  # type: ignore[no-untyped-call]

        bench.measure(f"whole, {micro}, {mode}", once, micro.flops(model), memory.weights + memory.activations)


def _free(parameter: torch.Tensor) -> None:
    parameter.grad = None


def worker(job: dict[str, Any]) -> None:
    bench = Bench(job)
    try:
        {"rate": rate, "steps": steps, "whole": whole}[job["part"]](bench)
    except Exception:
        bench.notes.append(f"{job['part']}: {traceback.format_exc(limit=-3)}")
        traceback.print_exc()
    answer(job, {"rows": bench.rows, "notes": bench.notes})


def _device_name(toy: bool) -> str:
    if toy:
        return "cpu"
    words = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


def main() -> int:
    options = parser(__doc__, repeats=8)
    options.add_argument("--parts", default=",".join(PARTS))
    options.add_argument("--cases", default="", help="regular expression")
    options.add_argument("--profile", action="store_true")
    options.add_argument("--blocks", type=int, default=16, help="of 60, for the part `steps`")
    args = options.parse_args()
    if args.worker is not None:
        worker(args.worker)
        return 0
    toy = args.quick or not torch.cuda.is_available()
    report = Report(
        name="gpu",
        what="forward and backward of real-width blocks on one GPU, against its matrix rate",
        targets=[">= 0.65 of the measured matrix rate at 1024 px without checkpointing"],
        settings={"device": _device_name(toy), "blocks": args.blocks, "text_tokens": TEXT_TOKENS},
    )
    job: dict[str, Any] = {"toy": toy, "repeats": num_repeats(args), "blocks": args.blocks}
    job |= {"cases": args.cases, "profile": args.profile}
    with scratch("gpu") as folder:
        for part in args.parts.split(","):
            (found,) = run_ranks(__file__, 1, {**job, "part": part}, folder / part, on_gpu=not toy)
            print((folder / part / "rank-0.log").read_text(errors="replace")[-6000:], flush=True)
            for label, repeats in found["rows"].items():
                report.add(label, repeats)
                if part == "rate":
                    job["rate"] = report.rows[label]["TFLOP/s"].median * 1e12
            report.notes += found["notes"]
            if args.out is not None:  # a part that does not come to its end must not take the others with it
                Path(args.out).write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(main())
