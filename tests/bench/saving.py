"""How long training stands still in a save: at once, and in the background (`checkpoint.background`).

One engine with an EMA in each rank, steps on constant shapes; a round saves at once, then beside steps:

    at once       `Saver` as without `checkpoint.background`: everything until the checkpoint is committed. Of it
                  `fsync s` is measured where it is called, `hash s` on the same bytes alone
    background    `stands still s` is the copy into host memory and, some steps later, the commit; `written after s` is
                  when the checkpoint exists; `step x` is a step beside the writer against one alone

Where the files lie is `TMPDIR`. About 90 M parameters per rank, so 1.4 GB are written for each; the share of a save
that hides behind training does not depend on the size, the seconds do.

    python tests/bench/saving.py [--quick] [--repeats 5] [--out FILE]
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from pathlib import Path
from typing import Any, Final

from fake_model import TEXT_WIDTH, architecture, write_pipeline
from harness import Figures, Report, answer, num_repeats, parser, run_ranks, scratch

FULL: Final = {"num_layers": 4, "num_heads": 6}
QUICK: Final = {"num_layers": 2, "num_heads": 2}
STEPS_ALONE: Final = 3


class Work:
    """An engine at work, and its two ways to save."""

    def __init__(self, job: dict[str, Any]) -> None:
        import torch

        from consumers.ema import Ema
        from consumers.engine import build_engine, start_distributed
        from consumers.saver import Saver
        from qwenimg_dist.compose import load_config
        from qwenimg_dist.models.safetensors_directory import SafetensorsDirectory
        from qwenimg_dist.models.transformer import load_transformer_config

        torch.set_num_threads(1)
        self.ranks = start_distributed("cpu")
        folder = Path(job["pipeline"]) / "transformer"
        configs = [load_config([f"checkpoint.background={on}", "checkpoint.keep=1"]) for on in ("false", "true")]
        model = load_transformer_config(folder)
        self._engine = build_engine(model, configs[0], self.ranks, SafetensorsDirectory(folder))
        ema = Ema(self._engine, 0.999)
        self._ema = ema
        self.now, self.beside = (Saver(self._engine, ema, Path(job["run"]), config.checkpoint) for config in configs)
        self.num_bytes = self.beside.copy_bytes
        self._latents = torch.randn(1, 16, 16, 16)
        self._text = torch.randn(1, 64, TEXT_WIDTH)
        self.number = 0

    def step(self) -> float:
        """Seconds of one."""
        import torch

        begin = time.perf_counter()
        velocity = self._engine.predict(self._latents, torch.full((1,), 0.5), self._text, None)
        self._engine.backward(velocity.square().mean(), last=True)
        self._engine.step(1e-5)
        self._ema.update()
        return time.perf_counter() - begin

    def begin(self, saver: Any) -> float:
        self.number += 1
        begin = time.perf_counter()
        saver.begin(step=self.number, state={}, certificate=dict, wait=False)
        return time.perf_counter() - begin


def rounds(work: Work, repeats: int) -> dict[str, list[Figures]]:
    """The first one is thrown away."""
    found: dict[str, list[Figures]] = {"at once": [], "background": []}
    for _ in range(repeats + 1):
        alone = min(work.step() for _ in range(STEPS_ALONE))
        found["at once"].append(at_once(work))
        found["background"].append(in_background(work, alone))
    return {name: figures[1:] for name, figures in found.items()}


def at_once(work: Work) -> Figures:
    waited, fsync = [0.0], os.fsync

    def timed(handle: Any) -> None:
        begin = time.perf_counter()
        fsync(handle)
        waited[0] += time.perf_counter() - begin

    os.fsync = timed  # type: ignore[assignment]
    try:
        begin = time.perf_counter()
        work.begin(work.now)
        work.now.finish()
        seconds = time.perf_counter() - begin
    finally:
        os.fsync = fsync
    return {"stands still s": seconds, "fsync s": waited[0], "hash s": hash_s(work.num_bytes)}


def hash_s(num_bytes: int) -> float:
    """What the sha256 of so many bytes takes."""
    piece = bytes(1 << 24)
    digest = hashlib.sha256()
    begin = time.perf_counter()
    for _ in range(4):
        digest.update(piece)
    return (time.perf_counter() - begin) * num_bytes / (4 * len(piece))


def in_background(work: Work, alone: float) -> Figures:
    begin = time.perf_counter()
    still, seconds = work.begin(work.beside), []
    while work.ranks.max(work.beside.flags())[1]:
        seconds.append(work.step())
    commit = time.perf_counter()
    work.beside.finish()
    end = time.perf_counter()
    slower = sum(seconds) / len(seconds) / alone if seconds else 1.0
    return {"stands still s": still + end - commit, "written after s": end - begin, "step x": slower}


def worker(job: dict[str, Any]) -> None:
    from consumers.engine import stop_distributed

    work = Work(job)
    answer(job, {"figures": rounds(work, job["repeats"]), "GB": work.num_bytes / 1e9})
    work.beside.close()
    stop_distributed()


def main() -> int:
    args = parser(__doc__, repeats=5).parse_args()
    if args.worker is not None:
        worker(args.worker)
        return 0
    report = Report(name="saving", what="how long training stands still in a save, at once and in the background")
    with scratch("saving") as folder:
        pipeline = folder / "pipeline"
        num = write_pipeline(pipeline, architecture(**(QUICK if args.quick else FULL)), "fp32")
        job = {"pipeline": str(pipeline), "run": str(folder / "run"), "repeats": num_repeats(args)}
        (told,) = run_ranks(__file__, 1, job, folder / "ranks")
    report.settings = {"parameters_M": round(num / 1e6), "GB_per_save": round(told["GB"], 2), "ranks": 1}
    for name, figures in told["figures"].items():
        report.add(name, figures)
    report.add_ratio("stands still: background / at once", "stands still s", "background", "at once")
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(main())
