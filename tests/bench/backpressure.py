"""Producers beside training: how far they run ahead of one that stalls, and how long one that trains waits for them.

    stalled   training stops after some steps; bytes ahead of it once producers have come to rest, over the bound
    waiting   producers at 1.2 times the demand, held by the same bound: share of the time that training waited for
              units or for the reading of a batch, from its first batch on, and in the second half of the run

Driver, schedule, hold, unit pipeline, generations and stream are real. Encoders give random tensors; the workers are
threads that take as long per unit as the pace wants (30 % more or less, at random), a step is a sleep, and waiting
training looks every 0.1 s in the place of every second, since steps are some ten times shorter than real ones. At the
start, when a single unit is ready, training waits for the next ones: that is in the whole's share.

    python tests/bench/backpressure.py [--quick] [--step-s 1] [--repeats 3] [--out FILE]
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from harness import Figures, Report, interleaved, num_repeats, parser, scratch
from PIL import Image

import consumers.run_data as run_data
from consumers.hooks import Hooks
from consumers.ranks import Ranks
from consumers.run_data import await_batch
from consumers.stream import Stream
from producers.driver import Driver
from producers.filters.base import Resources, Scorers
from producers.hold import Hold
from producers.pictures import Pixels
from producers.plan import Plan, make_plan
from producers.sources import open_source
from producers.workers import Outcome, Task, run_task
from producers.write import EditPrompt
from qwenimg_dist.compose import load_config
from qwenimg_dist.data.ahead import bytes_ahead, part_bytes, read_progress
from qwenimg_dist.data.catalog import RunFacets
from qwenimg_dist.data.facets import Dataset
from qwenimg_dist.data.generations import Generations
from qwenimg_dist.data.ledger_config import LedgerConfig
from qwenimg_dist.data.phases import PlannedPhase
from qwenimg_dist.data.shards import RawTensor
from qwenimg_dist.models.pipeline import pipeline_dir
from qwenimg_dist.schema import ROWS, latents_facet, text_facet

UNIT: Final = 8
"""Rows per unit, and samples per step: a step takes a unit."""
WORKERS: Final = 4
HEADROOM: Final = 1.2

BOUND_UNITS: Final = 16
RESOLUTION: Final = 64
TEXT_WIDTH: Final = 256
FINGERPRINT: Final = "0123456789ab"


class RandomEncoders:
    """Tensors of the right shapes; captions of the same words have as many tokens."""

    def __init__(self) -> None:
        self._noise = np.random.default_rng(0).integers(0x3F00, 0x4000, 1 << 20).astype(np.uint16)

    def latents(self, pixels: Pixels) -> list[dict[str, RawTensor]]:
        batch, height, width, _ = pixels.shape
        return [{"mean": self._tensor((16, height // 8, width // 8))} for _ in range(batch)]

    def text(self, captions: Sequence[str]) -> Iterator[tuple[str, RawTensor]]:
        for caption in captions:
            yield caption, self._tensor((8 + 16 * len(caption.split()), TEXT_WIDTH))

    def edit_text(self, prompts: Sequence[EditPrompt]) -> list[RawTensor]:
        raise NotImplementedError

    def _tensor(self, shape: tuple[int, ...]) -> RawTensor:
        return RawTensor(data=self._noise[: int(np.prod(shape))].reshape(shape), dtype="bfloat16")


class PacedWorkers:
    """Threads, each of which takes about `unit_s` for a unit."""

    num_workers = WORKERS

    def __init__(self, dataset: Dataset, plan: Plan, root: str, scorers: Scorers, unit_s: float) -> None:
        self._work = partial(run_task, dataset=dataset, plan=plan, root=root, encoders=RandomEncoders, scorers=scorers)
        self._unit_s = unit_s
        self._own_s = 0.0
        self._random = random.Random(0)
        self._pool = ThreadPoolExecutor(WORKERS)
        self._busy: dict[Future[Outcome], Task] = {}

    def num_idle(self) -> int:
        return WORKERS - len(self._busy)

    def submit(self, task: Task) -> None:
        self._busy[self._pool.submit(self._do, task)] = task

    def wait(self, timeout_s: float) -> Sequence[Outcome]:
        ended, _ = wait(self._busy, timeout=timeout_s, return_when=FIRST_COMPLETED)
        for one in ended:
            del self._busy[one]
        return [one.result() for one in ended]

    def close(self) -> None:
        self._pool.shutdown()

    def _do(self, task: Task) -> Outcome:
        if task.kind == "scan":
            return self._work(task)
        time.sleep(max(0.0, self._unit_s * self._random.uniform(0.7, 1.3) - self._own_s))
        begin = time.perf_counter()
        outcome = self._work(task)
        self._own_s += 0.2 * (time.perf_counter() - begin - self._own_s)
        return outcome


class World:
    """A source and both sides of it."""

    def __init__(self, root: Path, source: Path, num_units: int, step_s: float) -> None:
        self.num_units, self.step_s = num_units, step_s
        self.plan = make_plan(
            load_config(["filters=[broken]", "dedup.near=false"]),  # every row is kept: a step takes a unit
            text_facet=text_facet(FINGERPRINT),
            latents_facets={RESOLUTION: latents_facet(RESOLUTION, FINGERPRINT)},
        )
        self.dataset = Dataset.create(root / "data", UNIT)
        self.run = root / "run"
        self.source = open_source(load_config([]).source.model_copy(update={"path": str(source)}))
        self.stop = threading.Event()
        self.bound = 0

    def produce(self, bound: int) -> None:
        """Until everything is there, or `stop`."""
        scorers = Scorers(Resources(pipeline_dir=pipeline_dir(load_config([]).model), device="cpu"))
        unit_s = self.step_s * WORKERS / HEADROOM
        workers = PacedWorkers(self.dataset, self.plan, self.source.root, scorers, unit_s)
        driver = Driver(
            dataset=self.dataset,
            plan=self.plan,
            root=self.source.root,
            make_workers=lambda: workers,
            stopping=self.stop.is_set,
            hold=Hold(self.dataset, self.plan.facets, self.run, bound),
        )
        change = driver.list_source(self.source.find())
        driver.produce(driver.pending(), change.num_rows)
        workers.close()

    def train(self, num_steps: int, bound: int) -> tuple[float, float]:
        """(share of the time that was waited, share in the second half), from the first batch on."""
        phase = PlannedPhase(
            index=0,
            first_step=0,
            last_step=10 * self.num_units,
            weights={RESOLUTION: 1.0},
            global_batch=UNIT,
            micro_batch_tokens=1 << 20,
            lr_scale=1.0,
            where=None,
        )
        ledger = LedgerConfig(phases=(phase,), seed=0, caption_dropout=0.1, where=None, held_out=0.0, max_held_out=0)
        facets = RunFacets(text=self.plan.text_facet, latents=dict(self.plan.latents_facets))
        dataset = Dataset.open(self.dataset.root)
        run = Generations(self.run, dataset, facets, ledger, follow=True, max_ahead_bytes=bound)
        ranks = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
        await_batch(run, ranks, Hooks(), 0)
        stream = Stream(run.ledger, rank=0, world=1, compute_dtype=torch.bfloat16)
        stream.get(0)
        waits: list[float] = []
        epochs = set()
        for step in range(1, num_steps):
            time.sleep(self.step_s)
            begin = time.perf_counter()
            await_batch(run, ranks, Hooks(), step)
            epochs.add(stream.get(step).batch.epoch)
            waits.append(time.perf_counter() - begin)
        stream.close()
        run.close()
        assert epochs == {0}, "a later epoch waits for nobody"
        half = waits[len(waits) // 2 :]
        return self._share(waits), self._share(half)

    def _share(self, waits: Sequence[float]) -> float:
        return sum(waits) / (sum(waits) + self.step_s * len(waits))

    def ahead(self) -> float:
        told = read_progress(self.run)
        assert told is not None
        sizes = {}
        for unit in self.dataset.units(ROWS):
            parts = [part for facet in self.plan.facets for part in self.dataset.unit_parts(facet, unit)]
            sizes[unit] = part_bytes(self.dataset, parts)
        return bytes_ahead(told, sizes)


def write_source(folder: Path, num_units: int) -> None:
    folder.mkdir()
    chance = np.random.default_rng(0)
    for number in range(num_units * UNIT):
        pixels = chance.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((96, 96), Image.Resampling.BICUBIC).save(folder / f"{number:05d}.png")
        words = " ".join(["word"] * int(chance.integers(1, 16)))
        (folder / f"{number:05d}.txt").write_text(f"picture {number} {words}")


def bytes_of_a_unit(root: Path, source: Path) -> int:
    world = World(root, source, 1, step_s=1.0)
    thread = threading.Thread(target=world.produce, args=(1,))
    thread.start()
    while not (units := world.dataset.units(ROWS)):
        time.sleep(0.1)
    world.stop.set()
    thread.join()
    parts = [part for facet in world.plan.facets for part in world.dataset.unit_parts(facet, units[0])]
    return part_bytes(world.dataset, parts)


def stalled(root: Path, source: Path, num_units: int, bound: int, step_s: float) -> Figures:
    folder = root / f"stalled-{time.monotonic_ns()}"
    world = World(folder, source, num_units, step_s)
    thread = threading.Thread(target=world.produce, args=(bound,))
    thread.start()
    world.train(6, bound)
    quiet, seen = 0, -1
    while quiet < 6:  # units that were begun are finished
        time.sleep(0.5)
        now = len(world.dataset.units(ROWS))
        quiet, seen = (quiet + 1 if now == seen else 0), now
    world.stop.set()
    thread.join()
    assert seen < num_units, "make the source longer"
    return {"bytes ahead / bound": world.ahead() / bound}


def waiting(root: Path, source: Path, num_units: int, bound: int, step_s: float) -> Figures:
    folder = root / f"waiting-{time.monotonic_ns()}"
    world = World(folder, source, num_units, step_s)
    thread = threading.Thread(target=world.produce, args=(bound,))
    thread.start()
    whole, half = world.train(num_units, bound)
    world.stop.set()
    thread.join()
    return {"wait (share)": whole, "wait in the second half (share)": half}


def main() -> int:
    options = parser(__doc__, repeats=3)
    options.add_argument("--step-s", type=float, default=1.0)
    args = options.parse_args()
    torch.set_num_threads(1)
    run_data._POLL_S = 0.1  # type: ignore[misc]
    num_units = 40 if args.quick else 96
    with scratch("backpressure") as folder:
        source = folder / "source"
        write_source(source, num_units)
        bound = BOUND_UNITS * bytes_of_a_unit(folder / "one", source)
        variants: dict[str, Any] = {
            "stalled": partial(stalled, folder, source, num_units, bound, args.step_s),
            "waiting": partial(waiting, folder, source, num_units, bound, args.step_s),
        }
        report = Report(
            name="backpressure",
            what=f"producers at {HEADROOM} times the demand, held back by about {BOUND_UNITS} units",
            settings={
                "units": num_units,
                "rows": UNIT,
                "workers": WORKERS,
                "step_s": args.step_s,
                "bound_mb": bound / 1e6,
            },
            targets=["bytes ahead <= 1.1 x the bound", "wait <= 1 % of the time"],
        )
        for name, figures in interleaved(variants, repeats=1 if args.quick else num_repeats(args), warmup=0).items():
            report.add(name, figures)
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(main())
